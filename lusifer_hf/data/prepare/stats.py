"""What is in data sets: how many rows, how long their texts, how many duplicates, how large their clusters."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ...publishing import new_folder
from .deduplication import words, words_hash
from .steps import SHARD_ROWS, check_output, named_sources, read_rows


QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}


def describe(inputs: Sequence[str | Path], output: str | Path | None = None) -> str:
    """
    Describe data sets.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`, *optional*): A folder for `stats.md`, `stats.json` and `stats.png`.

    Returns:
        `str`: Markdown tables of rows, lengths (in characters) and clusters.
    """
    if output is not None:
        check_output(Path(output))
    found = {name: _describe(read_rows(source), name) for name, source in named_sources(inputs).items()}
    text = _markdown(found)
    if output is not None:
        with new_folder(output) as folder:
            (folder / "stats.md").write_text(text + "\n", encoding="utf-8")
            plain = {name: {key: part for key, part in facts.items() if key != "all"} for name, facts in found.items()}
            (folder / "stats.json").write_text(
                json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            _plot(found, folder / "stats.png")
    return text


def _describe(dataset: Dataset, name: str) -> dict:
    lengths = {field: [] for field in ("query", "positive", "negative")}
    hashes = {field: [] for field in ("query", "row")}
    starts = range(0, len(dataset), SHARD_ROWS)
    for start in tqdm(starts, desc=f"Reading {name}", unit="shard", disable=len(starts) < 2):
        columns = dataset[start : start + SHARD_ROWS]
        texts = {"query": [query or "" for query in columns["query"]]}
        texts |= {field: [text for row in columns[field] for text in row] for field in ("positive", "negative")}
        for field, values in texts.items():
            lengths[field].append(np.fromiter(map(len, values), dtype=np.int64))
        rows = ["\n".join([query, *row]) for query, row in zip(texts["query"], columns["positive"], strict=True)]
        for field, values in (("query", texts["query"]), ("row", rows)):
            hashes[field].append(np.fromiter((words_hash(words(text)) for text in values), dtype=np.uint64))
    lengths = {field: np.concatenate(parts) for field, parts in lengths.items()}
    rows = len(dataset)
    facts = {
        "rows": rows,
        "positives": len(lengths["positive"]),
        "negatives": len(lengths["negative"]),
        "repeated queries": rows - len(np.unique(np.concatenate(hashes["query"]))),
        "repeated rows": rows - len(np.unique(np.concatenate(hashes["row"]))),
        "characters": {
            field: {label: int(np.quantile(values, share, method="nearest")) for label, share in QUANTILES.items()}
            for field, values in lengths.items()
            if len(values)
        },
        "all": lengths,
    }
    clusters = dataset.data.column("cluster").drop_null()
    if len(clusters):
        sizes = np.unique(clusters.to_numpy(), return_counts=True)[1]
        facts["clusters"] = {"number": len(sizes), "smallest": int(sizes.min()), "largest": int(sizes.max())}
        facts["clusters"] |= {"median": int(np.median(sizes)), "rows without": rows - len(clusters)}
    return facts


def _markdown(found: dict[str, dict]) -> str:
    counts = ("rows", "positives", "negatives", "repeated queries", "repeated rows")
    lines = [f"| data set | {' | '.join(counts)} |", "|---|" + "---:|" * len(counts)]
    for name, facts in found.items():
        lines.append(f"| {name} | {' | '.join(f'{facts[count]:,}' for count in counts)} |")
    lines += ["", f"| characters | {' | '.join(QUANTILES)} |", "|---|" + "---:|" * len(QUANTILES)]
    for name, facts in found.items():
        for field, quantiles in facts["characters"].items():
            lines.append(f"| {name}, {field} | {' | '.join(f'{value:,}' for value in quantiles.values())} |")
    clustered = {name: facts["clusters"] for name, facts in found.items() if "clusters" in facts}
    if clustered:
        labels = list(next(iter(clustered.values())))
        lines += ["", f"| clusters | {' | '.join(labels)} |", "|---|" + "---:|" * len(labels)]
        for name, clusters in clustered.items():
            lines.append(f"| {name} | {' | '.join(f'{value:,}' for value in clusters.values())} |")
    return "\n".join(lines)


def _plot(found: dict[str, dict], path: Path):
    """The distribution of lengths, a row for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 1.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    longest = max(values.max(initial=1) for facts in found.values() for values in facts["all"].values())
    bins = np.geomspace(1, longest + 1, 60)
    for ax, (name, facts) in zip(axes, found.items(), strict=True):
        for field, values in facts["all"].items():
            if len(values):
                ax.hist(values, bins, weights=np.full(len(values), 100 / len(values)), alpha=0.6, label=field)
        ax.set(xscale="log", ylabel="% of texts", title=f"{name}: {facts['rows']:,} rows")
        ax.legend(frameon=False)
    axes[-1].set_xlabel("characters")
    figure.savefig(path, dpi=150)
