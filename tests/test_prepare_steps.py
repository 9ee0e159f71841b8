"""
The contract of every step of data preparation:

- the output is whole or not there, in the input's format, and training reads it as it is;
- its manifest holds, for every step since the raw files, their hashes, the parameters, and why rows went;
- a run that is interrupted goes on without doing finished shards again, to the same bytes;
- the number of processes changes no byte;
- bad input is an error that names the file and the place, and leaves nothing at the output.
"""

import gzip
import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
from conftest import read_json_lines, write_json_lines
from datasets import Dataset

from lusifer_hf import __version__
from lusifer_hf.cli import main
from lusifer_hf.data.mixture import DataSource, load_mixture
from lusifer_hf.data.prepare import cleaning, steps
from lusifer_hf.data.prepare.cleaning import clean
from lusifer_hf.data.prepare.deduplication import deduplicate


pytestmark = pytest.mark.usefixtures("own_cache")

ROWS = [
    {"id": f"q{i}", "query": f"Frage {i}", "positive": [f"ответ {i}"], "negative": [f"falsch {i}", f"अलग {i}"]}
    for i in range(20)
]
TOO_SHORT = {"id": "short", "query": "?", "positive": ["No letter."]}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(steps, "SHARD_ROWS", 6)


def files(folder: Path) -> dict[str, bytes]:
    """What a step wrote but for its manifest, which holds the time it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != steps.MANIFEST}


def manifest(folder: Path) -> list[dict]:
    return json.loads((folder / steps.MANIFEST).read_text())


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".parquet", "saved"])
def test_rows_survive_in_every_format(tmp_path, form):
    path = tmp_path / f"x{form}"
    if form.startswith(".json"):
        write_json_lines(path, ROWS)
    else:
        dataset = Dataset.from_list(ROWS)
        dataset.to_parquet(path) if form == ".parquet" else dataset.save_to_disk(path)
    clean([path], tmp_path / "out")
    (written,) = files(tmp_path / "out")
    assert written == ("xsaved.jsonl.gz" if form == "saved" else path.name)
    written = tmp_path / "out" / written
    rows = Dataset.from_parquet(str(written)).to_list() if form == ".parquet" else read_json_lines(written)
    assert rows == ROWS
    mixture = load_mixture([DataSource(str(written))], "representation")
    assert [mixture[0, i]["negative"] for i in range(len(mixture))] == [row["negative"] for row in ROWS]


def test_manifest_follows_the_data(tmp_path):
    raw = [write_json_lines(tmp_path / f"{name}.jsonl", [*ROWS, TOO_SHORT]) for name in ("a", "b")]
    clean(raw, tmp_path / "clean", min_characters=2)
    deduplicate(sorted((tmp_path / "clean").glob("*.jsonl")), tmp_path / "unique", threshold=None)
    first, second = manifest(tmp_path / "unique")
    assert [first] == manifest(tmp_path / "clean")
    assert first["step"] == "clean" and second["step"] == "dedup"
    assert first["inputs"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in raw}
    assert first["parameters"]["min_characters"] == 2 and second["parameters"]["threshold"] is None
    counts = {"rows_in": 21, "rows_out": 20, "dropped": {"too short query": 1}}
    assert first["data"] == {"a": counts, "b": counts}
    assert second["data"]["a"] == {"rows_in": 20, "rows_out": 20, "dropped": {}}
    assert second["data"]["b"] == {"rows_in": 20, "rows_out": 0, "dropped": {"duplicate": 20}}
    assert first["version"] == __version__ and 0 <= first["seconds"] < 60


class Killed(BaseException):
    """Nothing catches it."""


def test_interrupted_run_goes_on(tmp_path, small_shards, monkeypatch, caplog):
    path = write_json_lines(tmp_path / "x.jsonl", [*ROWS, TOO_SHORT])
    clean([path], tmp_path / "expected")
    work, shards = cleaning._clean, []

    def counted(columns, **parameters):
        shards.append(columns["id"][0])
        if len(shards) == 3:
            raise Killed
        return work(columns, **parameters)

    monkeypatch.setattr(cleaning, "_clean", counted)
    with pytest.raises(Killed):
        clean([path], tmp_path / "out")
    assert shards == ["q0", "q6", "q12"] and not (tmp_path / "out").exists()
    # A kill can leave half of a shard beside it.
    (tmp_path / ".out.partial" / "shards" / "x" / "000000000012.tmp").write_bytes(b"half")
    with caplog.at_level(logging.INFO, "lusifer_hf"):
        clean([path], tmp_path / "out")
    assert shards[3:] == ["q12", "q18"] and "Continuing" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "expected", "out", "cache"}


@pytest.mark.parametrize("change", ["parameters", "input"])
def test_another_run_takes_no_shards(tmp_path, small_shards, monkeypatch, caplog, change):
    path = write_json_lines(tmp_path / "x.jsonl", ROWS)

    def fail(dataset, path):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(steps, "write_rows", fail)
        clean([path], tmp_path / "out")
    if change == "input":
        write_json_lines(path, ROWS[:7])
    clean([path], tmp_path / "out", min_query_words=3 if change == "parameters" else 1)
    assert "Removing" in caplog.text
    entry = manifest(tmp_path / "out")[-1]["data"]["x"]
    assert (entry["rows_in"], entry["rows_out"]) == ((20, 0) if change == "parameters" else (7, 7))


def test_processes_change_nothing(tmp_path, small_shards):
    paths = [write_json_lines(tmp_path / f"{name}.jsonl.gz", ROWS) for name in ("a", "b")]
    for processes in (1, 2):
        clean(paths, tmp_path / f"clean{processes}", num_processes=processes)
    assert files(tmp_path / "clean1") == files(tmp_path / "clean2")
    assert set(files(tmp_path / "clean1")) == {"a.jsonl.gz", "b.jsonl.gz"}


BAD_LINES = {
    "not JSON": ('{"query": "a", ', r"x\.jsonl, line 3 is not valid JSON"),
    "no object": ('["query"]', r"x\.jsonl, line 3 is a list"),
    "no query": ('{"question": "a", "positive": ["b"]}', r"x\.jsonl, line 3 has no field \"query\""),
    "other type": ('{"query": "a", "positive": [7]}', r"x\.jsonl, line 3, field \"positive\""),
    "cluster": ('{"query": "a", "positive": ["b"], "cluster": "7"}', r"x\.jsonl, line 3, field \"cluster\""),
    "repeated id": ('{"id": "q1", "query": "a", "positive": ["b"]}', r"x\.jsonl has the id 'q1' 2 times"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(tmp_path, line, message):
    path = write_json_lines(tmp_path / "x.jsonl", ROWS[:2])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises((TypeError, ValueError), match=message):
        clean([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_without_ids_are_no_duplicates(tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", [{"query": f"text {i}", "positive": "text"} for i in range(3)])
    clean([path], tmp_path / "out")
    assert len(read_json_lines(tmp_path / "out" / "x.jsonl")) == 3


def test_bad_files(tmp_path, monkeypatch):
    path = write_json_lines(tmp_path / "x.jsonl", ROWS)
    other = write_json_lines(tmp_path / "other" / "x.parquet.jsonl", ROWS).rename(tmp_path / "other" / "x.jsonl")
    empty, text, damaged = (tmp_path / name for name in ("empty.jsonl", "x.doc", "damaged.jsonl.gz"))
    empty.touch()
    text.write_text("text")
    damaged.write_bytes(gzip.compress(path.read_bytes())[:-20])
    for inputs, error, message in [
        ([tmp_path / "absent.jsonl"], FileNotFoundError, "absent.jsonl does not exist"),
        ([empty], ValueError, "empty.jsonl holds no rows"),
        ([text], ValueError, "x.doc does not end in one of"),
        ([damaged], ValueError, "damaged.jsonl.gz cannot be loaded"),
        ([path, other], ValueError, "Two inputs have the name 'x'"),
    ]:
        with pytest.raises(error, match=message):
            clean(inputs, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    with pytest.raises(ValueError, match="num_processes=0"):
        clean([path], tmp_path / "out", num_processes=0)
    with pytest.raises(FileExistsError, match=r"other exists already"):
        clean([path], other.parent)
    with pytest.raises(NotADirectoryError, match=r"x\.jsonl is no folder"):
        clean([path], path / "out")
    monkeypatch.setattr(os, "access", lambda *args: False)  # the tests may run as root
    with pytest.raises(PermissionError, match="cannot be written"):
        clean([path], tmp_path / "out")


# The command line


def test_pipeline(tmp_path, capsys):
    raw = [{"text": f"where does animal {i} sleep", "label": f"sleep_{i % 2}", "split": "train"} for i in range(12)]
    raw += [{**raw[0], "split": "test"}, raw[1], {**raw[2], "text": " "}, {**raw[0], "text": "Wo schläft Tier 3?"}]
    write_json_lines(tmp_path / "x.jsonl.gz", raw)
    (tmp_path / "eval.txt").write_text("Where does animal 7 sleep?\n")
    for options in (
        f"import {tmp_path}/x.jsonl.gz --kind label-names --where split=train --columns text=text,label=label",
        f"clean {tmp_path}/import/x.jsonl.gz --min-query-words 5",
        f"dedup {tmp_path}/clean/x.jsonl.gz --exact",
        f"decontaminate {tmp_path}/dedup/x.jsonl.gz --against {tmp_path}/eval.txt",
    ):
        name, *rest = options.split()
        assert main(["prepare", name, *rest, "--output", str(tmp_path / name)]) == 0, capsys.readouterr().err
    entries = manifest(tmp_path / "decontaminate")
    assert [entry["step"] for entry in entries] == ["import", "clean", "dedup", "decontaminate"]
    assert [entry["data"]["x"]["rows_out"] for entry in entries] == [15, 13, 12, 11]
    assert [entry["data"]["x"]["dropped"] for entry in entries[1:]] == [
        {"empty query": 1, "too short query": 1},
        {"duplicate": 1},
        {"query in evaluation data": 1},
    ]
    # An option that is not given has the default of the function.
    assert entries[0]["parameters"]["negatives"] == 7 and entries[3]["parameters"]["threshold"] == 0.8
    rows = read_json_lines(tmp_path / "decontaminate" / "x.jsonl.gz")
    assert rows[1] == {"query": "where does animal 1 sleep", "positive": ["sleep 1"], "negative": ["sleep 0"]}


def test_command_line_errors(tmp_path, capsys):
    path = str(write_json_lines(tmp_path / "x.jsonl", ROWS))
    assert main(["prepare", "clean", path, "--output", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} exists already: choose another output folder, or remove it first.\n"
    )
    for options in (
        ["tidy"],
        ["clean", path],
        ["import", path, "--kind", "pairs", "--where", "split", "--output", "y"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["prepare", *options])
