"""Remove training rows whose texts are in evaluation data: word for word, in part, or nearly."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import regex
from datasets import Features, Value
from rensa import RMinHash, RMinHashLSH

from ..mixture import JSON_FORMATS, parse_json_line
from .deduplication import NUM_HASHES, SPACELESS, band_rows, check_threshold, ngrams, words, words_hash
from .steps import column_values, open_text, step


FORMATS = (*JSON_FORMATS, ".tsv", ".txt", ".parquet")
# What evaluation files hold beside texts, which training data may share.
NOT_TEXT = {
    *("id", "_id", "index_id", "query-id", "corpus-id", "score", "split", "lang", "language", "metadata"),
    *("label", "labels", "topic", "intent", "category"),
}
# Of scripts without spaces. With one, 58 of 100 lines of Thai share a run of eight with 3,000 others; with three, 2.
CHARACTERS_OF_WORD = 3
ONE_CHARACTER = regex.compile(rf"{SPACELESS}\p{{M}}*")


def decontaminate(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    against: Sequence[str | Path],
    where: dict[str, str] | None = None,
    ngram_words: int = 8,
    threshold: float | None = 0.8,
    num_processes: int = 1,
) -> Path:
    """
    Remove the rows whose query or one of whose positives is in evaluation data.

    A text is in the evaluation data if a text there has the same words, shares `ngram_words` words in a row, or has a
    Jaccard similarity of character 5-grams of `threshold`. Case, punctuation and white space do not count.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`): The folder to write.
        against (sequence of `str`):
            Evaluation files or folders of them, whose texts are held in memory: `.jsonl`, `.json`, `.tsv` with a
            header line, `.txt`, `.parquet`. All their strings count but ids, labels and splits.
        where (`dict`, *optional*):
            Of records that have these columns take only those with these values, such as `{"split": "test"}`: files of
            classification often hold the training split too.
        ngram_words (`int`, *optional*, defaults to 8):
            Shorter evaluation texts must agree as a whole. In scripts without spaces three characters are a word.
        threshold (`float`, *optional*, defaults to 0.8): None for no near duplicates.
        num_processes (`int`, *optional*, defaults to 1)

    Returns:
        `Path`: `output`.
    """
    if ngram_words < 3:
        raise ValueError(f"ngram_words={ngram_words} must be 3 or more: shorter runs of words are everywhere.")
    if threshold is not None:
        check_threshold(threshold)
    files = [file for path in against for file in evaluation_files(Path(path))]
    where = where or {}
    parameters = {"where": where, "ngram_words": ngram_words, "threshold": threshold}
    with step("decontaminate", inputs, output, parameters, others=files, num_processes=num_processes) as running:
        finder = _Finder(tuple(files), tuple(where.items()), ngram_words, threshold)
        for name in running.inputs:
            rows = running.read(name)
            found = running.map(rows, finder, Features({"reason": Value("string")}), name)
            running.keep(name, rows, column_values(found, "reason"))
    return Path(output)


def evaluation_files(path: Path) -> list[Path]:
    """The file, or all files of the folder; raises an `OSError` if there is none."""
    if path.is_file():
        if not path.name.endswith(FORMATS):
            raise ValueError(f"{path} does not end in one of {', '.join(FORMATS)}.")
        return [path]
    # BEIR's judgements have ids only.
    files = sorted(part for part in path.rglob("*") if part.name.endswith(FORMATS) and part.name != "qrels.tsv")
    if not files:
        raise FileNotFoundError(f"{path} holds no evaluation data: no file ends in one of {', '.join(FORMATS)}.")
    return files


def evaluation_texts(path: Path, where: dict[str, str]) -> Iterator[str]:
    """All texts of an evaluation file, but for the records that `where` excludes."""
    for record in _records(path):
        if isinstance(record, str) or all(str(record.get(name, value)) == value for name, value in where.items()):
            yield from _strings(record)


def _records(path: Path) -> Iterator[dict | str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        return
    with open_text(path) as file:
        if path.name.endswith(JSON_FORMATS):
            for number, line in enumerate(file, 1):
                yield parse_json_line(line, f"{path}, line {number}")
        elif path.suffix == ".tsv":
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from (line.rstrip("\n") for line in file)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in NOT_TEXT:
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True)
class _Finder:
    """Finds the texts of files in shards of training rows."""

    files: tuple[Path, ...]
    where: tuple[tuple[str, str], ...]
    ngram_words: int
    threshold: float | None

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        reasons = []
        for query, positives in zip(columns["query"], columns["positive"], strict=True):
            texts = [("query", query or ""), *(("positive", text) for text in positives)]
            found = (f"{field} {how}" for field, text in texts if (how := self._find(text)))
            reasons.append(next(found, None))
        return {"reason": reasons}

    def _find(self, text: str) -> str | None:
        whole, parts, similar = _index(self)
        text_words = words(text)
        if words_hash(text_words) in whole:
            return "in evaluation data"
        if any(part in parts for part in self.parts(text_words)):
            return f"shares {self.ngram_words} words with evaluation data"
        if similar is not None and similar.find(text_words):
            return "near duplicate of evaluation data"
        return None

    def parts(self, text_words: list[str]) -> Iterator[int]:
        """Hashes of the runs of words that are just long enough, of those at the end of the text none."""
        sizes = [1 if ONE_CHARACTER.fullmatch(word) else CHARACTERS_OF_WORD for word in text_words]
        end, lacking = 0, self.ngram_words * CHARACTERS_OF_WORD
        for start, size in enumerate(sizes):
            while lacking > 0 and end < len(sizes):
                lacking -= sizes[end]
                end += 1
            if lacking > 0:
                return
            yield words_hash(text_words[start:end])
            lacking += size


@lru_cache(maxsize=1)  # in every process once
def _index(finder: _Finder) -> tuple[set[int], set[int], "_Similar | None"]:
    """Hashes of whole texts, hashes of runs of words, and the search for near duplicates."""
    whole, parts = set(), set()
    similar = None if finder.threshold is None else _Similar(finder.threshold)
    for path in finder.files:
        for text in evaluation_texts(path, dict(finder.where)):
            text_words = words(text)
            key = words_hash(text_words)
            if len(text_words) < 2 or key in whole:  # one word is a name or a label
                continue
            whole.add(key)
            parts.update(finder.parts(text_words))
            if similar is not None:
                similar.add(text_words)
    return whole, parts, similar


class _Similar:
    """Texts that are similar to one that was added."""

    def __init__(self, threshold: float):
        self.threshold, self.added = threshold, []
        self.lsh = RMinHashLSH(threshold, NUM_HASHES, NUM_HASHES // band_rows(threshold))

    def add(self, text_words: list[str]):
        minhash = self._minhash(text_words)
        self.lsh.insert(len(self.added), minhash)
        self.added.append(minhash)

    def find(self, text_words: list[str]) -> bool:
        minhash = self._minhash(text_words)
        return any(minhash.jaccard(self.added[key]) >= self.threshold for key in self.lsh.query(minhash))

    def _minhash(self, text_words: list[str]):
        minhash = RMinHash(NUM_HASHES, 42)
        minhash.update(ngrams(text_words))
        return minhash
