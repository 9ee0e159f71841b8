"""
`import_data` turns every kind of raw data into rows of query, positive and negative: all of it, nothing else, the same
for the same seed, and with an error that names file, line and column where the raw data is wrong.
"""

import gzip
import json
from collections import Counter

import pytest
from conftest import read_json_lines, write_json_lines
from datasets import Dataset

from lusifer_hf.data.prepare import steps
from lusifer_hf.data.prepare.importing import import_data


pytestmark = pytest.mark.usefixtures("own_cache")

CORPUS = [
    {"_id": "d1", "title": "Bears", "text": "They sleep in dens."},
    {"_id": "d2", "title": "", "text": "Wale schlafen im Meer."},
    {"_id": "d3", "text": "Птицы спят на деревьях."},
]
QUERIES = [{"_id": f"q{number}", "text": f"where do they sleep, {number}"} for number in (1, 2, 3)]
QRELS = [("q1", "d1", 1), ("q3", "d2", 2), ("q1", "d3", 0), ("q3", "d1", 1), ("q2", "d3", 0)]
LABELLED = [{"text": f"text {number}", "label": f"label_{number % 3}", "split": "train"} for number in range(30)]


def write_beir(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, name="qrels/train.tsv"):
    write_json_lines(folder / "corpus.jsonl", corpus)
    write_json_lines(folder / "queries.jsonl", queries)
    (folder / name).parent.mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, judgement)) for judgement in qrels)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def write_cells(path, header, *rows):
    separator = "," if path.suffix == ".csv" else "\t"
    path.write_text("\n".join(separator.join(cells) for cells in [header, *rows]) + "\n", encoding="utf-8")
    return path


def run(path, kind, output, **parameters) -> tuple[list[dict], dict]:
    """The rows, and the counts of the manifest."""
    import_data([path], output, kind=kind, **parameters)
    (file,) = (file for file in output.iterdir() if file.name != steps.MANIFEST)
    (entry,) = json.loads((output / steps.MANIFEST).read_text())
    rows = Dataset.from_parquet(str(file)).to_list() if file.suffix == ".parquet" else read_json_lines(file)
    (counts,) = entry["data"].values()
    assert counts["rows_out"] == len(rows) == counts["rows_in"] - sum(counts["dropped"].values())
    return rows, counts


@pytest.mark.parametrize("name", ["qrels/train.tsv", "qrels.tsv"])
def test_beir(tmp_path, name):
    rows, counts = run(write_beir(tmp_path / "sleep", name=name), "beir", tmp_path / "out")
    assert rows == [
        {
            "id": "q1",
            "query": "where do they sleep, 1",
            "positive": ["Bears They sleep in dens."],
            "positive_id": ["d1"],
            "negative": ["Птицы спят на деревьях."],
            "negative_id": ["d3"],
        },
        {
            "id": "q3",
            "query": "where do they sleep, 3",
            "positive": ["Wale schlafen im Meer.", "Bears They sleep in dens."],
            "positive_id": ["d2", "d1"],
            "negative": [],
            "negative_id": [],
        },
    ]
    assert counts == {"rows_in": 3, "rows_out": 2, "dropped": {"no relevant document": 1}}


@pytest.mark.parametrize(
    "parts, error, message",
    [
        ({"qrels": [("q1", "d9", 1), ("q1", "d8", 1)]}, ValueError, "'d9', which is not in corpus.jsonl, and 1 more"),
        ({"qrels": [("q9", "d1", 1)]}, ValueError, "'q9', which is not in queries.jsonl"),
        ({"qrels": [("q1", "d1", 1), ("q2", "d1", "high")]}, ValueError, r"train.tsv, line 3"),
        ({"qrels": [("q1", "d1")]}, ValueError, r"train.tsv, line 2"),
        ({"qrels": [("q1", "d1", 0)]}, ValueError, "no document as relevant"),
        ({"qrels": []}, ValueError, "no document as relevant"),
        ({"corpus": [*CORPUS, CORPUS[0]]}, ValueError, r"corpus\.jsonl.* 'd1' 2 times"),
        ({"queries": [*QUERIES, QUERIES[2]]}, ValueError, r"queries\.jsonl.* 'q3' 2 times"),
        ({"corpus": [{"_id": "d1", "title": "Bears"}]}, ValueError, r"corpus\.jsonl, line 1 .*\"text\""),
        ({"corpus": [{"_id": "d1", "text": None}]}, TypeError, r"corpus\.jsonl, line 1"),
        ({"name": "qrels/dev.tsv"}, FileNotFoundError, r"no qrels/train\.tsv"),
    ],
)
def test_bad_beir(tmp_path, parts, error, message):
    folder = write_beir(tmp_path / "sleep", **parts)
    with pytest.raises(error, match=message):
        import_data([folder], tmp_path / "out", kind="beir")
    assert not (tmp_path / "out").exists()


def test_real_beir(tmp_path, shared_folder):
    """Every judgement arrives, with the texts of its ids, whatever the size of shards."""
    folder = shared_folder / "data" / "eval" / "retrieval" / "xquad_r" / "ru"
    rows, _ = run(folder, "beir", tmp_path / "out")
    documents = {document["_id"]: document for document in read_json_lines(folder / "corpus.jsonl")}
    queries = {query["_id"]: query["text"] for query in read_json_lines(folder / "queries.jsonl")}
    lines = (folder / "qrels.tsv").read_text().splitlines()[1:]
    assert {(row["id"], text_id) for row in rows for text_id in row["positive_id"]} == {
        tuple(line.split("\t")[:2]) for line in lines
    }
    assert all(row["query"] == queries[row["id"]] for row in rows)
    for row in rows:
        for text, text_id in zip(row["positive"], row["positive_id"], strict=True):
            assert text == f"{documents[text_id].get('title') or ''} {documents[text_id]['text']}".strip()


def test_same_label(tmp_path):
    rows, counts = run(write_json_lines(tmp_path / "x.jsonl", LABELLED), "labels", tmp_path / "out", negatives=4)
    labels = {row["text"]: row["label"] for row in LABELLED}
    assert [row["query"] for row in rows] == list(labels) and counts["dropped"] == {}
    for row in rows:
        (positive,) = row["positive"]
        assert labels[positive] == labels[row["query"]] and positive != row["query"]
        assert 1 <= len(row["negative"]) <= 4 and len(set(row["negative"])) == len(row["negative"])
        assert all(labels[text] != labels[row["query"]] for text in row["negative"])
    # All texts of the label are drawn from, not its first ones.
    assert len({row["positive"][0] for row in rows}) > 15


def test_only_text_of_its_label(tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", [*LABELLED, {"text": "alone", "label": "rare", "split": "train"}])
    rows, counts = run(path, "labels", tmp_path / "out")
    assert len(rows) == 30 and counts["dropped"] == {"only text of its label": 1}
    path = write_json_lines(tmp_path / "one.jsonl", [row for row in LABELLED if row["label"] == "label_0"])
    with pytest.raises(ValueError, match="All labels are 'label_0'"):
        import_data([path], tmp_path / "one", kind="labels")


def test_equal_texts_are_no_pair(tmp_path):
    """A text that stands twice under its label is not its own positive, nor a negative where it has two labels."""
    rows = [{"text": text, "label": label} for label, texts in {"a": "xxy", "b": "xzz"}.items() for text in texts]
    rows, _ = run(write_json_lines(tmp_path / "x.jsonl", rows), "labels", tmp_path / "out")
    assert all(row["query"] not in (*row["positive"], *row["negative"]) for row in rows)


def test_label_names(tmp_path):
    rows, _ = run(write_json_lines(tmp_path / "x.jsonl", LABELLED), "label-names", tmp_path / "out")
    names = {"label 0", "label 1", "label 2"}
    for row, raw in zip(rows, LABELLED, strict=True):
        assert row["query"] == raw["text"] and row["positive"] == [raw["label"].replace("_", " ")]
        assert sorted(row["negative"]) == sorted(names - set(row["positive"]))


@pytest.mark.parametrize("kind", ["labels", "label-names"])
def test_seed_decides(tmp_path, monkeypatch, kind):
    path = write_json_lines(tmp_path / "x.jsonl", LABELLED)
    first, again, other = (
        run(path, kind, tmp_path / str(number), negatives=1, seed=seed)[0] for number, seed in enumerate((0, 0, 1))
    )
    assert first == again != other
    monkeypatch.setattr(steps, "SHARD_ROWS", 7)
    assert run(path, kind, tmp_path / "shards", negatives=1)[0] == first


def test_real_labels(tmp_path, shared_folder):
    path = shared_folder / "data" / "eval" / "classification" / "sib200" / "hi.tsv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    table = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    train = [row for row in table if row["split"] == "train"]
    rows, _ = run(path, "labels", tmp_path / "out", where={"split": "train"})
    assert Counter(row["query"] for row in rows) == Counter(row["text"] for row in train)
    labels = {row["text"]: row["label"] for row in train}
    assert all(labels[row["positive"][0]] == labels[row["query"]] for row in rows)
    assert all(labels[text] != labels[row["query"]] for row in rows for text in row["negative"])


@pytest.mark.parametrize("words", [True, False])
def test_nli(tmp_path, words):
    label = dict(zip("enc", ("entailment", "neutral", "contradiction") if words else (0, 1, 2), strict=True))
    premise, other = "A man eats.", "A dog runs."
    records = [
        {"premise": premise, "hypothesis": "Somebody eats.", "label": label["e"]},
        {"premise": premise, "hypothesis": "The man is hungry.", "label": label["n"]},
        {"premise": other, "hypothesis": "The dog is asleep.", "label": label["c"]},
        {"premise": premise, "hypothesis": "A man sleeps.", "label": label["c"]},
        {"premise": premise, "hypothesis": "A person eats.", "label": label["e"]},
        {"premise": premise, "hypothesis": "Undecided.", "label": "-" if words else -1},
    ]
    rows, counts = run(write_json_lines(tmp_path / "x.jsonl", records), "nli", tmp_path / "out")
    positive = ["Somebody eats.", "A person eats."]
    assert rows == [{"query": premise, "positive": positive, "negative": ["A man sleeps."]}]
    assert counts["rows_in"] == 6
    bad = write_json_lines(tmp_path / "bad.jsonl", [{**records[0], "label": "yes"}])
    with pytest.raises(ValueError, match="'yes' is no 'entailment'"):
        import_data([bad], tmp_path / "bad", kind="nli")


def test_sts(tmp_path):
    header = ("sentence1", "sentence2", "score")
    cells = [("a cat sits", "a cat is sitting", "4.8"), ("a cat sits", "a dog", "1.0"), ("one", "1", "4")]
    rows, counts = run(write_cells(tmp_path / "x.tsv", header, *cells), "sts", tmp_path / "out")
    assert rows == [{"query": cells[i][0], "positive": [cells[i][1]]} for i in (0, 2)]
    assert counts["dropped"] == {"score too low": 1}
    assert len(run(tmp_path / "x.tsv", "sts", tmp_path / "high", min_score=4.5)[0]) == 1
    bad = write_cells(tmp_path / "bad.tsv", header, *cells, ("one", "two", "much"))
    with pytest.raises(ValueError, match=r"bad\.tsv.*'much'"):
        import_data([bad], tmp_path / "bad", kind="sts")


def test_parallel_text(tmp_path, shared_folder):
    path = shared_folder / "data" / "eval" / "bitext" / "tatoeba" / "hin-eng.tsv"
    table = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    rows, _ = run(path, "parallel", tmp_path / "out", columns={"tgt": "eng"})
    source, english = table[0].index("src"), table[0].index("eng")
    assert rows == [{"query": line[source], "positive": [line[english]]} for line in table[1:]]


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".tsv", ".csv", ".parquet"])
def test_pairs_of_every_format(tmp_path, form):
    pairs = [('a "quoted" question', "an answer"), ("вопрос", "ответ"), ("प्रश्न", "उत्तर")]
    path = tmp_path / f"x{form}"
    if form == ".parquet":
        Dataset.from_list([{"question": q, "positive": p} for q, p in pairs]).to_parquet(path)
    elif form in (".tsv", ".csv"):
        cells = [(f'"{q}"'.replace('"quoted"', '""quoted""') if form == ".csv" else q, p) for q, p in pairs]
        write_cells(path, ("question", "positive"), *cells)
    else:
        write_json_lines(path, [{"question": q, "positive": p} for q, p in pairs])
    rows, _ = run(path, "pairs", tmp_path / "out", columns={"query": "question"})
    assert rows == [{"query": q, "positive": [p]} for q, p in pairs]


def test_several_files(tmp_path):
    paths = [write_json_lines(tmp_path / f"{name}.jsonl", LABELLED) for name in ("a", "b")]
    import_data(paths, tmp_path / "out", kind="label-names")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jsonl", "b.jsonl", steps.MANIFEST}


@pytest.mark.parametrize(
    "content, parameters, error, message",
    [
        (b'{"query": "a", "positive": "b"}\n{"query": ', {}, ValueError, r"x\.jsonl, line 2 is not valid JSON"),
        (b'{"query": "a", "positive": "b"}\n[]', {}, TypeError, r"x\.jsonl, line 2 is a list"),
        (b'{"query": "a"}', {}, ValueError, r"x\.jsonl, line 1 has no field 'positive' \(it has 'query'\)"),
        (b'{"query": "a", "positive": "b"}', {"columns": {"text": "a"}}, ValueError, "columns names 'text'"),
        (b'{"query": "a", "positive": "b"}', {"where": {"split": "x"}}, ValueError, "'split'"),
        (b'{"query": "a", "positive": "b"}', {"where": {"query": "x"}}, ValueError, "holds no records with"),
        (b"", {}, ValueError, r"x\.jsonl holds no records"),
        (b'{"query": "a", "positive": "\xff"}', {}, ValueError, r"x\.jsonl is damaged, or no UTF-8"),
        (b'{"query": "a", "positive": ["b"]}', {}, TypeError, r"x\.jsonl, line 1"),
        (b'{"query": "a", "positive": "b"}', {"kind": "triplets"}, ValueError, "kind='triplets'"),
    ],
)
def test_bad_records(tmp_path, content, parameters, error, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        import_data([path], tmp_path / "out", **{"kind": "pairs", **parameters})
    assert not (tmp_path / "out").exists()


def test_bad_files(tmp_path):
    damaged = tmp_path / "x.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"query": "a", "positive": "b"}\n' * 99)[:-9])
    for path, error, message in [
        (damaged, ValueError, r"x\.jsonl\.gz is damaged"),
        (tmp_path / "absent.jsonl", FileNotFoundError, "absent.jsonl does not exist"),
        (tmp_path / "absent.tsv", FileNotFoundError, "absent.tsv"),
        (write_cells(tmp_path / "x.tsv", ("query", "positive"), ("a", "b"), ("a",)), ValueError, r"x\.tsv, line 3"),
        (write_cells(tmp_path / "y.tsv", ("query", "positive"), ("a", "b", "c")), ValueError, r"y\.tsv, line 2"),
    ]:
        with pytest.raises(error, match=message):
            import_data([path], tmp_path / "out", kind="pairs")
        assert not (tmp_path / "out").exists()
