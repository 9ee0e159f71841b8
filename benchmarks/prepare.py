"""
Time and peak memory of data preparation: a million rows of real sentences.

Query and positive are runs of sentences of `shared/data/raw` (LUSIFER_SHARED names another folder than the `shared`
beside the repository); their number of words has a log-normal distribution. Words are replaced at random, so that no
two rows are alike but by intent: 3 in 100 rows copy an earlier row, 3 copy one with a word in thirty replaced, 2 have
no text, and 1 has an evaluation query. Every step runs in a process of its own. Two sizes show how cost grows. The
model of mine and cluster is a table of random vectors of tokens: what embedding costs is the model's matter.

    python benchmarks/prepare.py                                # 250,000 and 1,000,000 rows
    python benchmarks/prepare.py --rows 20000 --num-processes 2
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from memory import peak_memory


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LUSIFER_SHARED", REPOSITORY.parent / "shared")).resolve()
LANGUAGES = ("en", "es", "fr", "de", "ru", "ar", "hi", "zh")
EVALUATION = SHARED / "data" / "eval" / "retrieval" / "xquad" / "en" / "queries.jsonl"
KINDS = {"fresh": 91, "copy": 3, "near copy": 3, "empty": 2, "evaluation": 1}  # of 100 rows
QUERY_WORDS, POSITIVE_WORDS = (2.3, 0.4), (4.0, 0.7)  # of the logarithm, mean and deviation: 10 and 55 words
REMEMBERED = 10_000  # rows that later ones may copy


def make_rows(rows: int, seed: int) -> Iterator[tuple[str, dict]]:
    """Rows, each with the reason why it must go, or `"fresh"`."""
    rng = random.Random(seed)
    sentences = []
    for language in LANGUAGES:
        with gzip.open(SHARED / "data" / "raw" / f"{language}.txt.gz", "rt", encoding="utf-8") as file:
            sentences += [line.split() for line in file]
    words = [word for sentence in sentences for word in sentence]
    queries = [json.loads(line)["text"] for line in EVALUATION.read_text(encoding="utf-8").splitlines()]

    def text(mean: float, deviation: float) -> list[str]:
        length, taken = max(3, round(rng.lognormvariate(mean, deviation))), []
        while len(taken) < length:
            taken += rng.choice(sentences)
        return changed(taken[:length], 0.3)

    def changed(taken: list[str], share: float) -> list[str]:
        return [rng.choice(words) if rng.random() < share else word for word in taken]

    earlier = []
    for _ in range(rows):
        (kind,) = rng.choices(list(KINDS), KINDS.values()) if len(earlier) == REMEMBERED else ["fresh"]
        if kind in ("copy", "near copy"):
            query, positive = rng.choice(earlier)
            if kind == "near copy":
                positive = changed(positive, 1 / 30)
        else:
            query, positive = text(*QUERY_WORDS), text(*POSITIVE_WORDS)
            if len(earlier) < REMEMBERED:
                earlier.append((query, positive))
            if kind == "empty":
                positive = []
            elif kind == "evaluation":
                query = rng.choice(queries).split()
        yield kind, {"query": " ".join(query), "positive": " ".join(positive)}


def write_model(folder: Path, rows: list[dict]):
    """A model for sentence-transformers that embeds a million texts in a minute."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    from lusifer_hf.quickstart import unigram_tokenizer

    tokenizer = unigram_tokenizer([row["positive"] for row in rows], 8_000)
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=128)], device="cpu").save(str(folder))


def run_step(name: str, source: str, output: str, num_processes: int, model: str) -> dict:
    """One step in this process."""
    from lusifer_hf.data.prepare.cleaning import clean
    from lusifer_hf.data.prepare.clustering import cluster
    from lusifer_hf.data.prepare.decontamination import decontaminate
    from lusifer_hf.data.prepare.deduplication import deduplicate
    from lusifer_hf.data.prepare.importing import import_data
    from lusifer_hf.data.prepare.mining import mine

    step, options = {
        "import": (import_data, {"kind": "pairs"}),
        "clean": (clean, {}),
        "dedup": (deduplicate, {}),
        "decontaminate": (decontaminate, {"against": [str(EVALUATION)]}),
        "mine": (mine, {"model": model, "num_negatives": 4}),
        "cluster": (cluster, {"model": model, "iterations": 20}),
    }[name]
    if name not in ("mine", "cluster"):
        options["num_processes"] = num_processes
    start = time.perf_counter()
    step([source], output, **options)
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory()}


def apart(**options) -> dict:
    command = [sys.executable, __file__, "--measure", json.dumps(options)]
    # A cache of their own: rows that another run has checked would be read from it.
    environment = os.environ | {"HF_DATASETS_CACHE": str(Path(options["output"]).parent / "cache")}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measure(rows: int, num_processes: int, scratch: Path):
    planted = dict.fromkeys(KINDS, 0)
    source, model = scratch / "raw.jsonl", scratch / "model"
    few = [row for _, row in islice(make_rows(rows, seed=1), 5000)]
    write_model(model, few)
    with open(source, "w", encoding="utf-8") as file:
        for kind, row in make_rows(rows, seed=0):
            planted[kind] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"\n{rows:,} rows, {source.stat().st_size / 2**20:,.0f} MiB, of them {planted}\n")
    print("| step | s | rows/s | peak MiB | rows out | dropped |")
    print("|---|---|---|---|---|---|")
    for name in ("import", "clean", "dedup", "decontaminate", "mine", "cluster"):
        paths = {"source": str(source), "output": str(scratch / name), "model": str(model)}
        taken = apart(name=name, num_processes=num_processes, **paths)
        (entry,) = json.loads((scratch / name / "manifest.json").read_text(encoding="utf-8"))[-1]["data"].values()
        (source,) = (path for path in (scratch / name).iterdir() if path.name != "manifest.json")
        print(
            f"| {name} | {taken['seconds']:.0f} | {entry['rows_in'] / taken['seconds']:,.0f} "
            f"| {taken['bytes'] / 2**20:,.0f} | {entry['rows_out']:,} | {entry['dropped']} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--num-processes", type=int, default=1, help="the peak is that of the first process")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(run_step(**args.measure)))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            measure(rows, args.num_processes, Path(scratch))


if __name__ == "__main__":
    main()
