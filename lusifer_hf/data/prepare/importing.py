"""
Bring raw data into rows of `query`, `positive` and `negative`.

Every kind is a function from the records of a file to rows. What it must look up (the documents of a BEIR folder, the
texts of a label) stays memory-mapped; in memory are ids, labels and row numbers alone.
"""

import csv
import random
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from ...encoding_lusifer import check_texts
from ..mixture import FORMATS, JSON_FORMATS, DataSource, open_source, parse_json_line
from .deduplication import words_hash
from .steps import ROW_FEATURES, Step, check_ids, column_values, open_text, step, write_arrow


# The columns that each kind reads; `columns` renames them.
COLUMNS = {
    "beir": (),
    "pairs": ("query", "positive"),
    "labels": ("text", "label"),
    "label-names": ("text", "label"),
    "nli": ("premise", "hypothesis", "label"),
    "sts": ("sentence1", "sentence2", "score"),
    "parallel": ("src", "tgt"),
}
ENTAILMENT, CONTRADICTION = ("entailment", "0"), ("contradiction", "2")  # in words, or as SNLI and MNLI number them


def import_data(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    kind: str,
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    split: str = "train",
    negatives: int = 7,
    min_score: float = 4.0,
    seed: int = 0,
    num_processes: int = 1,
) -> Path:
    """
    Import raw data sets; each becomes a data set of rows.

    Args:
        inputs (sequence of `str`):
            `.jsonl`, `.json` (one object a line), both also with `.gz`, `.tsv`, `.csv`, `.parquet`, a folder that
            `Dataset.save_to_disk` wrote, or an id on the Hub. For `kind="beir"` a folder with `corpus.jsonl`,
            `queries.jsonl`, and `qrels.tsv` or `qrels/{split}.tsv`, the layout of MTEB's retrieval data too.
        output (`str`): The folder to write.
        kind (`str`):
            `"beir"`: judged documents are positives, with their ids (judged 0: negatives). `"pairs"`: `query` and
            `positive`. `"labels"`: texts of the same label are positives, of other labels negatives. `"label-names"`:
            the name of the label is the positive, other names the negatives. `"nli"`: what a premise entails is a
            positive, what contradicts it a negative. `"sts"`: pairs with a score of at least `min_score`.
            `"parallel"`: `src` and its translation `tgt`.
        columns (`dict`, *optional*): The file's names of the kind's columns, such as `{"text": "utterance"}`.
        where (`dict`, *optional*): Takes only the records with these values, such as `{"split": "train"}`.
        split (`str`, *optional*, defaults to `"train"`): Of judgements, of folders and of the Hub.
        negatives (`int`, *optional*, defaults to 7): Of a row of labelled data, at most.
        min_score (`float`, *optional*, defaults to 4.0)
        seed (`int`, *optional*, defaults to 0): Draws positives and negatives of labelled data.
        num_processes (`int`, *optional*, defaults to 1)

    Returns:
        `Path`: `output`.
    """
    if kind not in COLUMNS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, COLUMNS))}.")
    columns, where = columns or {}, where or {}
    for column in columns:
        if column not in COLUMNS[kind]:
            known = ", ".join(map(repr, COLUMNS[kind])) or "none"
            raise ValueError(f"columns names {column!r}, which {kind!r} does not read (it reads {known}).")
    parameters = {"kind": kind, "columns": columns, "where": where, "split": split}
    if kind in ("labels", "label-names"):
        parameters |= {"negatives": negatives, "seed": seed}
    if kind == "sts":
        parameters |= {"min_score": min_score}
    with step("import", inputs, output, parameters, num_processes=num_processes) as running:
        for name, source in running.inputs.items():
            if kind == "beir":
                _import_beir(running, name, Path(source.path), split)
                continue
            wanted = {column: columns.get(column, column) for column in COLUMNS[kind]}
            records = read_records(running.folder / "shards", source, wanted, where, split)
            options = {"negatives": negatives, "min_score": min_score, "seed": seed}
            try:
                convert, records, dropped = _CONVERTERS[kind](records, **options)
            except ValueError as error:
                raise ValueError(f"{source.path}: {error}") from error
            rows_in = len(records) + dropped.total()
            running.write(name, running.map(records, convert, ROW_FEATURES, name), rows_in, dropped)
    return Path(output)


def _import_beir(running: Step, name: str, folder: Path, split: str):
    corpus, queries = (
        read_texts(folder / file, running.folder / "shards" / f"{name}.{file}.arrow")
        for file in ("corpus.jsonl", "queries.jsonl")
    )
    paths = [path for path in (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv") if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} has no qrels/{split}.tsv and no qrels.tsv: name the split.")
    found = {"query": [], "positive": [], "negative": []}
    query_ids, document_ids, scores = _read_judgements(paths[0])
    query_rows, document_rows = (
        _look_up(ids, texts, paths[0], file)
        for ids, texts, file in ((query_ids, queries, "queries.jsonl"), (document_ids, corpus, "corpus.jsonl"))
    )
    order = np.argsort(query_rows, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(query_rows[order])) + 1):
        judged = {True: [], False: []}
        for row in rows:
            judged[bool(scores[row] > 0)].append(int(document_rows[row]))
        if judged[True]:
            found["query"].append(int(query_rows[rows[0]]))
            found["positive"].append(judged[True])
            found["negative"].append(judged[False])
    if not found["query"]:
        raise ValueError(f"{paths[0]} judges no document as relevant.")
    rows = Dataset.from_dict(found)
    without = len(queries) - len(rows)
    dropped = Counter({"no relevant document": without} if without else {})
    running.write(name, running.map(rows, _Judged(corpus, queries), ROW_FEATURES, name), len(queries), dropped)


class _Judged:
    def __init__(self, corpus: Dataset, queries: Dataset):
        self.corpus, self.queries = corpus, queries

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        queries = self.queries[columns["query"]]
        judged = {}
        for field in ("positive", "negative"):
            documents = [self.corpus[rows] if rows else {"text": [], "id": []} for rows in columns[field]]
            judged |= {field: [d["text"] for d in documents], f"{field}_id": [d["id"] for d in documents]}
        return _rows(id=queries["id"], query=queries["text"], **judged)


def read_texts(path: Path, target: Path) -> Dataset:
    """A corpus or the queries of a BEIR folder, in a file: `id` and `text`, which begins with the title if any."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")

    def rows() -> Iterator[dict[str, str]]:
        for record, place in _records(path, DataSource(str(path)), "train"):
            for field in ("_id", "text"):
                if field not in record:
                    raise ValueError(f'{place} has no field "{field}".')
            title = record.get("title") or ""
            check_texts([record["text"], title], what=f"{place}, a text")
            yield {"id": str(record["_id"]), "text": f"{title} {record['text']}".strip()}

    texts = write_arrow(target, Features({"id": Value("string"), "text": Value("string")}), rows())
    check_ids(texts, path)
    return texts


def _read_judgements(path: Path) -> tuple[list[str], list[str], list[int]]:
    judgements = []
    with open_text(path) as file:
        next(file)  # the header
        for number, line in enumerate(file, 2):
            cells = line.split("\t")
            if len(cells) != 3 or not cells[2].strip().lstrip("-").isdigit():
                raise ValueError(f"{path}, line {number} is not a query's id, a document's id and a whole number.")
            judgements.append((cells[0], cells[1], int(cells[2])))
    return tuple(zip(*judgements, strict=True)) if judgements else ([], [], [])


def _look_up(ids: Sequence[str], texts: Dataset, path: Path, file: str) -> np.ndarray:
    rows = pc.index_in(pa.array(ids, pa.string()), texts.data.column("id"))
    if rows.null_count:
        missing = ids[rows.is_null().index(True).as_py()]
        raise ValueError(f"{path} judges {missing!r}, which is not in {file}, and {rows.null_count - 1:,} more.")
    return rows.to_numpy()


def read_records(scratch: Path, source: DataSource, columns: dict[str, str], where: dict, split: str) -> Dataset:
    """The records of a file as strings, memory-mapped: the columns of `columns`, by our names."""
    path = Path(source.path).expanduser()

    def records() -> Iterator[dict[str, str]]:
        for record, place in _records(path, source, split):
            values = {}
            for name, column in {**columns, **dict.fromkeys(where)}.items():
                if (column or name) not in record:
                    known = ", ".join(map(repr, record)) or "none"
                    raise ValueError(f"{place} has no field {column or name!r} (it has {known}): name it by columns.")
                values[name] = record[column or name]
            if all(str(values.pop(name) if name not in columns else values[name]) == where[name] for name in where):
                yield {name: _cell(value, f"{place}, field {columns[name]!r}") for name, value in values.items()}

    features = Features({name: Value("string") for name in columns})
    rows = write_arrow(scratch / f"{source.name}.records.arrow", features, records())
    if len(rows) == 0:
        raise ValueError(f"{source.path} holds no records" + (f" with {where}." if where else "."))
    return rows


def _records(path: Path, source: DataSource, split: str) -> Iterator[tuple[dict, str]]:
    """Records and the place of each for error messages."""
    if path.name.endswith((".tsv", ".csv")):
        with open_text(path) as file:
            # A TSV cell of this field's data sets may begin with a quotation mark that no other closes.
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            for record in (reader := csv.DictReader(file, **options)):
                if None in record or None in record.values():
                    raise ValueError(f"{path}, line {reader.line_num} has not as many cells as the header.")
                yield record, f"{path}, line {reader.line_num}"
    elif path.name.endswith(JSON_FORMATS):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                yield parse_json_line(line, place := f"{path}, line {number}"), place
    else:
        if path.is_file() and not path.name.endswith(FORMATS):
            raise ValueError(f"{path} does not end in one of .tsv, .csv, {', '.join(FORMATS)}.")
        for number, record in enumerate(open_source(DataSource(source.path, split=split), streaming=False)):
            yield record, f"{source.path}, row {number} (from 0)"


def _cell(value, name: str) -> str:
    """A text, label or score as a string."""
    if isinstance(value, list | dict):
        raise TypeError(f"{name} is {reprlib.repr(value)}, not a string or a number.")
    return "" if value is None else str(value)


def _rows(**columns: list) -> dict[str, list]:
    """Columns with empty values for what is not given."""
    length = len(columns["query"])
    empty = {"id": None, "query": "", "cluster": None}
    return {name: columns.get(name, [empty.get(name, [])] * length) for name in ROW_FEATURES}


def _pairs(records: Dataset, query: str, positive: str, **_) -> tuple[Callable, Dataset, Counter]:
    return partial(_to_pairs, query=query, positive=positive), records, Counter()


def _to_pairs(columns: dict[str, list], query: str, positive: str) -> dict[str, list]:
    return _rows(query=columns[query], positive=[[text] for text in columns[positive]])


def _sts(records: Dataset, min_score: float, **_) -> tuple[Callable, Dataset, Counter]:
    scores = pc.cast(records.data.column("score"), pa.float64()).to_numpy()
    kept = np.flatnonzero(scores >= min_score)
    dropped = Counter({"score too low": len(records) - len(kept)} if len(kept) < len(records) else {})
    return partial(_to_pairs, query="sentence1", positive="sentence2"), records.select(kept), dropped


def _labels(records: Dataset, negatives: int, seed: int, names: bool, **_) -> tuple[Callable, Dataset, Counter]:
    labels = records.data.column("label").combine_chunks().dictionary_encode()
    if len(labels.dictionary) < 2:
        raise ValueError(f"All labels are {labels.dictionary[0].as_py()!r}: labelled data needs two or more.")
    codes = labels.indices.to_numpy()
    if names:
        texts = [label.replace("_", " ") for label in labels.dictionary.to_pylist()]
        convert = _LabelNames(texts, negatives, seed)
        return convert, records.add_column("code", codes).add_column("number", np.arange(len(codes))), Counter()
    hashes = (words_hash([text]) for text in column_values(records, "text"))
    convert = _SameLabel(records, codes, np.fromiter(hashes, np.uint64, len(records)), negatives, seed)
    kept = np.flatnonzero(convert.has_other_texts)
    dropped = Counter({"only text of its label": len(codes) - len(kept)} if len(kept) < len(codes) else {})
    return convert, records.add_column("number", np.arange(len(codes))).select(kept), dropped


class _LabelNames:
    def __init__(self, names: list[str], negatives: int, seed: int):
        self.names, self.negatives, self.seed = names, negatives, seed

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        negatives = []
        for code, number in zip(columns["code"], columns["number"], strict=True):
            others = [index for index in range(len(self.names)) if index != code]
            drawn = random.Random(f"{self.seed} {number}").sample(others, min(self.negatives, len(others)))
            negatives.append([self.names[index] for index in drawn])
        positives = [[self.names[code]] for code in columns["code"]]
        return _rows(query=columns["text"], positive=positives, negative=negatives)


class _SameLabel:
    """
    A text's positive is another text of its label, its negatives are of other labels; the row's number draws them.

    Rows lie in the order of their labels, those with the same text side by side. What may be drawn for a row is all of
    that but one run: for the positive its copies in the run of its label, for negatives the run of its label.
    """

    def __init__(self, records: Dataset, labels: np.ndarray, texts: np.ndarray, negatives: int, seed: int):
        self.records, self.negatives, self.seed = records, negatives, seed
        self.order = np.lexsort((texts, labels))
        ordered = labels[self.order]
        self.label_runs = np.stack([np.searchsorted(ordered, labels, side) for side in ("left", "right")], axis=1)
        changes = (np.diff(ordered) != 0) | (texts[self.order][1:] != texts[self.order][:-1])
        ends = np.append(np.flatnonzero(changes) + 1, len(labels))
        position = np.argsort(self.order)
        number = np.searchsorted(ends, position, side="right")
        self.copy_runs = np.stack([np.append(0, ends)[number], ends[number]], axis=1)

    @property
    def has_other_texts(self) -> np.ndarray:
        """Whether a row's label has another text (N,)."""
        return (self.label_runs != self.copy_runs).any(axis=1)

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        drawn = [self._draw(number) for number in columns["number"]]
        texts = iter(self.records[np.concatenate(drawn)]["text"])
        rows = [[next(texts) for _ in positions] for positions in drawn]
        positive = [row[0] for row in rows]
        # A text may also stand under another label.
        negative = [
            [text for text in dict.fromkeys(row[1:]) if text not in (row[0], query)]
            for row, query in zip(rows, columns["text"], strict=True)
        ]
        return _rows(query=columns["text"], positive=[[text] for text in positive], negative=negative)

    def _draw(self, number: int) -> np.ndarray:
        """The rows of the positive and of the negatives."""
        generator = np.random.default_rng([self.seed, number])
        (start, end), (first, last) = self.label_runs[number], self.copy_runs[number]
        positive = start + generator.choice(end - start - (last - first), 1)
        positive += (last - first) * (positive >= first)
        others = len(self.order) - (end - start)
        negatives = generator.choice(others, min(self.negatives, others), replace=False)
        negatives += (end - start) * (negatives >= start)
        return self.order[np.concatenate([positive, negatives])]


def _nli(records: Dataset, **_) -> tuple[Callable, Dataset, Counter]:
    premises, labels = column_values(records, "premise"), column_values(records, "label")
    unknown = set(labels) - {*ENTAILMENT, *CONTRADICTION, "neutral", "1", "-1", "-"}
    if unknown:
        raise ValueError(f"The label {min(unknown)!r} is no 'entailment', 'neutral' or 'contradiction'.")
    entailed, contradicted = defaultdict(list), defaultdict(list)
    for number, (premise, label) in enumerate(zip(premises, labels, strict=True)):
        if label in ENTAILMENT:
            entailed[premise].append(number)
        elif label in CONTRADICTION:
            contradicted[premise].append(number)
    rows = Dataset.from_dict(
        {
            "positive": list(entailed.values()),
            "negative": [contradicted.get(premise, []) for premise in entailed],
        }
    )
    return _Triplets(records), rows, Counter({"merged into its premise's row, or no row": len(labels) - len(rows)})


class _Triplets:
    def __init__(self, records: Dataset):
        self.records = records

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        positive, negative = (
            [self.records[numbers]["hypothesis"] if numbers else [] for numbers in columns[field]]
            for field in ("positive", "negative")
        )
        query = [self.records[numbers[0]]["premise"] for numbers in columns["positive"]]
        return _rows(query=query, positive=positive, negative=negative)


_CONVERTERS = {
    "pairs": partial(_pairs, query="query", positive="positive"),
    "parallel": partial(_pairs, query="src", positive="tgt"),
    "labels": partial(_labels, names=False),
    "label-names": partial(_labels, names=True),
    "nli": _nli,
    "sts": _sts,
}
