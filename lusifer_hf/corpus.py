"""
Embed files of any size, in constant memory; a run that was killed goes on where it stopped.

`encode_file` in three steps: (1) read the file once, to count its rows and to refuse bad ones before any long work,
(2) embed it window by window, each written to a folder beside the output and then noted in `state.json`, (3) give the
finished data its final name. Windows are cut by rows and characters from the first row on, so a resumed run embeds the
same windows as an uninterrupted one and its file is the same.
"""

import codecs
import gzip
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .encoding_lusifer import WINDOW_CHARACTERS, check_texts
from .modeling_lusifer import LusiferModel


logger = logging.getLogger(__name__)

INPUT_FORMATS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
OUTPUT_FORMATS = (".npy", ".parquet")
# A checkpoint and a step of the progress bar: some seconds of a large GPU, and enough texts to sort by length.
WINDOW_TEXTS = 2048
PROBE = "The train to the sea leaves at seven every morning."


def encode_file(
    model: LusiferModel,
    source: str | Path,
    output: str | Path,
    *,
    text_field: str = "text",
    prompt_name: str | None = None,
    instruction: str | None = None,
    batch_size: int | None = None,
    max_tokens_per_batch: int | None = None,
    max_length: int | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    show_progress_bar: bool | None = None,
) -> Path:
    """
    Embed a file into a file, row by row in the same order.

    After a crash, or a kill at any moment, the same call continues after the last finished window. Only `batch_size`
    and `max_tokens_per_batch` may differ then, for instance because the memory did not suffice.

    Args:
        model (`LusiferModel`):
            The model, on the device to use.
        source (`str` or `Path`):
            `.txt` (one text a line; an empty line is a text), `.jsonl` (one object a line), both also with `.gz`, or
            `.parquet`.
        output (`str` or `Path`):
            `.npy` for a float32 array of shape `(rows, H)`, which `np.load(output, mmap_mode="r")` opens without
            reading it; `.parquet` for the texts (of a `.parquet` source: all its columns) and a column `embedding` of
            fixed-size lists of float32. It must not exist yet.
        text_field (`str`, *optional*, defaults to `"text"`):
            The field of `.jsonl`, or the column of `.parquet`, that holds the text.
        prompt_name, instruction, batch_size, max_tokens_per_batch, max_length, normalize, truncate_dim (*optional*):
            As in [`LusiferModel.encode`].
        show_progress_bar (`bool`, *optional*):
            By default when the log level is INFO or lower.

    Returns:
        `Path`: `output`.

    Raises:
        `OSError`, `TypeError`, `ValueError`: before any long work, naming the file and the line.
    """
    source, output = Path(source), Path(output)
    _check_files(source, output, text_field)
    options = {
        "prompt_name": prompt_name,
        "instruction": instruction,
        "max_length": max_length,
        "normalize": normalize,
        "truncate_dim": truncate_dim,
    }
    batches = {"batch_size": batch_size, "max_tokens_per_batch": max_tokens_per_batch}
    encode = partial(model.encode, **options, **batches, show_progress_bar=False)
    probe = encode(PROBE)

    folder = output.with_name(output.name + ".partial")
    state = _open_state(folder, _fingerprint(model, source, output, text_field, options, probe))
    parts = (_NpyParts if output.suffix == ".npy" else _ParquetParts)(folder, source, text_field, len(probe))
    if state["rows"] == 0:
        logger.info(f"Checking {source}")
        state["total"] = sum(len(texts) for texts, _ in _windows(source, text_field))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        parts.create(state["total"])
    else:
        logger.info(f"Continuing after {state['rows']:,} of {state['total']:,} rows")

    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() <= logging.INFO
    bar = {"desc": "Encoding", "unit": "text", "disable": not show_progress_bar}
    position = 0
    with tqdm(total=state["total"], initial=state["rows"], **bar) as progress:
        for texts, rows in _windows(source, text_field, parts.columns):
            start, position = position, position + len(texts)
            if position <= state["rows"]:
                continue
            parts.write(start, encode(texts), texts, rows)
            state["rows"] = position
            with _replacing(folder / "state.json") as file:
                file.write(json.dumps(state, ensure_ascii=False, indent=1).encode())
            progress.update(len(texts))

    if _stat(source) != state["fingerprint"]["source"]:
        raise ValueError(f"{source} was changed while it was being embedded: delete {folder} and start again.")
    os.replace(parts.finish(), output)
    shutil.rmtree(folder)
    return output


class _NpyParts:
    """One array on disk, which has its final size from the start."""

    columns = None

    def __init__(self, folder: Path, source: Path, text_field: str, size: int):
        self.path, self.size = folder / "embeddings.npy", size

    def create(self, total: int):
        needed, free = total * self.size * 4, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(f"The embeddings take {needed:,} bytes, and {self.path.parent} has {free:,} free.")
        np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=(total, self.size))

    def write(self, start: int, vectors: np.ndarray, texts: list[str], rows):
        # Not through the memory map: its pages would count as ours, and a full disk kills the process that writes one.
        header = np.load(self.path, mmap_mode="r").offset
        with open(self.path, "r+b") as file:
            file.seek(header + start * self.size * 4)
            file.write(vectors.tobytes())
            _flush(file)

    def finish(self) -> Path:
        return self.path


class _ParquetParts:
    """A file for each window, named by its first row; at the end each becomes a row group."""

    def __init__(self, folder: Path, source: Path, text_field: str, size: int):
        pa, pq = _pyarrow()
        self.folder, self.pa, self.pq = folder, pa, pq
        self.schema = pq.read_schema(source) if source.suffix == ".parquet" else pa.schema([(text_field, pa.string())])
        if "embedding" in self.schema.names:
            raise ValueError(f'{source} has a column "embedding" already: rename it, or write to .npy.')
        self.columns = self.schema.names
        self.schema = self.schema.append(pa.field("embedding", pa.list_(pa.float32(), size)))

    def create(self, total: int):
        pass

    def write(self, start: int, vectors: np.ndarray, texts: list[str], rows):
        columns = [self.pa.array(texts, self.pa.string())] if rows is None else rows.columns
        vectors = self.pa.FixedSizeListArray.from_arrays(vectors.ravel(), type=self.schema.field("embedding").type)
        with _replacing(self.folder / f"{start:012d}.parquet") as file:
            self.pq.write_table(self.pa.table([*columns, vectors], schema=self.schema), file)

    def finish(self) -> Path:
        merged = self.folder / "merged"
        with self.pq.ParquetWriter(merged, self.schema) as writer:
            for part in sorted(self.folder.glob("*.parquet")):
                with self.pq.ParquetFile(part) as file:
                    writer.write_table(file.read(use_threads=False))
        return merged


def _windows(source: Path, text_field: str, columns: list[str] | None = None) -> Iterator[tuple[list[str], object]]:
    """Windows of checked texts; of `.parquet` also the record batch of `columns` that they stand in."""
    if source.suffix != ".parquet":
        yield from ((window, None) for window in _cut(_lines(source, text_field)))
        return
    first = 0
    _, pq = _pyarrow()
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(WINDOW_TEXTS, columns=columns or [text_field]):
            start = 0
            for window in _cut(_cells(batch.column(text_field), source, text_field, first)):
                yield window, batch.slice(start, len(window))
                start += len(window)
            first += batch.num_rows


def _cut(texts: Iterable[str]) -> Iterator[list[str]]:
    window, characters = [], 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _cells(column, source: Path, text_field: str, first: int) -> Iterator[str]:
    for row, cell in enumerate(column, first):
        name = f'{source}, row {row} (from 0), column "{text_field}"'
        try:
            text = cell.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not valid UTF-8 ({error}).") from None
        check_texts([text], what=name)
        yield text


def _lines(source: Path, text_field: str) -> Iterator[str]:
    is_json = source.name.endswith((".jsonl", ".jsonl.gz"))
    with gzip.open(source) if source.suffix == ".gz" else open(source, "rb") as file:
        try:
            # Lines end in "\n" alone: a text may hold the other characters that `str.splitlines` cuts at.
            for number, line in enumerate(file, 1):
                name = f"{source}, line {number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{name} is not valid UTF-8 ({error.reason} at byte {error.start}).") from None
                yield _json_text(text, text_field, name) if is_json else text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{source} is damaged: {error}") from error


def _json_text(line: str, text_field: str, name: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise TypeError(f"{name} is a {type(record).__name__}, not an object with fields.")
    if text_field not in record:
        fields = ", ".join(map(repr, record))
        raise ValueError(f'{name} has no field "{text_field}" (it has {fields or "none"}): name it by text_field.')
    check_texts([record[text_field]], what=f'{name}, field "{text_field}"')
    return record[text_field]


def _check_files(source: Path, output: Path, text_field: str):
    for path, formats in ((source, INPUT_FORMATS), (output, OUTPUT_FORMATS)):
        if not path.name.endswith(formats):
            raise ValueError(f"{path} does not end in one of {', '.join(formats)}.")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist.")
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another output, or remove it first.")
    if source.suffix == ".parquet":
        _, pq = _pyarrow()
        names = pq.read_schema(source).names
        if text_field not in names:
            raise ValueError(
                f'{source} has no column "{text_field}" (it has {", ".join(map(repr, names))}): name it by text_field.'
            )


def _fingerprint(model, source: Path, output: Path, text_field: str, options: dict, probe: np.ndarray) -> dict:
    """What a resumed run must have in common with the run it continues."""
    return {
        "source": _stat(source),
        "output": output.name,
        "text_field": text_field,
        "model": model.name_or_path,
        "dtype": str(model.dtype),
        "options": options,
        # Stands for the weights, the config and the tokenizer, whatever their source; see `_open_state`.
        "probe": [round(float(value), 6) for value in probe[:64] / np.linalg.norm(probe[:64])],
    }


def _open_state(folder: Path, fingerprint: dict) -> dict:
    names = {path.name for path in folder.glob("*")}
    # Without it the first window was not finished; alone, the result has taken its name.
    if "state.json" not in names or len(names) == 1:
        return {"fingerprint": fingerprint, "rows": 0, "total": None}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    then = state["fingerprint"]
    differences = [
        f"{name}: {then[name]} / {now}" for name, now in fingerprint.items() if name != "probe" and then[name] != now
    ]
    # Not to the last digit: the run may continue on another kind of machine.
    tolerance = 1e-3 if fingerprint["dtype"] == "torch.float32" else 3e-2
    if not differences and np.linalg.norm(np.subtract(then["probe"], fingerprint["probe"])) > tolerance:
        differences = ["the model gives another vector for the same sentence"]
    if differences:
        raise ValueError(
            f"{folder} holds {state['rows']:,} of {state['total']:,} rows of another run (then / now: "
            f"{'; '.join(differences)}). Repeat the call of then to continue it, or delete {folder} to start again."
        )
    return state


def _stat(path: Path) -> list:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


@contextmanager
def _replacing(path: Path):
    """A file that takes its name only when it is whole and on the disk."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        yield file
        _flush(file)
    os.replace(partial, path)


def _flush(file):
    file.flush()
    os.fsync(file.fileno())


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "lusifer-hf[scale]"') from error
    return pyarrow, pyarrow.parquet
