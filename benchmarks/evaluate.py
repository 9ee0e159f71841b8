"""
What an evaluation costs beside embedding: the wall time of `lusifer-hf evaluate` on local retrieval sets, report and
all, that is spent outside of `model.encode`, after the imports and the loading of the model.

    python benchmarks/evaluate.py ../shared/data/eval                    # 36 M parameters, float32, a GPU if any
    python benchmarks/evaluate.py ../shared/data/eval --sets tldr xquad_r
"""

import argparse
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from encode import build_model

from lusifer_hf import LusiferModel
from lusifer_hf.cli import main as lusifer_hf
from lusifer_hf.evaluation import running


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
    parser.add_argument("folder", type=Path, help="with retrieval/SET/LANG in it")
    parser.add_argument("--sets", nargs="+", help="names of sets; default: all")
    args = parser.parse_args()

    retrieval = (args.folder / "retrieval").resolve()
    names = args.sets or sorted(path.name for path in retrieval.iterdir())
    spent = {"encode": 0.0, "load": 0.0, "command": 0.0}
    LusiferModel.encode = timed(LusiferModel.encode, spent, "encode")
    running.load_encoder = timed(running.load_encoder, spent, "load")
    command = timed(lusifer_hf, spent, "command")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}\n\n| set | s in encode | s outside | share outside |\n|---|---|---|---|")
    totals = dict.fromkeys(spent, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        model = scratch / "benchmark" / "model"
        build_model("small", torch.float32, "cpu", scratch / "backbones").save_pretrained(model)
        for name in names:
            (scratch / name / "retrieval").mkdir(parents=True)
            (scratch / name / "retrieval" / name).symlink_to(retrieval / name)
            spent.update(dict.fromkeys(spent, 0.0))
            options = ["--model", str(model), "--local", str(scratch / name), "--output", str(scratch / name / "out")]
            with redirect_stdout(sys.stderr):
                status = command(["evaluate", *options])
            if status != 0:
                raise SystemExit(f"{name} failed")
            print_row(name, spent)
            totals = {part: totals[part] + seconds for part, seconds in spent.items()}
    print_row("all", totals)


def print_row(name: str, spent: dict[str, float]):
    total = spent["command"] - spent["load"]
    outside = total - spent["encode"]
    print(
        f"| {name} | {spent['encode']:.1f} | {outside:.1f} | {outside / total:.1%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
