"""
A mixture gives every row of every data set as it stands in its file, or says before training which field of which row
is wrong. A stream gives the same rows, the same for any number of processes.
"""

import gzip
import json
from itertools import islice
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import write_json_lines
from datasets import Dataset, DatasetDict
from golden import golden_case, needs_golden, read_json
from torch.utils.data import DataLoader

from lusifer_hf.data import mixture as mixture_module
from lusifer_hf.data.mixture import DataSource, MixtureStream, check_sources, load_mixture


pytestmark = pytest.mark.usefixtures("own_cache")

ROWS = [
    {"query": f"Frage {i}", "positive": [f"Antwort {i}", f"другой {i}"], "negative": [f"falsch {i}"] * (i % 3)}
    for i in range(20)
]


def write(path, rows) -> str:
    return str(write_json_lines(path, rows))


def read_all(mixture, *fields) -> list[tuple]:
    return [tuple(mixture[0, index][field] for field in fields) for index in range(len(mixture))]


def expected(rows=ROWS):
    return [(index, row["query"], row["positive"], row["negative"]) for index, row in enumerate(rows)]


def save(form: str, folder) -> str:
    if form.startswith(".json"):
        # `datasets` cannot open a .gz in brackets.
        return write(folder / f"own data{'' if form.endswith('.gz') else ' [1]'}{form}", ROWS)
    dataset = Dataset.from_list(ROWS)
    if form == ".parquet":
        dataset.to_parquet(folder / "own data [1].parquet")
        return str(folder / "own data [1].parquet")
    if form == "saved":
        dataset.save_to_disk(folder / form)
    elif form == "saved splits":
        DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(folder / form)
    elif form == "folder":
        (folder / form).mkdir()
        write(folder / form / "train.jsonl", ROWS)
    return str(folder / form)


@pytest.mark.parametrize(
    "form", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", "saved", "saved splits", "folder"]
)
def test_reads_every_form(tmp_path, form):
    path = save(form, tmp_path)
    mixture = load_mixture([DataSource(path)], "representation")
    assert mixture.sizes == [20] and len(mixture) == 20 and mixture.clusters(0) is None
    assert read_all(mixture, "row", "query", "positive", "negative") == expected()
    assert mixture[7, 3] == {"dataset": 0, "epoch": 7, "row": 3, **ROWS[3], "cluster": None}
    stream = MixtureStream([DataSource(path, task="query_to_passage")], batch_size=1, buffer_size=1)
    items = list(islice(stream, 20))
    assert [(item["row"], item["query"], item["positive"]) for item in items] == [row[:3] for row in expected()]
    assert items[3] == {
        "dataset": 0,
        "epoch": 0,
        "row": 3,
        **{k: ROWS[3][k] for k in ("query", "positive")},
        "answer": None,
    }


@needs_golden
def test_reads_research_data(tmp_path):
    rows = read_json(golden_case("data_datasets") / "expected.json")["local"]["Hieuman/MSMarco"]
    Dataset.from_list(rows).to_parquet(tmp_path / "msmarco.parquet")
    paths = [write(tmp_path / "msmarco.jsonl", rows), str(tmp_path / "msmarco.parquet")]
    mixture = load_mixture([DataSource(path, name=path) for path in paths], "representation")
    for dataset in range(2):
        np.testing.assert_array_equal(mixture.clusters(dataset), [row["cluster"] for row in rows])
    assert mixture[0, 31] == {"dataset": 1, "epoch": 0, "row": 1, **rows[1]}


def test_byte_order_mark(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n")
    mixture = load_mixture([DataSource(str(tmp_path / "x.jsonl"))], "representation")
    assert read_all(mixture, "row", "query", "positive", "negative") == expected(ROWS[:1])


def test_one_numbering(tmp_path):
    sources = [DataSource(write(tmp_path / f"{size}.jsonl", ROWS[:size])) for size in (3, 1, 20)]
    mixture = load_mixture(sources, "representation")
    assert [source.name for source in mixture.sources] == ["3", "1", "20"] and mixture.sizes == [3, 1, 20]
    numbers = read_all(mixture, "dataset", "row")
    assert numbers == [(dataset, row) for dataset, size in enumerate((3, 1, 20)) for row in range(size)]


def test_fields(tmp_path):
    rows = [
        {"text": "a", "positive": "b", "negative": "c", "label": 5, "group": 3},  # strings in place of lists
        {"text": "d", "positive": ["e"], "negative": None, "extra": {"x": []}},
        {"text": "f\u2028g", "positive": ["h"]},  # this character ends no line
    ]
    source = DataSource(write(tmp_path / "x.jsonl", rows), columns={"query": "text", "cluster": "group"})
    mixture = load_mixture([source], "representation")
    assert read_all(mixture, "query", "positive", "negative", "cluster") == [
        ("a", ["b"], ["c"], 3),
        ("d", ["e"], [], None),
        ("f\u2028g", ["h"], [], None),
    ]
    assert mixture.clusters(0).tolist() == [3, -1, -1]
    # Reconstruction needs a text alone, and a row with an answer no positive.
    source = DataSource(source.path, task="reconstruction", columns={"query": "text", "positive": "none"})
    assert load_mixture([source], "alignment")[0, 2]["query"] == "f\u2028g"
    path = write(tmp_path / "y.jsonl", [{"query": "a", "answer": "b"}, {"query": "c", "positive": ["d"]}])
    mixture = load_mixture([DataSource(path, task="passage_to_query")], "alignment")
    assert read_all(mixture, "query", "positive", "answer") == [("a", [], "b"), ("c", ["d"], None)]


def test_max_samples(tmp_path):
    path = write(tmp_path / "x.jsonl", ROWS)

    def sample(seed, number=8, **fields):
        return load_mixture([DataSource(path, max_samples=number, **fields)], "representation", seed)

    mixture = sample(seed=1)
    assert mixture.sizes == [8]
    rows = [row for (row,) in read_all(mixture, "row")]
    assert len(set(rows)) == 8
    assert read_all(mixture, "row", "query", "positive", "negative") == [expected()[row] for row in rows]
    assert read_all(sample(seed=1), "row") == read_all(mixture, "row") != read_all(sample(seed=2), "row")
    assert sample(seed=1, number=500).sizes == [20]


def test_second_run_reads_the_cache_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", ROWS)
    load_mixture([DataSource(path)], "representation")
    reads = []
    read = mixture_module.RowReader.read
    monkeypatch.setattr(mixture_module.RowReader, "read", lambda *args: reads.append(args) or read(*args))
    # What does not concern the rows is no reason to read them again.
    assert load_mixture([DataSource(path, weight=2.0, name="y", instruction="z")], "representation").sizes == [20]
    assert not reads
    write(tmp_path / "x.jsonl", ROWS[:5])
    assert load_mixture([DataSource(path)], "representation").sizes == [5] and len(reads) == 5


GOOD = {"query": "q", "positive": ["p"], "negative": ["n"]}
BAD_ROWS = [
    ({"query": 3}, TypeError, 'field "query" is 3 of type int'),
    ({"query": None}, ValueError, 'field "query" is None: every row needs a text'),
    ({"query": " \n"}, ValueError, r'field "query" is \' \\n\': every row needs a text'),
    ({"query": "a\ud800b"}, ValueError, r'field "query" holds a lone surrogate, U\+D800 at character 1'),
    ({"positive": []}, ValueError, r'field "positive" is \[\]: every row needs a text'),
    ({"positive": None}, ValueError, r'field "positive" is \[\]: every row needs a text'),
    ({"positive": ["a", ""]}, ValueError, r'field "positive" is \[\'a\', \'\'\]: every row needs a text'),
    ({"positive": ["a", 3]}, TypeError, 'field "positive" is 3 of type int'),
    ({"positive": {"a": "b"}}, TypeError, 'field "positive" is {.*}, not a list of strings'),
    ({"negative": []}, ValueError, r'field "negative" is \[\]: .* \(in_batch_negatives is false\)'),
    ({"negative": ["a", None]}, TypeError, 'field "negative" is None of type NoneType'),
    ({"negative": ["\udfff"]}, ValueError, r'field "negative" holds a lone surrogate, U\+DFFF'),
    ({"cluster": "a"}, TypeError, "field \"cluster\" is 'a', not an integer"),
    ({"cluster": True}, TypeError, 'field "cluster" is True, not an integer'),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_ROWS)
def test_bad_row(tmp_path, fields, error, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[GOOD] * 1500, GOOD | fields, GOOD]))
    with pytest.raises(error, match=f"bad.jsonl, line 1501, {message}"):
        load_mixture([DataSource(str(path), in_batch_negatives=False)], "representation")
    if "cluster" not in fields and "negative" not in fields:  # which alignment does not read
        with pytest.raises(error, match=f"bad.jsonl, line 1501, {message}"):
            list(islice(MixtureStream([DataSource(str(path), task="query_to_passage")], batch_size=1), 2000))


def test_bad_row_of_typed_data(tmp_path):
    Dataset.from_list([*ROWS[:5], ROWS[0] | {"positive": [""]}, ROWS[5]]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r'x.parquet, row 5 \(from 0\), field "positive" is'):
        load_mixture([DataSource(str(tmp_path / "x.parquet"))], "representation")
    Dataset.from_dict({"query": [1, 2], "positive": [["a"], ["b"]]}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(TypeError, match=r'y.parquet, row 0 \(from 0\), field "query" is 1 of type int'):
        load_mixture([DataSource(str(tmp_path / "y.parquet"))], "representation")


def test_bad_row_outside_of_the_sample_keeps_its_number(tmp_path):
    path = write(tmp_path / "x.jsonl", [*ROWS[:9], {"query": "a"}, *ROWS[9:]])
    with pytest.raises(ValueError, match='line 10 has no field "positive"'):
        for seed in range(50):
            load_mixture([DataSource(path, max_samples=10)], "representation", seed)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"query": ', ValueError, "is not valid JSON: Expecting value"),
        ("", ValueError, "is not valid JSON"),
        ("[1, 2]", TypeError, "is a list, not an object. Each line must hold one object"),
        (
            '{"label": 1, "text": "a"}',
            ValueError,
            r"has no field \"query\" \(it has 'label', 'text'\).*columns: {query:",
        ),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_bad_line(tmp_path, name, line, error, message):
    good = json.dumps(GOOD)
    data = f"{good}\n{good}\n{line}\n{good}\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(error, match=f"{name}, line 3 {message}"):
        load_mixture([DataSource(str(tmp_path / name))], "representation")


def test_bad_line_in_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(f'{json.dumps(GOOD)}\n{{"query": \n')
    with pytest.raises(ValueError, match=r"data/train.jsonl, line 2 is not valid JSON"):
        load_mixture([DataSource(str(tmp_path / "data"))], "representation")


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def fails(error, message, name, content=None, **fields):
        if content is not None:
            (tmp_path / name).write_bytes(content)
            name = str(tmp_path / name)
        with pytest.raises(error, match=message):
            load_mixture([DataSource(name, **fields)], "representation")

    row = json.dumps(GOOD).encode()
    fails(FileNotFoundError, "/nowhere/x.jsonl does not exist", "/nowhere/x.jsonl")
    fails(FileNotFoundError, "nowhere.parquet does not exist", "nowhere.parquet")
    fails(FileNotFoundError, "a/folder/here does not exist", "a/folder/here")
    fails(ValueError, "someone/something cannot be loaded: .*is it the right id on the Hub", "someone/something")
    fails(ValueError, "notes.txt does not end in one of .jsonl", "notes.txt", b"a")
    fails(ValueError, "empty.jsonl holds no rows", "empty.jsonl", b"")
    fails(
        ValueError, "latin.jsonl cannot be loaded: 'utf-8' codec can't decode", "latin.jsonl", b'{"query": "\xe4"}\n'
    )
    fails(ValueError, "cut.jsonl.gz cannot be loaded: Compressed file ended", "cut.jsonl.gz", gzip.compress(row)[:-5])
    fails(ValueError, "x.parquet cannot be loaded", "x.parquet", b"hello")
    fails(ValueError, "x.jsonl is a file, which has no subset", "x.jsonl", row, subset="en")
    (tmp_path / "folder").mkdir()
    fails(ValueError, "folder cannot be loaded: The directory .* doesn't contain", str(tmp_path / "folder"))
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    fails(ValueError, r"Unknown split \"test\". Should be one of \['train'\]", str(tmp_path / "folder"), split="test")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    fails(ValueError, "it has no split 'test', only 'train'", str(tmp_path / "saved"), split="test")


def test_hub_arguments(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(mixture_module, "load_dataset", load_dataset)
    source = DataSource("someone/something", subset="en", split="validation", revision="v2")
    assert source.name == "something-en"
    assert load_mixture([source], "representation").sizes == [20]
    options = {"split": "validation", "revision": "v2", "streaming": False}
    assert calls == [(("someone/something", "en"), options)]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"path": 3}, TypeError, "path=3 of the data set 3 is not a string"),
        ({"instruction": None}, TypeError, "instruction=None of the data set 'x.jsonl' is not a string"),
        ({"task": "reconstruct"}, ValueError, "task='reconstruct' of x is not one of 'reconstruction', 'passage"),
        ({"weight": 0}, ValueError, "weight=0 of x is not a positive number"),
        ({"weight": "2"}, ValueError, "weight='2' of x is not a positive number"),
        ({"weight": float("nan")}, ValueError, "weight=nan of x is not a positive number"),
        ({"max_samples": 0}, ValueError, "max_samples=0 of x is not a number of rows"),
        ({"in_batch_negatives": "no"}, TypeError, "in_batch_negatives='no' of x is not true or false"),
        (
            {"columns": {"text": "query"}},
            ValueError,
            "columns of x names the field 'text', which is not one",
        ),
        ({"columns": {"query": 1}}, TypeError, "columns of x maps 'query' to 1"),
    ],
)
def test_bad_source(fields, error, message):
    with pytest.raises(error, match=message):
        DataSource(**{"path": "x.jsonl", **fields})


def test_check_sources():
    one, task = DataSource("data/one.jsonl.gz"), DataSource("one.parquet", task="reconstruction")
    assert one.name == task.name == "one"
    with pytest.raises(ValueError, match="list at least one data set under `data:`"):
        check_sources([], "alignment")
    with pytest.raises(ValueError, match="Two data sets have the name 'one'"):
        check_sources([one, DataSource("one.json")], "representation")
    with pytest.raises(ValueError, match="one has no task, which alignment needs: choose one of 'reconstruction'"):
        check_sources([one], "alignment")
    with pytest.raises(ValueError, match="one has a task, which only alignment has"):
        check_sources([task], "representation")
    check_sources([one], "representation")
    check_sources([task], "alignment")


@pytest.fixture
def streamed(tmp_path):
    return [
        DataSource(write(tmp_path / "large.jsonl", ROWS * 10), task="query_to_passage", weight=3.0),
        DataSource(write(tmp_path / "small.jsonl", ROWS[:7]), task="reconstruction", max_samples=6),
    ]


def keys(items) -> list[tuple[int, int]]:
    return [(item["dataset"], item["row"]) for item in items]


def stream_of(sources, **options) -> MixtureStream:
    return MixtureStream(sources, **{"batch_size": 1, "seed": 5, "buffer_size": 20, **options})


def read_stream(sources, count=300, **options) -> list[tuple[int, int]]:
    return keys(islice(stream_of(sources, **options), count))


def test_stream_is_the_same_for_any_number_of_processes(streamed):
    alone = read_stream(streamed, batch_size=6)
    options = {"batch_size": 2, "num_processes": 3, "count": 100}
    together = [read_stream(streamed, process_index=i, **options) for i in range(3)]
    merged = np.concatenate([np.reshape(own, (-1, 2, 2)) for own in together], axis=1).reshape(-1, 2)
    np.testing.assert_array_equal(merged, alone)


def test_stream_order(streamed):
    first = read_stream(streamed, 400)
    assert first == read_stream(streamed, 400) != read_stream(streamed, 400, seed=6)
    assert sorted(first) != first
    large, small = ([row for dataset, row in first if dataset == i] for i in range(2))
    assert 280 < len(large) < 320  # three to one
    # Both begin again, the small one many times.
    assert set(large) == set(range(200)) and set(small) == set(range(6))
    # Rows stay near their place: the buffer holds 20.
    assert max(large[:40]) < 90
    # Another time, other masks: an epoch is a pass through the data set.
    items = list(islice(stream_of(streamed), 400))
    assert {item["epoch"] for item in items if item["dataset"] == 0} == {0, 1}
    assert {item["epoch"] for item in items if item["dataset"] == 1} >= set(range(8))


def test_stream_in_a_loader(streamed, monkeypatch):
    stream = stream_of(streamed, batch_size=4)
    alone = list(islice(stream, 40))
    batches = list(islice(DataLoader(stream, batch_size=4, collate_fn=list, num_workers=1), 10))
    assert [item for batch in batches for item in batch] == alone
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="dataloader_num_workers=2 with streamed data"):
        next(iter(stream))


def test_stream_finds_errors_when_made(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r'x.jsonl, line 1 has no field "query"'):
        MixtureStream([DataSource(path, task="reconstruction")], batch_size=1)
    with pytest.raises(ValueError, match=r"y.jsonl holds no rows"):
        MixtureStream([DataSource(write(tmp_path / "y.jsonl", []), task="reconstruction")], batch_size=1)


def test_workers_read_a_mixture(tmp_path):
    mixture = load_mixture([DataSource(write(tmp_path / "x.jsonl", ROWS))], "representation")
    order = [[(0, 3), (0, 9)], [(0, 1), (0, 19)]]
    batches = list(DataLoader(mixture, batch_sampler=order, collate_fn=list, num_workers=2))
    assert batches == [[mixture[key] for key in batch] for batch in order]
    assert isinstance(mixture, torch.utils.data.Dataset)


def test_real_files(shared_folder):
    names = {"squad_sent": 11827, "banking77": 9939, "snli": 6625}
    sources = [
        DataSource(str(shared_folder / "data" / "train" / f"{name}.jsonl.gz"), in_batch_negatives=name != "banking77")
        for name in names
    ]
    mixture = load_mixture(sources, "representation")
    assert mixture.sizes == list(names.values())
    for source, start in zip(sources, (0, 11827, 11827 + 9939), strict=True):
        with gzip.open(source.path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(50), strict=False)]
        for index, row in enumerate(rows):
            item = mixture[0, start + index]
            assert {field: item[field] for field in row} == row
