"""
Whether mined negatives help: a tiny model trained on with random and with mined ones, scored on held-out questions.

    make quickstart
    python benchmarks/hard_negatives.py --work FOLDER                   # finished runs are not done again
    python benchmarks/hard_negatives.py --work FOLDER --gpu --jobs 10   # so many runs at a time

The task is to find the name of the intent, of 77, that a customer's question has (BANKING77, in the folder `shared`
beside the repository; LUSIFER_SHARED names another place). Rows have their own negatives alone, as labelled data has
in the paper. A first run from the quickstart's step 2 with random negatives makes the model that mines; from it all
others make as many steps with the same pairs. FOLDER then holds the data, the runs and results.md.
"""

import argparse
import csv
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from lusifer_hf.data.prepare.mining import mine


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LUSIFER_SHARED", REPOSITORY.parent / "shared")).resolve()
BASE = REPOSITORY / "outputs/quickstart/2_reconstruction_completion/final"
INSTRUCTION = "Find:"
NEGATIVES = 3  # of a row
# No false negatives among the nearest: a question has one intent.
WINDOW = {"range_min": 0, "range_max": 10, "num_negatives": NEGATIVES}


def write_lines(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(work: Path):
    """Pairs, the same with random negatives, and the held-out questions in BEIR's layout."""
    with gzip.open(SHARED / "data/train/banking77.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [{field: row[field] for field in ("query", "positive")} for row in map(json.loads, file)]
    names = sorted({pair["positive"][0] for pair in pairs})
    rng = np.random.default_rng(0)
    drawn = [rng.permutation([name for name in names if name not in pair["positive"]])[:NEGATIVES] for pair in pairs]
    write_lines(work / "pairs/train.jsonl", pairs)
    rows = [pair | {"negative": negatives.tolist()} for pair, negatives in zip(pairs, drawn, strict=True)]
    write_lines(work / "random/train.jsonl", rows)

    with open(SHARED / "data/eval/classification/banking77/en.tsv", encoding="utf-8", newline="") as file:
        records = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        test = [record for record in records if record["split"] == "test"]
    folder = work / "held_out"
    write_lines(folder / "queries.jsonl", [{"_id": str(i), "text": record["text"]} for i, record in enumerate(test)])
    write_lines(folder / "corpus.jsonl", [{"_id": name, "text": name} for name in names])
    lines = [f"{i}\t{record['label'].replace('_', ' ').lower()}\t1" for i, record in enumerate(test)]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n", encoding="utf-8")


def train(work: Path, data: Path, model: Path, output: Path, seed: int, steps: int, gpu: bool) -> float:
    """nDCG@10 on the held-out questions after a run."""
    config = yaml.safe_load((REPOSITORY / "configs/quickstart/3_retrieval.yaml").read_text())
    config |= {"model_name_or_path": str(model), "output_dir": str(output), "seed": seed}
    config |= {"max_negatives": NEGATIVES, "global_batch_size": 32}
    config |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
    if gpu:
        config |= {"use_cpu": False, "attn_implementation": "sdpa"}
    config["data"] = [{"path": str(data), "instruction": INSTRUCTION, "in_batch_negatives": False}]
    config["eval_data"][0]["path"] = str(work / "held_out")
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    if not (output / "final").exists():
        subprocess.run([sys.executable, "train.py", str(path)], cwd=REPOSITORY, check=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_mean"] for entry in history if "eval_mean" in entry)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--first", type=int, default=600, help="steps of the model that mines")
    parser.add_argument("--further", type=int, default=300, help="steps of every model after it")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    work = args.work.resolve()

    write_data(work)
    first = train(work, work / "random/train.jsonl", BASE, work / "first", 0, args.first, args.gpu)
    miner = work / "first/final"
    if not (work / "mined").exists():
        mine([work / "pairs/train.jsonl"], work / "mined", model=str(miner), instruction=INSTRUCTION, **WINDOW)
    runs = [(name, seed) for name in ("random", "mined") for seed in args.seeds]

    def run(name: str, seed: int) -> float:
        data, output = work / name / "train.jsonl", work / f"{name}_seed{seed}"
        return train(work, data, miner, output, seed, args.further, args.gpu)

    with ThreadPoolExecutor(args.jobs) as pool:
        scores = dict(zip(runs, pool.map(lambda which: run(*which), runs), strict=True))
    lines = [f"| negatives | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean |"]
    lines.append("|---|" + "---:|" * (len(args.seeds) + 1))
    for name in ("random", "mined"):
        values = [scores[name, seed] for seed in args.seeds]
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {np.mean(values):.3f} |")
    (work / "results.md").write_text(f"The model that mines: {first:.3f}\n\n" + "\n".join(lines) + "\n")
    sys.stdout.write((work / "results.md").read_text())


if __name__ == "__main__":
    main()
