"""
What an evaluation costs beside embedding: the wall time of `lusifer-hf evaluate` on local retrieval sets that is spent
outside of `model.encode`, after the model was loaded.

    python benchmarks/evaluate.py ../shared/data/eval                    # 36 M parameters, float32, a GPU if any
    python benchmarks/evaluate.py ../shared/data/eval --sets tldr xquad_r
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from encode import build_model

from lusifer_hf import LusiferModel
from lusifer_hf.evaluation import running
from lusifer_hf.evaluation.local import local_tasks


def timed(function, spent: dict[str, float], name: str):
    """The function, which adds its wall time to `spent[name]`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return wrapper


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", help="with retrieval/SET/LANG in it")
    parser.add_argument("--sets", nargs="+", help="names of sets; default: all")
    args = parser.parse_args()

    wanted = {f"{name}-retrieval" for name in args.sets} if args.sets else None
    tasks = [task for task in local_tasks(args.folder) if task.metadata.type == "Retrieval"]
    tasks = [task for task in tasks if wanted is None or task.metadata.name in wanted]
    spent = {"encode": 0.0, "load": 0.0, "run": 0.0}
    LusiferModel.encode = timed(LusiferModel.encode, spent, "encode")
    running.load_encoder = timed(running.load_encoder, spent, "load")
    timed_run = timed(running.run, spent, "run")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}\n\n| set | s in encode | s outside | share outside |\n|---|---|---|---|")
    totals = dict.fromkeys(spent, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "benchmark" / "model"
        build_model("small", torch.float32, "cpu", Path(scratch) / "backbones").save_pretrained(folder)
        for task in tasks:
            spent.update(dict.fromkeys(spent, 0.0))
            _, failures, _ = timed_run([str(folder)], [task], Path(scratch) / "output")
            if failures:
                raise SystemExit(f"failed: {failures}")
            print_row(task.metadata.name, spent)
            totals = {name: totals[name] + seconds for name, seconds in spent.items()}
    print_row("all", totals)


def print_row(name: str, spent: dict[str, float]):
    total = spent["run"] - spent["load"]
    outside = total - spent["encode"]
    print(f"| {name} | {spent['encode']:.1f} | {outside:.1f} | {outside / total:.1%} |", flush=True)


if __name__ == "__main__":
    main()
