"""
What all steps of data preparation share: they read data sets, work shard by shard, and leave a folder with a manifest.

`step` in three steps: (1) check the inputs and the output before any work, (2) let the caller fill a folder beside the
output, whose finished shards a run that was killed finds again if it starts from the same files with the same
parameters, (3) write the manifest and give the folder its final name. So an output is there whole, or not at all.
Shards have a fixed number of rows: how many processes work on them changes nothing.
"""

import gzip
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ... import __version__
from ..mixture import FEATURES, FIELDS, FORMATS, DataSource, RowReader, open_source


logger = logging.getLogger(__name__)

ROW_FEATURES = Features({field: FEATURES[field] for field in FIELDS["preparation"]})
MANIFEST = "manifest.json"
SHARD_ROWS = 10_000  # some seconds of the slowest step: what a kill costs at most


class Step:
    """The running step that [`step`] yields: its data sets by name, and where their results go."""

    def __init__(
        self, inputs: dict[str, DataSource], folder: Path, num_processes: int, state: PartialState | None = None
    ):
        self.inputs, self.folder, self.num_processes, self.state = inputs, folder, num_processes, state
        self.report: dict[str, dict] = {}

    @property
    def is_main(self) -> bool:
        return self.state is None or self.state.is_main_process

    def main_first(self):
        """A context that the other processes enter when the first one has left it."""
        return nullcontext() if self.state is None else self.state.main_process_first()

    def wait(self):
        if self.state is not None:
            self.state.wait_for_everyone()

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        # Not forked: threads of torch or faiss may hold locks.
        return ProcessPoolExecutor(self.num_processes, multiprocessing.get_context("spawn"))

    def close(self):
        if "_pool" in self.__dict__:
            self._pool.shutdown(cancel_futures=True)

    def read(self, name: str) -> Dataset:
        """The rows of a data set, in memory-mapped form: `ROW_FEATURES`, every value checked."""
        with self.main_first():  # which the library keeps on the disk for the others
            return read_rows(self.inputs[name])

    def map(self, dataset: Dataset, function: Callable[[dict], dict], features: Features, name: str) -> Dataset:
        """
        Apply a function to shards of a data set, `num_processes` at a time; finished shards are kept on disk.

        Args:
            dataset (`Dataset`)
            function (callable): Takes a shard as a `dict` of columns and returns one. Other processes import it.
            features (`Features`): Of the result.
            name (`str`): Of the result among those of this step.

        Returns:
            `Dataset`: The results one after the other, memory-mapped.
        """
        folder = self.folder / "shards" / name
        folder.mkdir(parents=True, exist_ok=True)
        slices = [slice(start, start + SHARD_ROWS) for start in range(0, len(dataset), SHARD_ROWS)]
        paths = [folder / f"{rows.start:012d}.arrow" for rows in slices]
        todo = [(rows, path) for rows, path in zip(slices, paths, strict=True) if not path.exists()]
        done = len(dataset) - sum(len(range(len(dataset))[rows]) for rows, _ in todo)
        work = partial(_do_shard, dataset, function, features)
        with tqdm(total=len(dataset), initial=done, desc=name, unit="row", disable=_is_quiet()) as progress:
            for rows in (map if self.num_processes == 1 or len(todo) < 2 else self._pool.map)(work, todo):
                progress.update(rows)
        return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])

    def write(self, name: str, dataset: Dataset, rows_in: int, dropped: Counter[str]):
        """Write the result of a data set without its empty columns, and note its number of rows and why rows went."""
        batches = dataset.select_columns(used_fields(dataset)).iter(SHARD_ROWS)
        self.write_batches(name, batches, len(dataset), rows_in, dropped)

    def write_batches(
        self, name: str, batches: Iterable[dict[str, list]], rows_out: int, rows_in: int, dropped: Counter[str]
    ):
        """`write` for rows that are made meanwhile, as columns of some of the fields; they are not held in memory."""
        file_name = self.file_name(name)
        write_rows(_watched(batches, rows_out, f"Writing {file_name}"), self.folder / file_name)
        self.report[name] = {"rows_in": rows_in, "rows_out": rows_out, "dropped": dict(sorted(dropped.items()))}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())) or "none dropped"
        logger.info(f"{name}: {rows_in:,} rows in, {rows_out:,} out ({reasons})")

    def keep(self, name: str, dataset: Dataset, reasons: Sequence[str | None]):
        """Write the rows that no reason speaks against."""
        dropped = Counter(reason for reason in reasons if reason is not None)
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        # Without it every access would go through a table of indices.
        self.write(name, dataset if len(kept) == len(dataset) else dataset.select(kept), len(dataset), dropped)

    def file_name(self, name: str) -> str:
        """In the input's format if it is one that we write."""
        suffixes = sorted(FORMATS, key=len, reverse=True)
        return name + next((suffix for suffix in suffixes if self.inputs[name].path.endswith(suffix)), ".jsonl.gz")


@contextmanager
def step(
    name: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    parameters: dict,
    *,
    others: Sequence[str | Path] = (),
    num_processes: int = 1,
    distributed: bool = False,
) -> Iterator[Step]:
    """
    Run a step from data sets to a folder with a data set of the same name for each, and the manifest.

    Args:
        name (`str`): Of the step, in the manifest.
        inputs (sequence of `str`): Data sets: files, folders or ids on the Hub, as in [`~data.mixture.DataSource`].
        output (`str`): The folder to write.
        parameters (`dict`): What decides the result beside the inputs, for the manifest.
        others (sequence of `str`): Further files that decide the result.
        num_processes (`int`, *optional*, defaults to 1)
        distributed (`bool`, *optional*, defaults to `False`):
            Whether all processes of `accelerate launch` take part. The first one opens the folder and finishes it.

    Raises:
        `OSError`, `TypeError`, `ValueError`: before any work, naming the file.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be 1 or more.")
    if not distributed and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{name} is not a step for several processes of accelerate launch: set num_processes instead."
        )
    output = Path(output)
    sources = named_sources(inputs)
    start = time.time()
    hashes = {str(path): content_hash(path) for path in [*inputs, *others]}
    record = {"step": name, "version": __version__, "inputs": hashes, "parameters": parameters}
    folder = output.with_name(f".{output.name}.partial")
    state = None
    if distributed:
        # Without `cpu` processes would not find each other on CPUs. The others wait while the first one searches.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(weeks=1))
    running = Step(sources, folder, num_processes, state)
    with running.main_first():
        if running.is_main:
            check_output(output)
            _open_folder(folder, record)
    try:
        yield running  # after an error the folder stays, so that the same call goes on
    finally:
        running.close()
    with running.main_first():
        if running.is_main:
            record |= {"data": running.report, "seconds": round(time.time() - start, 1)}
            _finish(folder, output, [*_history(inputs), record])


def _finish(folder: Path, output: Path, manifest: list[dict]):
    _write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / "shards", ignore_errors=True)
    (folder / "step.json").unlink()
    if output.is_dir():
        output.rmdir()
    folder.rename(output)


def _history(inputs: Sequence[str | Path]) -> list[dict]:
    """What the manifests beside the inputs say, each entry once."""
    paths = dict.fromkeys(Path(path).parent / MANIFEST for path in inputs)
    entries = [entry for path in paths if path.is_file() for entry in json.loads(path.read_text(encoding="utf-8"))]
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]


def named_sources(inputs: Sequence[str | Path]) -> dict[str, DataSource]:
    """The data sets by name; raises a `ValueError` if two have the same."""
    sources = [DataSource(str(path)) for path in inputs]
    names = [source.name.removesuffix(".tsv").removesuffix(".csv") for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two inputs have the name {name!r}, which tells their results apart: rename one.")
    return dict(zip(names, sources, strict=True))


def check_output(output: Path):
    """Raise an `OSError` if the output folder holds something, or cannot be written."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: choose another output folder, or remove it first.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{output} cannot be made: {output.parent} is no folder.") from None
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"{output.parent} cannot be written to: choose another output folder.")


def read_rows(source: DataSource) -> Dataset:
    """The rows of a data set with the columns `ROW_FEATURES`, memory-mapped; ids must not repeat."""
    dataset = open_source(source, streaming=False)
    if len(dataset) == 0:
        raise ValueError(f"The data set {source.path} holds no rows.")
    rows = dataset.map(
        RowReader(source, "preparation"),
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=Features({"row": FEATURES["row"], **ROW_FEATURES}),
        desc=f"Checking {source.name}",
    ).remove_columns("row")
    check_ids(rows, source.path)
    for field in ("positive", "negative"):
        counts, id_counts = (
            pc.list_value_length(rows.data.column(column)).to_numpy() for column in (field, f"{field}_id")
        )
        wrong = np.flatnonzero((id_counts > 0) & (id_counts != counts))
        if len(wrong):
            raise ValueError(
                f"{source.path}, row {wrong[0]} (from 0) has {counts[wrong[0]]} texts in {field} and "
                f"{id_counts[wrong[0]]} in {field}_id: give an id for each, or none."
            )
    return rows


def column_values(dataset: Dataset, name: str) -> np.ndarray:
    """A column as it lies on the disk; `dataset[name]` would decode it row by row."""
    return dataset.data.column(name).to_numpy()


def check_ids(rows: Dataset, path: str | Path):
    """Raise a `ValueError` that names an id that occurs twice."""
    ids = rows.data.column("id").drop_null()
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        worst = counts[int(np.argmax(counts.field("counts")))].as_py()
        raise ValueError(f"{path} has the id {worst['values']!r} {worst['counts']} times: ids must not repeat.")


def check_complete(rows: Dataset, name: str):
    """Raise a `ValueError` that names a row without a query or a positive, which `clean` removes."""
    lacks = pc.or_(
        pc.equal(pc.fill_null(pc.utf8_length(rows.data.column("query")), 0), 0),
        pc.equal(pc.list_value_length(rows.data.column("positive")), 0),
    )
    if pc.any(lacks).as_py():
        row = lacks.index(True).as_py()
        raise ValueError(f"{name}, row {row} (from 0) lacks a query or a positive: clean the data set first.")


def write_rows(batches: Iterable[dict[str, list]], path: Path):
    """Write batches of columns as `.jsonl`, `.json` (one object a line), both also with `.gz`, or as `.parquet`."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        if path.suffix == ".parquet":
            _write_parquet(batches, file)
        elif path.suffix == ".gz":
            # No time in the header, so that equal rows make equal files.
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0) as target:
                _write_json_lines(batches, target)
        else:
            _write_json_lines(batches, file)
    os.replace(partial, path)


def _write_parquet(batches: Iterable[dict[str, list]], file: BinaryIO):
    batches = iter(batches)
    first = next(batches, {field: [] for field in ROW_FEATURES})
    schema = Features({field: ROW_FEATURES[field] for field in first}).arrow_schema
    with pq.ParquetWriter(file, schema) as writer:
        for batch in chain([first], batches):
            writer.write_table(pa.Table.from_pydict(batch, schema))


def _write_json_lines(batches: Iterable[dict[str, list]], file: BinaryIO):
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            fields = {name: value for name, value in zip(batch, values, strict=True) if value is not None}
            file.write((json.dumps(fields, ensure_ascii=False) + "\n").encode())


def _watched(batches: Iterable[dict[str, list]], rows: int, name: str) -> Iterator[dict[str, list]]:
    with tqdm(total=rows, desc=name, unit="row", disable=_is_quiet()) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch["query"]))


def write_arrow(path: Path, features: Features, rows: Iterable[dict]) -> Dataset:
    """Rows in a file of their own, memory-mapped."""
    unfinished = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(unfinished), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    os.replace(unfinished, path)
    return Dataset.from_file(str(path))


def used_fields(dataset: Dataset, always: Collection[str] = ()) -> list[str]:
    """The columns that hold something, and beside the query and the positive those that are always wanted."""

    def is_used(field: str) -> bool:
        column = dataset.data.column(field)
        if isinstance(dataset.features[field], List):
            return bool(pc.sum(pc.list_value_length(column)).as_py())
        return column.null_count < len(column)

    return [field for field in dataset.features if field in ("query", "positive", *always) or is_used(field)]


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of all files in a folder; None for an id on the Hub."""
    path = Path(path).expanduser()
    if path.is_dir():
        parts = [
            f"{part.relative_to(path)} {content_hash(part)}" for part in sorted(path.rglob("*")) if part.is_file()
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _do_shard(dataset: Dataset, function: Callable[[dict], dict], features: Features, item: tuple[slice, Path]) -> int:
    """Write the shard of a slice of the rows; returns how many rows were read."""
    rows, path = item
    columns = dataset[rows]
    result = function(columns)
    unfinished = path.with_suffix(".tmp")
    with ArrowWriter(path=str(unfinished), features=features) as writer:
        if len(next(iter(result.values()))) > 0:
            writer.write_batch(result)
        writer.finalize()
    os.replace(unfinished, path)
    return len(next(iter(columns.values())))


def _open_folder(folder: Path, record: dict):
    """Keep what an earlier run of the same step has finished; remove what another one left."""
    path = folder / "step.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(record)):
        logger.info(f"Continuing with what is in {folder}")
        return
    if folder.exists():
        logger.warning(f"Removing {folder}, which a run with other inputs or parameters left.")
        shutil.rmtree(folder)
    folder.mkdir()
    _write_json(path, record)


def _write_json(path: Path, value):
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _is_quiet() -> bool:
    return logger.getEffectiveLevel() > logging.INFO


@contextmanager
def open_text(path: str | Path) -> Iterator[io.TextIOBase]:
    """Open a text file, also one with `.gz`; a `ValueError` names one that is damaged."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no UTF-8: {error}") from error
