"""
What training reads: data sets from files, folders or the Hub, checked row by row before training starts.

`load_mixture` in three steps: (1) open every source with the `datasets` library, which maps it into memory, (2) bring
its rows into one form, or say which field of which row is wrong; the library keeps the result, so that the next run
starts at once, (3) number the rows of all data sets one after the other.
"""

import glob
import json
import reprlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..encoding_lusifer import check_texts


Stage = Literal["alignment", "representation"]
Task = Literal["reconstruction", "passage_to_query", "query_to_passage"]

JSON_FORMATS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")  # one object a line
FORMATS = (*JSON_FORMATS, ".parquet")
FEATURES = {
    "row": Value("int64"),  # the row's number in its file or split
    "id": Value("string"),
    "query": Value("string"),
    "positive": List(Value("string")),
    "positive_id": List(Value("string")),
    "negative": List(Value("string")),
    "negative_id": List(Value("string")),
    "answer": Value("string"),
    "cluster": Value("int64"),
}
FIELDS = {
    "alignment": ("query", "positive", "answer"),
    "representation": ("query", "positive", "negative", "cluster"),
    "preparation": ("id", "query", "positive", "positive_id", "negative", "negative_id", "cluster"),
}


@dataclass
class DataSource:
    """
    One data set of a run, an entry of `data:` in its YAML.

    Its rows are `{"query": str, "positive": [str], "negative": [str]}`, in the alignment stage optionally with an
    `"answer": str`, in the representation stage with a `"cluster": int`. A single string may stand for a list.

    Args:
        path (`str`):
            A file (`.jsonl` or `.json` with one object a line, also with `.gz`, or `.parquet`), a folder of such files
            or one that `Dataset.save_to_disk` wrote, or the id of a data set on the Hub.
        name (`str`, *optional*, defaults to the last part of `path`):
            Its name in logs and error messages.
        subset, split, revision (`str`, *optional*):
            What to take of a folder or of a data set on the Hub; `split` defaults to `"train"`.
        instruction (`str`, *optional*, defaults to `""`):
            What the embeddings are for. Without one the texts are read as they are.
        task (`str`, *optional*):
            In the alignment stage, where it is needed: `"reconstruction"`, `"passage_to_query"` or
            `"query_to_passage"`; see [`~data.collators.AlignmentCollator`].
        weight (`float`, *optional*, defaults to 1.0):
            An epoch holds `weight` times its rows. Streaming: its share of the rows that are read, relative to others.
        max_samples (`int`, *optional*):
            Take so many of its rows, drawn by the seed. Streaming: the first ones.
        in_batch_negatives (`bool`, *optional*, defaults to `True`):
            Whether texts of other rows are negatives. If not, as in classification, every row needs its own negatives.
        columns (`dict`, *optional*):
            Its names of our fields, such as `{"query": "text"}`.
    """

    path: str
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    instruction: str = ""
    task: Task | None = None
    weight: float = 1.0
    max_samples: int | None = None
    in_batch_negatives: bool = True
    columns: dict[str, str] | None = None

    def __post_init__(self):
        texts = {name: getattr(self, name) for name in ("path", "name", "subset", "split", "revision", "instruction")}
        for name, value in texts.items():
            if not isinstance(value, str) and (value is not None or name in ("path", "split", "instruction")):
                raise TypeError(f"{name}={value!r} of the data set {self.path!r} is not a string: put it in quotes.")
        check_texts([self.instruction], what=f"The instruction of the data set {self.path!r}")
        if self.name is None:
            stem = Path(self.path).name
            for suffix in sorted(FORMATS, key=len, reverse=True):
                stem = stem.removesuffix(suffix)
            self.name = f"{stem}-{self.subset}" if self.subset else stem
        tasks = get_args(Task)
        if self.task is not None and self.task not in tasks:
            raise ValueError(f"task={self.task!r} of {self.name} is not one of {', '.join(map(repr, tasks))}.")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight < 1e6:
            raise ValueError(f"weight={self.weight!r} of {self.name} is not a positive number.")
        if self.max_samples is not None and (type(self.max_samples) is not int or self.max_samples < 1):
            raise ValueError(f"max_samples={self.max_samples!r} of {self.name} is not a number of rows, 1 or more.")
        if not isinstance(self.in_batch_negatives, bool):
            raise TypeError(f"in_batch_negatives={self.in_batch_negatives!r} of {self.name} is not true or false.")
        fields = [field for field in FEATURES if field != "row"]
        for field, column in (self.columns or {}).items():
            if field not in fields:
                raise ValueError(
                    f"columns of {self.name} names the field {field!r}, which is not one of "
                    f"{', '.join(map(repr, fields))}: write our field first, then the data set's column."
                )
            if not isinstance(column, str):
                raise TypeError(f"columns of {self.name} maps {field!r} to {column!r}, not to the name of a column.")


def check_sources(sources: Sequence[DataSource], stage: Stage):
    """Raise a `ValueError` for a mixture that cannot be trained on, before anything is loaded."""
    if not sources:
        raise ValueError("There is nothing to train on: list at least one data set under `data:`.")
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise ValueError(f"Two data sets have the name {source.name!r}: give one of them another `name`.")
        if stage == "alignment" and source.task is None:
            tasks = ", ".join(map(repr, get_args(Task)))
            raise ValueError(f"The data set {source.name} has no task, which alignment needs: choose one of {tasks}.")
        if stage == "representation" and source.task is not None:
            raise ValueError(f"The data set {source.name} has a task, which only alignment has: remove it.")


class Mixture(torch.utils.data.Dataset):
    """
    The rows of all data sets, numbered one after the other; `mixture[epoch, index]` is a `dict` of the row's fields,
    its `dataset` (number in `sources`), its `row` (number in its file or split) and the `epoch`.
    """

    def __init__(self, sources: Sequence[DataSource], datasets: Sequence[Dataset]):
        self.sources = list(sources)
        self.sizes = [len(dataset) for dataset in datasets]
        self._datasets = list(datasets)
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        dataset = bisect_right(self._ends, index)
        start = self._ends[dataset] - self.sizes[dataset]
        return {"dataset": dataset, "epoch": epoch, **self._datasets[dataset][index - start]}

    def clusters(self, dataset: int) -> np.ndarray | None:
        """The cluster of each of its rows (-1 where there is none), or None for a data set without clusters."""
        if "cluster" not in self._datasets[dataset].column_names:
            return None
        column = self._datasets[dataset].data.column("cluster")
        return None if column.null_count == len(column) else column.fill_null(-1).to_numpy()


def load_mixture(sources: Sequence[DataSource], stage: Stage, seed: int = 0) -> Mixture:
    """
    Open the data sets of a run and check every row.

    Several processes may call it at once; where they share a cache of `datasets`, let the first one go ahead.

    Args:
        sources (sequence of [`DataSource`])
        stage (`str`): `"alignment"` or `"representation"`, which need different fields.
        seed (`int`, *optional*, defaults to 0): Draws the rows of the sources with `max_samples`.

    Raises:
        `OSError`, `TypeError`, `ValueError`: naming the data set, and the row and field where one is wrong.
    """
    check_sources(sources, stage)
    datasets = []
    for source in sources:
        dataset = open_source(source, streaming=False)
        if len(dataset) == 0:
            raise ValueError(f"The data set {source.path} holds no rows.")
        rows = None
        if source.max_samples is not None and source.max_samples < len(dataset):
            rows = np.sort(np.random.default_rng(seed).choice(len(dataset), source.max_samples, replace=False))
            dataset = dataset.select(rows)
        dataset = dataset.map(
            RowReader(source, stage, rows),
            with_indices=True,
            batched=True,
            remove_columns=dataset.column_names,
            features=Features({field: FEATURES[field] for field in ("row", *FIELDS[stage])}),
            desc=f"Checking {source.name}",
        )
        datasets.append(dataset)
    return Mixture(sources, datasets)


class MixtureStream(torch.utils.data.IterableDataset):
    """
    The items of [`Mixture`] for alignment, read while training: for data sets that are too large to check first.

    Every process reads all rows and keeps its slices of the global batches, so any number of processes trains on the
    same batches in the same order. It has no end: a data set that runs out begins again, its `epoch` one higher.

    Args:
        sources (sequence of [`DataSource`])
        batch_size (`int`): Rows of a process's batch. The `DataLoader` has the same.
        num_processes, process_index (`int`)
        seed (`int`, *optional*, defaults to 0): Decides the order.
        buffer_size (`int`, *optional*, defaults to 10,000): So many rows are shuffled among each other.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        buffer_size: int = 10_000,
    ):
        check_sources(sources, "alignment")
        self.sources = list(sources)
        self.batch_size, self.num_processes, self.process_index = batch_size, num_processes, process_index
        self.seed, self.buffer_size = seed, buffer_size
        self._datasets = [open_source(source, streaming=True) for source in sources]
        for dataset in range(len(sources)):
            if next(self._rows(dataset), None) is None:  # also finds a wrong column before training
                raise ValueError(f"The data set {sources[dataset].path} holds no rows.")

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={worker.num_workers} with streamed data: every worker would read all rows. "
                "Set it to 0 or 1."
            )
        rng = np.random.default_rng(self.seed)
        first = self.process_index * self.batch_size
        for number, item in enumerate(self._shuffled(rng)):
            if first <= number % (self.batch_size * self.num_processes) < first + self.batch_size:
                yield item

    def _shuffled(self, rng: np.random.Generator) -> Iterator[dict]:
        mixed = self._mixed(rng)
        buffer = list(islice(mixed, self.buffer_size))
        for item in mixed:
            index = rng.integers(self.buffer_size)
            yield buffer[index]
            buffer[index] = item

    def _mixed(self, rng: np.random.Generator) -> Iterator[dict]:
        shares = np.cumsum([source.weight for source in self.sources])
        streams = [self._rows(dataset) for dataset in range(len(self.sources))]
        epochs = [0] * len(streams)
        while True:
            dataset = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
            row = next(streams[dataset], None)
            if row is None:
                streams[dataset], epochs[dataset] = self._rows(dataset), epochs[dataset] + 1
                row = next(streams[dataset])
            yield {"dataset": dataset, "epoch": epochs[dataset], **row}

    def _rows(self, dataset: int) -> Iterator[dict]:
        reader = RowReader(self.sources[dataset], "alignment")
        records = islice(self._datasets[dataset], self.sources[dataset].max_samples)
        return (reader.read(record, number) for number, record in enumerate(records))


class RowReader:
    """Brings the rows of a source into the form of a stage; its errors name the row and the field."""

    def __init__(self, source: DataSource, stage: Stage | Literal["preparation"], rows: np.ndarray | None = None):
        # Nothing else of the source: `datasets` would check all rows again when its weight changes.
        self.path, self.fields, self.rows = source.path, FIELDS[stage], rows
        self.columns = {field: field for field in self.fields} | (source.columns or {})
        self.needed = ["query"]
        if stage != "alignment" or source.task != "reconstruction":
            self.needed.append("positive")
        if stage == "representation" and not source.in_batch_negatives:
            self.needed.append("negative")
        self.takes_empty = stage == "preparation"  # which cleaning removes

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """A batch of `Dataset.map`."""
        records = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        numbers = indices if self.rows is None else self.rows[indices].tolist()
        rows = [self.read(record, number) for record, number in zip(records, numbers, strict=True)]
        return {field: [row[field] for row in rows] for field in ("row", *self.fields)}

    def read(self, record: dict, number: int) -> dict:
        """The fields of a row, whose number counts from 0."""
        if self.path.endswith(JSON_FORMATS):
            place = f"{self.path}, line {number + 1}"
            record = parse_json_line(record["text"], place)
        else:
            place = f"{self.path}, row {number} (from 0)"
        row = {"row": number}
        for field in self.fields:
            row[field] = _value(field, record.get(self.columns[field]), f'{place}, field "{self.columns[field]}"')
        for field in self.needed:
            if field == "positive" and row.get("answer") is not None:
                continue
            column, value = self.columns[field], row[field]
            if column not in record:
                raise ValueError(
                    f'{place} has no field "{column}" (it has {", ".join(map(repr, record)) or "none"}): '
                    f"name the right one in the data set's `columns: {{{field}: ...}}`."
                )
            texts = [value] if isinstance(value, str) else value
            if not self.takes_empty and (not texts or not all(text.strip() for text in texts)):
                reason = " (in_batch_negatives is false)" if field == "negative" else ""
                raise ValueError(
                    f'{place}, field "{column}" is {reprlib.repr(value)}: every row needs a text there{reason}. '
                    "Correct or remove the row."
                )
        return row


def _value(field: str, value, name: str) -> str | list[str] | int | None:
    if field == "cluster":
        if value is not None and type(value) is not int:
            raise TypeError(f"{name} is {reprlib.repr(value)}, not an integer.")
    elif isinstance(FEATURES[field], List):
        value = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list):
            raise TypeError(f"{name} is {reprlib.repr(value)}, not a list of strings.")
        check_texts(value, what=name)
    elif value is not None:
        check_texts([value], what=name)
    return value


def parse_json_line(line: str, name: str) -> dict:
    """The object that a line holds; `name` is what an error calls it."""
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}. Each line must hold one object.") from None
    if not isinstance(record, dict):
        raise TypeError(f"{name} is a {type(record).__name__}, not an object. Each line must hold one object.")
    return record


def open_source(source: DataSource, streaming: bool) -> Dataset | IterableDataset:
    """The rows as they are; of JSON files the lines."""
    path = Path(source.path).expanduser()
    # The id of a data set on the Hub has one "/" at most.
    is_path = source.path.startswith((".", "/", "~")) or source.path.endswith(FORMATS) or source.path.count("/") > 1
    if path.is_file():
        if not path.name.endswith(FORMATS):
            raise ValueError(f"{path} does not end in one of {', '.join(FORMATS)}.")
        if source.subset is not None or source.revision is not None:
            raise ValueError(f"{path} is a file, which has no subset and no revision: remove them.")
        if path.stat().st_size == 0:
            raise ValueError(f"The data set {path} holds no rows.")
    elif is_path and not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist (the current folder is {Path.cwd()}).")
    options = {"split": source.split, "streaming": streaming}
    try:
        if path.is_file() and path.name.endswith(JSON_FORMATS):
            # Not the JSON loader, which guesses types from the first rows and names no line of the file.
            return _load_lines(path, **options)
        if path.is_file():
            return load_dataset("parquet", data_files=glob.escape(str(path)), **options)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _load_saved(path, **options)
        name = str(path) if path.is_dir() else source.path
        return load_dataset(name, source.subset, revision=source.revision, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        if path.is_dir() and isinstance(error, DatasetGenerationError):
            _find_bad_line(path)
        advice = "" if path.exists() else ". There is no such path here; is it the right id on the Hub?"
        raise ValueError(f"The data set {source.path} cannot be loaded: {error.__cause__ or error}{advice}") from error


def _load_lines(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    # Escaped, because data_files takes patterns; with features, because a file may be empty.
    options = {"data_files": glob.escape(str(path)), "features": Features({"text": Value("string")})}
    return load_dataset("text", split=split, streaming=streaming, **options)


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    dataset = load_from_disk(str(path))
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"it has no split {split!r}, only {', '.join(map(repr, dataset))}")
        dataset = dataset[split]
    return dataset.to_iterable_dataset() if streaming else dataset


def _find_bad_line(folder: Path):
    """Raise the error of the first line that is no JSON object, which the library's own error does not name."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for number, record in enumerate(_load_lines(path, "train", streaming=True), 1):
                parse_json_line(record["text"], f"{path}, line {number}")
