"""Small files of every kind of local task, from the quickstart's sentences."""

import json
from itertools import pairwise
from pathlib import Path

from lusifer_hf.quickstart import SENTENCES


ENGLISH, SPANISH, SWAHILI = SENTENCES["en"], SENTENCES["es"], SENTENCES["sw"]
TEXTS = [sentence for sentences in SENTENCES.values() for sentence in sentences]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_retrieval(folder: Path, texts: list[str]) -> Path:
    """Each text's first words are a query for it."""
    rows = list(enumerate(texts))
    write(folder / "corpus.jsonl", [json.dumps({"_id": f"d{i}", "title": f"Title {i}", "text": t}) for i, t in rows])
    queries = [{"_id": f"q{i}", "text": " ".join(text.split()[:3])} for i, text in rows]
    write(folder / "queries.jsonl", [json.dumps(query) for query in [*queries, {"_id": "unjudged", "text": "?"}]])
    write(folder / "qrels.tsv", ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i, _ in rows)])
    return folder


def write_local_files(folder: Path) -> Path:
    """A set of every kind, some in two languages."""
    write_retrieval(folder / "retrieval/find/en", TEXTS[:8])
    write_retrieval(folder / "retrieval/find/sw", TEXTS[8:16])
    rows = [{"query": TEXTS[i], "positive": [TEXTS[i + 1]], "negative": TEXTS[i + 2 : i + 5]} for i in range(6)]
    write(folder / "reranking/find/spa-Latn.jsonl", [json.dumps(row) for row in rows])
    labelled = [f"{i}\t{'test' if i % 3 else 'train'}\t{'ab'[i % 2]}\t{text}" for i, text in enumerate(TEXTS)]
    write(folder / "classification/news/en.tsv", ["id\tsplit\tlabel\ttext", *labelled])
    write(folder / "clustering/news/en.tsv", ["id\tsplit\tlabel\ttext", *labelled])
    write(folder / "clustering/trivia/en.tsv", ["topic\ttext", *(f"{i % 3}\t{text}" for i, text in enumerate(TEXTS))])
    pairs = [f"{first}\t{second}\t{score / 2}" for score, (first, second) in enumerate(pairwise(TEXTS))]
    write(folder / "sts/pairs/ru.tsv", ["sentence1\tsentence2\tscore", *pairs[:6]])
    translated = list(zip(SWAHILI, ENGLISH, strict=True))
    write(
        folder / "bitext/said/swh-eng.tsv",
        ["id\tsrc\teng", *(f"{i}\t{s}\t{e}" for i, (s, e) in enumerate(translated))],
    )
    write(
        folder / "bitext/said/spa-fra.tsv", ["spa\tfra", *(f"{s}\t{e}" for s, e in zip(SPANISH, ENGLISH, strict=True))]
    )
    write(folder / "notes.txt", ["Other files are left alone."])
    return folder
    return folder
