"""`lusifer-hf`: compose, convert and use LUSIFER models from the command line."""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from .cli_prepare import add_commands as add_prepare_steps


PREPARE = "Make training data: import, clean, deduplicate, decontaminate, mine negatives, cluster, sample."
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 1 after an error (2 for wrong arguments, by argparse)."""
    args = vars(_parser().parse_args(argv))
    handler, debug = args.pop("handler"), args.pop("debug")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lusifer_hf").setLevel(logging.INFO)
    try:
        handler(**args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _compose(encoder: str, llm: str, output: str, **options):
    from .composing import compose

    model = compose(encoder, llm, output, **options)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}")
    print("The connector and the projection are untrained: align and train the model before you use its embeddings.")


def _convert(source: str, output: str, **options):
    from .converting import convert

    print(convert(source, output, **options))


def _encode(
    inputs: list[str],
    output: str,
    model: str,
    dtype: str,
    device: str | None,
    attn_implementation: str | None,
    compile_layers: bool,
    **options,
):
    import torch

    from .corpus import INPUT_FORMATS, encode_file
    from .modeling_lusifer import LusiferModel

    files = [text for text in inputs if os.path.isfile(text) or text.endswith(INPUT_FORMATS)]
    if files and len(inputs) > 1:
        raise ValueError(f"{files[0]} is the name of a file: give one file, or texts.")
    if files and not os.path.isfile(files[0]):
        raise FileNotFoundError(f"{files[0]} does not exist.")
    if os.path.exists(output):  # known before gigabytes are read
        raise FileExistsError(f"{output} exists already: choose another output, or remove it first.")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    loaded = LusiferModel.from_pretrained(model, dtype=dtype, attn_implementation=attn_implementation).to(device)
    if compile_layers:
        loaded.compile_layers()
    with tempfile.TemporaryDirectory() as folder:
        source = files[0] if files else Path(folder) / "texts.jsonl"
        if not files:
            source.write_text("".join(json.dumps({options["text_field"]: text}) + "\n" for text in inputs))
        encode_file(loaded, source, output, **options)
    print(output)


def _evaluate(
    model: str,
    output: str,
    baseline: tuple[str, ...] = (),
    benchmark: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    local: str | None = None,
    languages: list[str] | None = None,
    **options,
):
    from .evaluation.examples import load_examples
    from .evaluation.report import write_report
    from .evaluation.results import Evaluation
    from .evaluation.running import run, select_tasks

    selected = select_tasks(benchmark, tasks, local, languages)
    results, failures, revisions = run([model, *baseline], selected, output, **options)
    for failure in failures:
        print(f"failed: {failure.model} on {failure.task}: {failure.error}", file=sys.stderr)
    results = {name: found for name, found in results.items() if found}
    if results:
        report = Path(output) / "report"
        families = {task.metadata.name: task.metadata.type for task in selected}
        of_one = len(benchmark) == 1 and not tasks and local is None
        examples = {
            name: load_examples(Evaluation(name, revisions[name], Path(output)), found, output, selected)
            for name, found in results.items()
        }
        write_report(results, families, report, benchmark=benchmark[0] if of_one else None, examples=examples)
        print(report)
    if failures:
        raise ValueError(f"{len(failures)} evaluations failed; the same command runs them again.")


def _compare(first: str, second: str, results: str | None, local: str | None, **options):
    from .evaluation.examples import known_tasks, load_examples
    from .evaluation.report import comparison_table
    from .evaluation.results import find_evaluation
    from .evaluation.statistics import compare_results

    evaluations = [find_evaluation(results or name, name if results else None) for name in (first, second)]
    loaded = [evaluation.load() for evaluation in evaluations]
    examples = None
    if options.get("unit") != "tasks":
        tasks = known_tasks([result for of_model in loaded for result in of_model])
        if local is not None:
            from .evaluation.local import local_tasks

            tasks += local_tasks(local)
        examples = tuple(
            load_examples(evaluation, of_model, results or name, tasks)
            for evaluation, of_model, name in zip(evaluations, loaded, (first, second), strict=True)
        )
    print("\n".join(f"{name}: {found.name}" for name, found in zip((first, second), evaluations, strict=True)) + "\n")
    print(comparison_table(first, second, compare_results(*loaded, examples, **options)))


def _quickstart():
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from .modeling_lusifer import LusiferModel
    from .quickstart import (
        BACKBONES,
        CONFIGS,
        FOLDER,
        QUERIES,
        SENTENCES,
        STEPS,
        embed_in_every_way,
        prepare,
        score,
        search,
    )

    if not (CONFIGS.is_dir() and os.path.isfile("train.py")):
        raise FileNotFoundError(f"There is no {CONFIGS} here: run this in a checkout of the repository.")
    prepared, finished = FOLDER / "prepared", FOLDER / STEPS[-1] / "final"
    if not prepared.exists():
        counts = prepare(prepared)
        print(
            f"{prepared}: two tiny backbones and " + ", ".join(f"{count:,} {name}" for name, count in counts.items())
        )
    for step in STEPS:
        if not (FOLDER / step / "final").exists():
            print(f"\n$ accelerate launch train.py {CONFIGS / step}.yaml", flush=True)
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
            launch += ["--mixed_precision=no", "--dynamo_backend=no"]
            if subprocess.run([*launch, "train.py", f"{CONFIGS / step}.yaml"], check=False).returncode != 0:
                raise OSError(f"{step} stopped; start the same command again to continue it.")

    backbones = [str(prepared / "backbones" / name) for name in BACKBONES]
    untrained = LusiferModel.from_backbones(*backbones, seed=0)
    before, after = score(untrained, prepared), score(LusiferModel.from_pretrained(finished), prepared)
    print(f"\nnDCG@10 on the pairs that were held out: {before:.3f} untrained, {after:.3f} trained.")
    model = SentenceTransformer(str(finished), device="cpu")
    for query, documents in zip(QUERIES, search(model, prepared, QUERIES), strict=True):
        print(f"\n  {query}\n" + "\n".join(f"  -> {document[:100]}" for document in documents))

    with tempfile.TemporaryDirectory() as scratch:
        ways = embed_in_every_way(finished, Path(scratch))
    embeddings = np.stack(list(ways.values()))  # (ways, texts, H)
    difference = np.ptp(embeddings, axis=0).max() / np.abs(embeddings).max()
    print(f"\n{embeddings.shape[1]} sentences in {len(SENTENCES)} languages, embedded in {len(ways)} ways:")
    print("\n".join(f"  {way}" for way in ways))
    if not difference <= 1e-5:
        raise ValueError(f"The ways to load the model differ by {difference:.1e}, more than 1e-5.")
    print(f"They differ by at most {difference:.1e}.\n\nThe model is in {finished}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lusifer-hf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler, description: str, among=commands) -> argparse.ArgumentParser:
        # An option that is not given is not passed on, so that defaults are written in one place.
        added = among.add_parser(name, help=description, description=description, argument_default=argparse.SUPPRESS)
        added.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        added.set_defaults(handler=handler)
        return added

    compose = command("compose", _compose, "Compose two pretrained backbones into an untrained model.")
    compose.add_argument("output", metavar="OUT", help="folder to write")
    compose.add_argument("--encoder", required=True, metavar="ID", help="multilingual encoder: Hub id or folder")
    compose.add_argument("--llm", required=True, metavar="ID", help="decoder LLM: Hub id or folder")
    compose.add_argument("--seed", type=int, help="makes the fresh weights reproducible")
    compose.add_argument("--dtype", choices=DTYPES, help="default: the dtype that the LLM is stored in")
    compose.add_argument("--connector", choices=("ff", "embedding_table"))
    compose.add_argument("--num-added-tokens", type=int, metavar="N")
    compose.add_argument("--pooling", choices=("mean", "weightedmean", "cls", "lasttoken"))
    compose.add_argument("--added-token-positions", choices=("contiguous", "after_padding"))
    compose.add_argument("--no-projection", dest="projection", action="store_false")

    convert = command("convert", _convert, "Convert a checkpoint of the research code.")
    convert.add_argument("source", metavar="SRC", help="the checkpoint")
    convert.add_argument("output", metavar="OUT", help="folder to write")
    convert.add_argument("--encoder", metavar="ID", help="Hub id or folder, where the checkpoint names none")
    convert.add_argument("--llm", metavar="ID", help="Hub id or folder, where the checkpoint names none")
    convert.add_argument("--pooling", choices=("mean", "weightedmean", "cls", "lasttoken"))
    convert.add_argument("--added-token-positions", choices=("contiguous", "after_padding"))
    convert.add_argument("--keep-adapters", action="store_true", help="do not merge LoRA adapters")
    convert.add_argument("--lora-alpha", type=float, metavar="X", help="where the checkpoint does not say it")
    convert.add_argument("--dtype", choices=DTYPES)

    encode = command("encode", _encode, "Embed a file, or texts. A run that was killed goes on where it stopped.")
    encode.add_argument("inputs", nargs="+", metavar="INPUT", help=".txt, .jsonl (also .gz) or .parquet; or texts")
    encode.add_argument("--output", required=True, metavar="OUT", help=".npy or .parquet")
    encode.add_argument("--model", required=True, metavar="ID", help="Hub id or folder")
    encode.add_argument("--prompt-name", choices=("query", "document"))
    encode.add_argument("--instruction", help="what the embeddings are for, in English")
    encode.add_argument("--batch-size", type=int, metavar="N", help="at most so many texts in a batch")
    encode.add_argument("--max-tokens-per-batch", type=int, metavar="N", help="at most so many tokens in a batch")
    encode.add_argument("--max-length", type=int, metavar="N", help="longer texts are cut to so many tokens")
    encode.add_argument("--normalize", action="store_true", help="give the embeddings length 1")
    encode.add_argument("--truncate-dim", type=int, metavar="N", help="keep so many leading numbers")
    encode.add_argument("--text-field", metavar="NAME", default="text", help="field or column that holds the text")
    encode.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    encode.add_argument("--device", default=None, help="default: the accelerator, if there is one")
    encode.add_argument("--attn-implementation", metavar="NAME", default=None)
    encode.add_argument("--compile-layers", action="store_true", default=False, help="faster long runs on a GPU")

    prepare = commands.add_parser("prepare", help=PREPARE, description=PREPARE)
    prepare_steps = prepare.add_subparsers(required=True, metavar="STEP")
    add_prepare_steps(partial(command, among=prepare_steps))

    evaluate = command("evaluate", _evaluate, "Evaluate a model with mteb. The same command goes on where it stopped.")
    evaluate.add_argument("--model", required=True, metavar="ID", help="Hub id or folder")
    evaluate.add_argument("--baseline", nargs="+", metavar="ID", help="other models, of sentence-transformers too")
    evaluate.add_argument("--benchmark", nargs="+", metavar="NAME", help='such as "LUSIFER(multilingual)"')
    evaluate.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of mteb")
    evaluate.add_argument("--local", metavar="DIR", help="a folder with KIND/SET/LANG files (docs/evaluation.md)")
    evaluate.add_argument("--languages", nargs="+", metavar="LANG", help="default: the 14 of the paper")
    evaluate.add_argument("--output", default="outputs/evaluation", metavar="DIR", help="default: %(default)s")
    evaluate.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    evaluate.add_argument("--devices", nargs="+", metavar="DEVICE", help="several share the texts: cuda:0 cuda:1")
    evaluate.add_argument("--max-length", type=int, metavar="N", help="longer texts are cut to so many tokens")
    evaluate.add_argument("--max-tokens-per-batch", type=int, metavar="N", help="of a LUSIFER model on one device")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch of any other; default: 32")
    evaluate.add_argument("--cache", action="store_true", help="keep embeddings, for texts that come again")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run code of the models' repositories")

    compare = command("compare", _compare, "Compare two evaluated models, and say which differences are within noise.")
    compare.add_argument("first", metavar="A", help="folder with one evaluation; with --results a model's name")
    compare.add_argument("second", metavar="B", help="the same of the other model")
    compare.add_argument("--results", metavar="FOLDER", default=None, help="folder in which both were evaluated")
    compare.add_argument("--local", metavar="FOLDER", default=None, help="files of local tasks, for their examples")
    compare.add_argument("--unit", choices=("examples", "tasks"), help="what is resampled; default: see the docs")
    compare.add_argument("--resamples", type=int, metavar="N")
    compare.add_argument("--seed", type=int, metavar="N")

    command("quickstart", _quickstart, "Train a tiny model in a checkout, and load it in every way.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
