"""
The contract of `encode_file`:

- every input format in every output format gives what `model.encode` gives for the list of texts, in its order;
- a run that is killed at any moment continues, and its file is the same, byte for byte, as an uninterrupted run's;
- memory does not grow with the number of rows;
- bad input, a result that exists, and a partial result of another run are errors before anything is embedded, which
  name the file, the line and the field.
"""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assert_distinct, assert_same

from lusifer_hf import LusiferModel, corpus
from lusifer_hf.corpus import encode_file
from lusifer_hf.quickstart import SENTENCES


INPUTS = ("txt", "txt.gz", "jsonl", "jsonl.gz", "parquet")
OUTPUTS = ("npy", "parquet")


@pytest.fixture(scope="module")
def model(tiny_repository):
    return LusiferModel.from_pretrained(tiny_repository)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW_TEXTS", 7)


def write_texts(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, 5)
        return path
    lines = [json.dumps({"id": 1, "text": text}) if ".jsonl" in path.name else text for text in texts]
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def many_texts(count: int) -> list[str]:
    """Texts that differ in words which the tiny tokenizer knows, so that no two have the same embedding."""
    words = sorted({word for sentences in SENTENCES.values() for sentence in sentences for word in sentence.split()})
    return [f"{words[number % len(words)]} {words[number // len(words)]}" for number in range(count)]


def read_embeddings(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    column = pq.read_table(path)["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), column.type.list_size)


def interrupt(model, monkeypatch, source: Path, output: Path, windows: int, **options):
    """Embed so many windows, then stop as Ctrl-C does."""
    encode, calls = model.encode, []

    def encode_some(texts, **kwargs):
        calls.append(texts)
        if len(calls) > windows + 1:  # the first is the probe
            raise KeyboardInterrupt
        return encode(texts, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "encode", encode_some)
        encode_file(model, source, output, **options)


# Results


@pytest.mark.parametrize("target", OUTPUTS)
@pytest.mark.parametrize("source", INPUTS)
def test_file_gives_what_encode_gives(model, sentences, tmp_path, small_windows, source, target):
    output = tmp_path / f"out.{target}"
    options = {"instruction": "Find the same sentence:", "normalize": True, "truncate_dim": 48, "max_length": 24}
    assert encode_file(model, write_texts(tmp_path / f"in.{source}", sentences), output, **options) == output
    embeddings = read_embeddings(output)
    assert embeddings.dtype == np.float32
    assert_distinct(embeddings * 7)
    assert_same(embeddings, model.encode(sentences, **options), 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"in.{source}", f"out.{target}"])


def test_parquet_keeps_columns_and_streams_by_row_group(model, sentences, tmp_path, small_windows):
    source = tmp_path / "in.parquet"
    table = pa.table(
        {
            "id": range(len(sentences)),
            "tags": [[index, None] for index in range(len(sentences))],
            "language": pa.array(["en", "fr"] * 21).dictionary_encode(),
            "body": sentences,
        }
    )
    pq.write_table(table, source)
    output = encode_file(model, source, tmp_path / "out.parquet", text_field="body")
    result = pq.read_table(output)
    assert result.drop_columns(["embedding"]).equals(table)
    assert result.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert pq.ParquetFile(output).num_row_groups == 6


def test_text_lines_end_in_newline_alone(model, tmp_path):
    source = tmp_path / "in.txt"
    source.write_bytes("\ufefffirst\r\n\nline\u2028separator\x0band\x85more\nlast".encode())
    embeddings = np.load(encode_file(model, source, tmp_path / "out.npy"))
    assert_same(embeddings, model.encode(["first", "", "line\u2028separator\x0band\x85more", "last"]), 1e-6)


def test_windows_are_cut_by_characters_too(model, sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW_CHARACTERS", 100)
    windows = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **options: windows.append(texts) or encode(texts, **options))
    encode_file(model, write_texts(tmp_path / "in.jsonl", sentences), tmp_path / "out.npy")
    assert [text for window in windows[1:] for text in window] == sentences
    assert max(sum(map(len, window[:-1])) for window in windows[1:]) < 100


@pytest.mark.parametrize("target", OUTPUTS)
@pytest.mark.parametrize("source", INPUTS)
def test_empty_file(model, tmp_path, source, target):
    output = encode_file(model, write_texts(tmp_path / f"in.{source}", []), tmp_path / f"out.{target}")
    assert read_embeddings(output).shape == (0, 64)


# Resuming


def run_until(moment: int | None, folder: str, source: str, output: str):
    """Embed, and kill this process just before the n-th change to the disk that the module makes."""
    moments = iter(range(10_000))

    def counted(function):
        def call(*args, **kwargs):
            if next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    corpus.WINDOW_TEXTS = 100
    corpus.os = type("os", (), {name: counted(getattr(os, name)) for name in ("replace", "fsync")})
    corpus.shutil = type(
        "shutil", (), {"rmtree": counted(corpus.shutil.rmtree), "disk_usage": corpus.shutil.disk_usage}
    )
    encode_file(LusiferModel.from_pretrained(folder), source, output)


def kill_at_every_moment(folder: str, source: str, whole: str, output: str):
    """Runs in a process of its own that never computes anything, so that it can be forked."""

    def run(moment: int | None, target: str) -> int:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                run_until(moment, folder, source, target)
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    assert run(None, whole) == 0
    status, moment = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        status = run(moment, output)
        if moment % 3 == 0 and not os.path.exists(output):
            run(4, output)  # killed a second time, unless little was left to do
        if not os.path.exists(output):
            assert run(None, output) == 0
        assert Path(output).read_bytes() == Path(whole).read_bytes(), f"killed at moment {moment}"
        os.remove(output)
        moment += 1
    assert status == 0
    assert moment > 3 * 3


@pytest.mark.parametrize("target", OUTPUTS)
def test_killed_at_any_moment(model, tiny_repository, tmp_path, target):
    texts = many_texts(250)
    source, whole = write_texts(tmp_path / "in.jsonl", texts), tmp_path / f"whole.{target}"
    arguments = tuple(map(str, (tiny_repository, source, whole, tmp_path / f"out.{target}")))
    process = multiprocessing.get_context("spawn").Process(target=kill_at_every_moment, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same(read_embeddings(whole), model.encode(texts), 1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, whole.name}


def test_cli_killed_from_outside(model, tiny_repository, tmp_path):
    texts = many_texts(20_000)
    source, output = write_texts(tmp_path / "in.txt", texts), tmp_path / "out.npy"
    state = tmp_path / "out.npy.partial" / "state.json"

    def start() -> subprocess.Popen:
        command = ["encode", "--model", tiny_repository, "--output", output, source, "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, "-m", "lusifer_hf.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
        )

    process = start()
    while not state.exists() or json.loads(state.read_text())["rows"] < 6000:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not output.exists()
    done = json.loads(state.read_text())["rows"]
    assert 6000 <= done < 20_000
    process = start()
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert f"Continuing after {done:,} of 20,000 rows" in messages
    assert f"{done}/20000" in messages  # the bar begins where the run does
    assert_same(np.load(output), model.encode(texts), 1e-5)


@pytest.mark.parametrize("target", OUTPUTS)
def test_interrupted_run_embeds_the_rest_alone(model, sentences, tmp_path, monkeypatch, small_windows, target):
    source, output = write_texts(tmp_path / "in.parquet", sentences), tmp_path / f"out.{target}"
    interrupt(model, monkeypatch, source, output, windows=4, batch_size=8)
    encode, windows = model.encode, []
    monkeypatch.setattr(model, "encode", lambda texts, **options: windows.append(texts) or encode(texts, **options))
    encode_file(model, source, output, batch_size=2)  # the way out of "out of memory"
    assert windows[1:] == [sentences[28:35], sentences[35:]]
    assert_same(read_embeddings(output), encode(sentences), 1e-6)


def test_result_deleted_after_its_run_was_killed_while_cleaning_up(model, sentences, tmp_path, monkeypatch):
    source, output = write_texts(tmp_path / "in.txt", sentences), tmp_path / "out.npy"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        remove = corpus.shutil.rmtree

        def rmtree(folder, ignore_errors=False):
            if not ignore_errors:
                raise KeyboardInterrupt
            remove(folder, ignore_errors)

        patch.setattr(corpus.shutil, "rmtree", rmtree)
        encode_file(model, source, output)
    expected = output.read_bytes()
    output.unlink()
    encode_file(model, source, output)
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ("option", r"holds 14 of 42 rows of another run .*normalize': False.* / .*normalize': True"),
        ("source", r"another run \(then / now: source: \["),
        ("field", r"text_field: text / body"),
        ("weights", r"another vector for the same sentence"),
        ("dtype", r"dtype: torch.float32 / torch.bfloat16"),
    ],
)
def test_partial_result_of_another_run(
    model, tiny_repository, sentences, tmp_path, monkeypatch, small_windows, change, message
):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("".join(json.dumps({"text": text, "body": text}) + "\n" for text in sentences))
    interrupt(model, monkeypatch, source, output, windows=2)
    options = {}
    if change == "option":
        options["normalize"] = True
    elif change == "source":
        os.utime(source, (1, 1))
    elif change == "field":
        options["text_field"] = "body"
    else:
        model = LusiferModel.from_pretrained(tiny_repository, dtype="bfloat16" if change == "dtype" else "auto")
    if change == "weights":
        model.projection.linear_2.bias.data[3] += 0.5
    with pytest.raises(ValueError, match=message) as error:
        encode_file(model, source, output, **options)
    assert f"delete {output}.partial" in str(error.value)


def test_source_changed_while_it_is_embedded(model, sentences, tmp_path, monkeypatch, small_windows):
    source, output = write_texts(tmp_path / "in.txt", sentences), tmp_path / "out.npy"
    encode = model.encode

    def encode_and_append(texts, **options):
        if not isinstance(texts, str):
            with open(source, "a") as file:
                file.write("one more\n")
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode", encode_and_append)
    with pytest.raises(ValueError, match=r"was changed while"):
        encode_file(model, source, output)
    assert not output.exists()


# Memory

MEASURE = """
import sys

import numpy as np

from lusifer_hf import LusiferModel, corpus

model = LusiferModel.from_pretrained(sys.argv[1])
model.encode = lambda texts, **_: np.ones((len(texts), 1024) if isinstance(texts, list) else 1024, np.float32)
for rows in sys.argv[3:]:
    corpus.encode_file(model, f"{rows}.jsonl", f"{rows}.{sys.argv[2]}")
    # Not ru_maxrss, which begins with that of the process which started this one.
    print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("target", OUTPUTS)
def test_memory_does_not_grow_with_rows(tiny_repository, tmp_path, target):
    for rows in (6_000, 60_000):
        write_texts(tmp_path / f"{rows}.jsonl", many_texts(rows))
    command = [sys.executable, "-c", MEASURE, str(tiny_repository), target, "6000", "60000"]
    # One arena: what several threads keep free for later is not what the rows need.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    peaks = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env).stdout.split()
    growth = (int(peaks[1]) - int(peaks[0])) * 1024
    assert growth < 60_000 * 1024 * 4 / 4, f"{growth / 1e6:.0f} MB more for ten times the rows"


# Errors


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"\n', ValueError, r"in.jsonl, line 2 is not valid JSON: .*delimiter"),
        ("in.jsonl", b'{"text": "a"}\n\n', ValueError, r"in.jsonl, line 2 is not valid JSON"),
        ("in.jsonl", b'{"text": "a"}\n["b"]\n', TypeError, r"line 2 is a list, not an object"),
        ("in.jsonl", b'{"text": "a"}\n{"body": "b"}', ValueError, r"line 2 has no field \"text\" \(it has 'body'\)"),
        ("in.jsonl", b'{"text": null}', TypeError, r"line 1, field \"text\" is None of type NoneType, not a string"),
        ("in.jsonl", b'{"text": "a\\ud800"}', ValueError, r"line 1, field \"text\" holds a lone surrogate, U\+D800"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ValueError, r"line 2 is not valid UTF-8 .*at byte 10"),
        ("in.txt", b"good\nbad \xe9\n", ValueError, r"in.txt, line 2 is not valid UTF-8"),
        ("in.txt.gz", gzip.compress(b"text\n" * 9, mtime=0)[:-12], ValueError, r"in.txt.gz is damaged: "),
        ("in.txt.gz", b"no gzip", ValueError, r"in.txt.gz is damaged: "),
        ("in.parquet", b"no parquet", ValueError, r"[Pp]arquet"),
        ("in.csv", b"text\n", ValueError, r"in.csv does not end in one of .txt, .txt.gz"),
        ("in.txt", None, FileNotFoundError, r"in.txt does not exist"),
    ],
)
def test_bad_file(model, tmp_path, name, content, error, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(error, match=message):
        encode_file(model, source, tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()
    assert not (tmp_path / "out.npy.partial").exists()


@pytest.mark.parametrize(
    "table, options, error, message",
    [
        ({"text": ["a", None]}, {}, TypeError, r"in.parquet, row 1 \(from 0\), column \"text\" is None"),
        ({"text": [1, 2]}, {}, TypeError, r"row 0 \(from 0\), column \"text\" is 1 of type int"),
        ({"body": ["a"]}, {}, ValueError, r"has no column \"text\" \(it has 'body'\): name it by text_field"),
        ({"text": ["a"], "embedding": [1.0]}, {}, ValueError, r"has a column \"embedding\" already"),
        (
            {"text": pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())},
            {},
            ValueError,
            r"row 1 \(from 0\), column \"text\" is not valid UTF-8",
        ),
    ],
)
def test_bad_parquet(model, tmp_path, table, options, error, message):
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    with pytest.raises(error, match=message):
        encode_file(model, tmp_path / "in.parquet", tmp_path / "out.parquet", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_bad_last_row_fails_before_the_first_is_embedded(model, sentences, tmp_path, monkeypatch, small_windows):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*sentences, 7]))
    encode, calls = model.encode, []
    monkeypatch.setattr(model, "encode", lambda texts, **options: calls.append(texts) or encode(texts, **options))
    with pytest.raises(TypeError, match=r"line 43, field \"text\" is 7 of type int"):
        encode_file(model, source, tmp_path / "out.npy")
    assert calls == [corpus.PROBE]


@pytest.mark.parametrize(
    "output, options, error, message",
    [
        ("out.npy", {"prompt_name": "passage"}, ValueError, r"prompt_name='passage' is not one of"),
        ("out.npy", {"truncate_dim": 65}, ValueError, r"truncate_dim=65 is larger"),
        ("out.npy", {"batch_size": 0}, ValueError, r"batch_size=0 must be 1 or more"),
        ("out.csv", {}, ValueError, r"out.csv does not end in one of .npy, .parquet"),
        ("in.npy", {}, FileExistsError, r"in.npy exists already"),
    ],
)
def test_bad_arguments(model, tmp_path, output, options, error, message):
    source = write_texts(tmp_path / "in.txt", ["text"])
    (tmp_path / "in.npy").write_bytes(b"kept")
    with pytest.raises(error, match=message):
        encode_file(model, source, tmp_path / output, **options)
    assert (tmp_path / "in.npy").read_bytes() == b"kept"
    assert len(list(tmp_path.iterdir())) == 2


def test_full_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"take 512 bytes, and .* has 100 free"):
        encode_file(model, write_texts(tmp_path / "in.txt", ["a", "b"]), tmp_path / "out.npy")


@pytest.mark.parametrize("source, target", [("txt", "parquet"), ("parquet", "npy")])
def test_without_pyarrow(model, tmp_path, monkeypatch, source, target):
    source = write_texts(tmp_path / f"in.{source}", ["text"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install \"lusifer-hf\[scale\]\""):
        encode_file(model, source, tmp_path / f"out.{target}")
    encode_file(model, write_texts(tmp_path / "other.txt", ["text"]), tmp_path / "other.npy")
