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

from .data.prepare.commands import add_commands as add_prepare_steps


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

    command("quickstart", _quickstart, "Train a tiny model in a checkout, and load it in every way.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
