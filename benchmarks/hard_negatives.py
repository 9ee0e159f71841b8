"""
Whether mined negatives help: the quickstart's model trained on with random and with mined ones, and scored.

    make quickstart
    python benchmarks/hard_negatives.py --work FOLDER --seeds 0 1 2    # finished runs are not done again

Every run starts from what the quickstart's step 3 makes, which has seen no negatives but those of its batches and is
the model that mines, and makes as many steps with the same pairs. FOLDER then holds the data, the runs and results.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from lusifer_hf.data.prepare.mining import mine


REPOSITORY = Path(__file__).resolve().parents[1]
QUICKSTART = REPOSITORY / "outputs/quickstart"
MODEL = QUICKSTART / "3_retrieval/final"
NEGATIVES = 3  # of a row
# Fewer rows in a batch than in step 3, which leaves something for a row's own negatives to teach.
TRAINING = {"max_negatives": NEGATIVES, "global_batch_size": 32, "learning_rate": 3e-4}
# Ranks from and to, of 3,733 documents.
WINDOWS = {"mined, ranks 30 to 128": (30, 128), "mined, ranks 5 to 35": (5, 35)}


def write_rows(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(work: Path) -> dict[str, Path]:
    """The same pairs with each kind of negatives, by its name."""
    lines = (QUICKSTART / "prepared/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [{field: json.loads(line)[field] for field in ("query", "positive")} for line in lines]
    documents = sorted({pair["positive"][0] for pair in pairs})
    paths = {"random": work / "random/train.jsonl"}
    write_rows(work / "pairs/train.jsonl", pairs)
    rng = np.random.default_rng(0)
    rows = []
    for pair in pairs:
        drawn = [documents[index] for index in rng.choice(len(documents), NEGATIVES + 1, replace=False)]
        rows.append(pair | {"negative": [text for text in drawn if text not in pair["positive"]][:NEGATIVES]})
    write_rows(paths["random"], rows)
    for name, (first, last) in WINDOWS.items():
        folder = work / f"mined_{first}_{last}"
        paths[name] = folder / "train.jsonl"
        if not folder.exists():
            options = {"range_min": first, "range_max": last, "num_negatives": NEGATIVES, "instruction": "Find:"}
            mine([work / "pairs/train.jsonl"], folder, model=str(MODEL), **options)
    return paths


def train(data: Path, seed: int, steps: int) -> float:
    """nDCG@10 on the held-out pairs after a run."""
    config = yaml.safe_load((REPOSITORY / "configs/quickstart/3_retrieval.yaml").read_text())
    output = data.parent / f"seed{seed}"
    config |= {"model_name_or_path": str(MODEL), "seed": seed, "output_dir": str(output), **TRAINING}
    config |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
    config["data"][0]["path"] = str(data)
    path = data.parent / f"seed{seed}.yaml"
    path.write_text(yaml.safe_dump(config))
    if not (output / "final").exists():
        subprocess.run([sys.executable, "train.py", str(path)], cwd=REPOSITORY, check=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_mean"] for entry in history if "eval_mean" in entry)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    work = args.work.resolve()

    paths = write_data(work)
    scores = {name: [] for name in paths}
    for seed in args.seeds:
        for name, path in paths.items():
            scores[name].append(train(path, seed, args.steps))
    lines = [f"| negatives | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean |"]
    lines.append("|---|" + "---:|" * (len(args.seeds) + 1))
    for name, values in scores.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {np.mean(values):.3f} |")
    (work / "results.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
