"""The sub-commands of `lusifer-hf prepare`; `lusifer_hf.data.prepare` itself needs the extra of that name."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module


def add_commands(command: Callable[..., argparse.ArgumentParser]):
    """Declare them; `command(name, handler, description)` makes a parser."""

    def step(name: str, function: str, description: str) -> argparse.ArgumentParser:
        parser = command(name, partial(_run, function), description)
        parser.add_argument("inputs", nargs="+", metavar="DATA", help="file, folder or Hub id of a data set")
        parser.add_argument("--output", required=True, metavar="FOLDER", help="written when the step is finished")
        return parser

    def add_processes(parser: argparse.ArgumentParser):
        parser.add_argument("--num-processes", type=int, metavar="N")

    def add_model(parser: argparse.ArgumentParser):
        parser.add_argument("--model", required=True, metavar="ID", help="that embeds: Hub id or folder")
        parser.add_argument("--instruction", help="what the embeddings are for, in English")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code of the model's repository")

    parser = step("import", "importing.import_data", "Bring raw data into rows of query, positive and negative.")
    add_processes(parser)
    kinds = ("beir", "pairs", "labels", "label-names", "nli", "sts", "parallel")
    parser.add_argument("--kind", required=True, choices=kinds, help="what the data is")
    parser.add_argument("--columns", type=_pairs, metavar="OURS=THEIRS,...", help="such as text=utterance")
    parser.add_argument("--where", type=_pairs, metavar="COLUMN=VALUE,...", help="take these records alone")
    parser.add_argument("--split", metavar="NAME", help="of judgements, saved folders and the Hub; default: train")
    parser.add_argument("--negatives", type=int, metavar="N", help="of a row of labelled data; default: 7")
    parser.add_argument("--min-score", type=float, metavar="X", help="of a pair of kind sts; default: 4.0")
    parser.add_argument("--seed", type=int, metavar="N")

    parser = step("clean", "cleaning.clean", "Remove empty, short, long, damaged and repeated texts.")
    add_processes(parser)
    parser.add_argument("--min-query-words", type=int, metavar="N")
    parser.add_argument("--min-characters", type=int, metavar="N")
    parser.add_argument("--max-characters", type=int, metavar="N")
    parser.add_argument("--scripts", nargs="+", metavar="NAME", help="such as LATIN: texts in others go")

    parser = step("dedup", "deduplication.deduplicate", "Remove duplicates and near duplicates; the first one stays.")
    add_processes(parser)
    parser.add_argument("--threshold", type=float, metavar="X", help="similarity of near duplicates; default: 0.8")
    parser.add_argument("--exact", dest="threshold", action="store_const", const=None, help="no near duplicates")
    parser.add_argument("--compare", choices=("row", "query"), help="default: query and positive must be alike")

    parser = step("decontaminate", "decontamination.decontaminate", "Remove rows that are in evaluation data.")
    add_processes(parser)
    parser.add_argument("--against", nargs="+", required=True, metavar="DATA", help="evaluation files or folders")
    parser.add_argument("--where", type=_pairs, metavar="COLUMN=VALUE,...", help="such as split=test")
    parser.add_argument("--ngram-words", type=int, metavar="N", help="shared words in a row that count; default: 8")
    parser.add_argument("--threshold", type=float, metavar="X", help="similarity of near duplicates; default: 0.8")

    parser = step("mine", "mining.mine", "Add hard negatives. Also with accelerate launch, on several GPUs.")
    add_model(parser)
    parser.add_argument("--document-prompt", metavar="TEXT", help="such as 'passage: ', for other models than ours")
    parser.add_argument("--corpus", nargs="+", metavar="FILE", help="as BEIR's corpus.jsonl; default: all positives")
    parser.add_argument("--range-min", type=int, metavar="N", help="first rank to take from; default: 30")
    parser.add_argument("--range-max", type=int, metavar="N", help="rank to stop at; default: 128")
    parser.add_argument("--num-negatives", type=int, metavar="N", help="of a row, at most; default: 32")
    parser.add_argument("--sampling-strategy", choices=("top", "random"), help="default: random")
    parser.add_argument("--absolute-margin", type=float, metavar="X", help="below the positive's score")
    parser.add_argument("--relative-margin", type=float, metavar="X", help="below it by this share, such as 0.05")
    parser.add_argument("--cross-encoder", metavar="ID", help="scores the window's documents again")
    parser.add_argument("--seed", type=int, metavar="N")

    parser = step("cluster", "clustering.cluster", "Number the clusters of queries. Also with accelerate launch.")
    add_model(parser)
    parser.add_argument("--clusters", type=int, metavar="N", help="at most; default: 1024")
    parser.add_argument("--iterations", type=int, metavar="N", help="of k-means; default: 200")
    parser.add_argument("--min-cluster-size", type=int, metavar="N", help="default: 20")
    parser.add_argument("--seed", type=int, metavar="N")

    parser = step("sample", "sampling.sample", "Take fewer rows, balanced over the clusters.")
    parser.add_argument("--rows", type=int, required=True, metavar="N", help="to keep of each data set")
    parser.add_argument("--seed", type=int, metavar="N")

    parser = command("stats", _stats, "Show counts, lengths, duplicates and clusters.")
    parser.add_argument("inputs", nargs="+", metavar="DATA", help="file, folder or Hub id of a data set")
    parser.add_argument("--output", metavar="FOLDER", help="also write them, with a picture")


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE,NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _run(function: str, **options):
    """Only a step that is run has its packages imported."""
    module, _, name = function.partition(".")
    getattr(import_module(f"lusifer_hf.data.prepare.{module}"), name)(**options)


def _stats(**options):
    from .data.prepare.stats import describe

    print(describe(**options))
