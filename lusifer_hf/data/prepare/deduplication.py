"""
Remove rows that were seen before, in the same data set or in one before it.

`deduplicate` in three steps: (1) per row a hash of its words and MinHash signatures of the character 5-grams of its
query and first positive, shard by shard, (2) rows with the hash of an earlier row go, (3) the queries' signatures are
cut into bands, and of the rows that agree in a band the later goes if both of its signatures agree in a share of
`threshold`. Bands are compared by sorting, one at a time: neither memory nor time grows faster than the number of rows
(but for the sort's logarithm).
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import regex
import xxhash
from datasets import Dataset, Features, List, Value, concatenate_datasets
from rensa import RMinHash
from tqdm.auto import tqdm

from .steps import column_values, step


NUM_HASHES = 128  # of a signature; the estimate of a similarity of 0.8 is within 0.035 two times out of three
NGRAM = 5  # characters
# Scripts that put no space between words: a character with its marks stands for a word.
SPACELESS = r"[\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Hiragana}\p{Katakana}\p{Han}]"
# Not `re`, whose \w leaves out the vowel signs of Indic scripts and so cuts words to pieces.
WORD = regex.compile(rf"{SPACELESS}\p{{M}}*|[\w--{SPACELESS}]+", regex.VERSION1)
SIGNATURE = List(Value("uint32"), length=NUM_HASHES)


def deduplicate(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    threshold: float | None = 0.8,
    compare: str = "row",
    num_processes: int = 1,
) -> Path:
    """
    Remove exact and near duplicates within and across data sets; the first of them stays.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`]. The earlier ones keep their rows.
        output (`str`): The folder to write.
        threshold (`float`, *optional*, defaults to 0.8):
            The Jaccard similarity of the sets of character 5-grams from which rows are near duplicates; None for exact
            duplicates only. Estimated by MinHash (Broder 1997), so a pair close to the threshold may fall either way.
        compare (`str`, *optional*, defaults to `"row"`):
            `"row"`: both the query and the first positive must be alike, `"query"`: the query alone.
        num_processes (`int`, *optional*, defaults to 1)

    Returns:
        `Path`: `output`.
    """
    if compare not in ("row", "query"):
        raise ValueError(f"compare={compare!r} is not one of 'row', 'query'.")
    if threshold is not None:
        check_threshold(threshold)
    parameters = {"threshold": threshold, "compare": compare}
    with step("dedup", inputs, output, parameters, num_processes=num_processes) as running:
        datasets = {name: running.read(name) for name in running.inputs}
        compared = {"row": ("query", "positive"), "query": ("query",)}[compare]
        signed = compared if threshold is not None else ()
        features = Features({"hash": Value("uint64"), **dict.fromkeys(signed, SIGNATURE)})
        sketches = concatenate_datasets(
            [
                running.map(rows, partial(_sketch, compared=compared, signed=signed), features, name)
                for name, rows in datasets.items()
            ]
        )
        first = _first_with_hash(column_values(sketches, "hash"))
        exact = first != np.arange(len(first))
        near = np.zeros_like(exact)
        if threshold is not None:
            near = near_duplicates(sketches, signed, threshold) & ~exact
        start = 0
        for name, rows in datasets.items():
            part = slice(start, start := start + len(rows))
            reasons = np.where(exact[part], "duplicate", np.where(near[part], "near duplicate", None))
            running.keep(name, rows, reasons)
    return Path(output)


def check_threshold(threshold: float):
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be between 0.5 and 1: below, most texts of a topic are alike.")


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and compatibility forms."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def words_hash(text_words: list[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text_words).encode())


def ngrams(text_words: list[str]) -> set[str]:
    """The character n-grams of a text: a language without spaces has them too."""
    text = " ".join(text_words)
    return {text[start : start + NGRAM] for start in range(max(len(text) - NGRAM + 1, 1))}


def signatures(ngram_sets: list[set[str]]) -> np.ndarray:
    """The MinHash signatures of sets (N, `NUM_HASHES`)."""
    rows = RMinHash.digest_matrix_from_token_sets(ngram_sets, NUM_HASHES, seed=42).to_rows()
    return np.array(rows, dtype=np.uint32)


def near_duplicates(sketches: Dataset, fields: Sequence[str], threshold: float) -> np.ndarray:
    """Whether an earlier row has similar signatures in all fields, for every row (N,)."""
    found = np.zeros(len(sketches), dtype=bool)
    size = band_rows(threshold)
    for start in tqdm(range(0, NUM_HASHES, size), desc="Comparing", unit="band"):
        # A band of a signature as one value of as many bytes.
        bands = [np.ascontiguousarray(part[:, start : start + size]) for part in signature_parts(sketches, fields[0])]
        keys = np.unique(np.concatenate(bands).view(f"V{4 * size}").ravel(), return_inverse=True)[1]
        for earlier, later in _neighbours(keys):
            todo = np.flatnonzero(~found[later])
            for part in np.array_split(todo, len(todo) // 100_000 + 1):
                pairs = earlier[part], later[part]
                similarity = np.min([agreement(sketches, field, *pairs) for field in fields], axis=0)
                found[later[part[similarity >= threshold]]] = True
    return found


def band_rows(threshold: float) -> int:
    """The most rows of a band with which pairs at the threshold are met nearly always (19 of 20 times at 0.8)."""
    sizes = [size for size in (16, 8, 4) if (size / NUM_HASHES) ** (1 / size) <= threshold - 0.05]
    return max(sizes, default=2)


def signature_parts(sketches: Dataset, field: str) -> Iterator[np.ndarray]:
    """The signatures (n, `NUM_HASHES`) part by part, as they lie on the disk."""
    for chunk in sketches.data.column(field).chunks:
        yield chunk.flatten().to_numpy().reshape(-1, NUM_HASHES)


def agreement(sketches: Dataset, field: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarities of pairs of rows (n,)."""
    column = sketches.data.column(field)
    left, right = (column.take(rows).combine_chunks().flatten().to_numpy() for rows in (left, right))
    return (left == right).reshape(-1, NUM_HASHES).mean(axis=1)


def _sketch(columns: dict[str, list], compared: Sequence[str], signed: Sequence[str]) -> dict[str, np.ndarray]:
    texts = {"query": [words(query or "") for query in columns["query"]]}
    if "positive" in compared:
        texts["positive"] = [words(positive[0]) if positive else [] for positive in columns["positive"]]
    rows = ([word for text in row for word in [*text, "\n"]] for row in zip(*texts.values(), strict=True))
    hashes = np.array([words_hash(row) for row in rows], dtype=np.uint64)
    return {"hash": hashes} | {field: signatures([ngrams(text) for text in texts[field]]) for field in signed}


def _first_with_hash(hashes: np.ndarray) -> np.ndarray:
    """For every row the first row with its hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Pairs of rows with equal keys, `(earlier, later)`: of every row the first with its key, then the one before it.

    All pairs of a large group would be its square; two per row find chains as well as stars.
    """
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    yield _first_with_hash(keys)[order[same]], order[same]
    yield order[same - 1], order[same]
