"""
The contract of the quickstart's own data: thousands of training rows of plain English and a held-out retrieval set,
made from the running Python's standard library without importing it; the same every time, with no text on both sides;
words alone find some of the held-out documents, but far from all.
"""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from lusifer_hf import quickstart_data
from lusifer_hf.quickstart_data import write_docstring_data
from lusifer_hf.training.evaluation import EvalSource, load_eval_sources


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docstrings") / "data"
    counts = write_docstring_data(folder)
    files = {name: read(folder / name) for name in ("train.jsonl", "texts.jsonl")}
    files |= {name: read(folder / "held_out" / f"{name}.jsonl") for name in ("queries", "corpus")}
    return folder, counts, files


def training_texts(files: dict) -> set[str]:
    rows = [[row["query"], *row["positive"], *row["negative"]] for row in files["train.jsonl"]]
    return {text for row in rows for text in row} | {row["query"] for row in files["texts.jsonl"]}


def test_rows_and_sizes(data):
    _, counts, files = data
    assert counts == {
        "train": len(files["train.jsonl"]),
        "texts": len(files["texts.jsonl"]),
        "queries": len(files["queries"]),
    }
    assert 2000 <= counts["train"] <= 4500
    assert 4000 <= counts["texts"]
    assert 200 <= counts["queries"] <= 700
    assert len(files["corpus"]) == counts["queries"]
    for row in files["train.jsonl"]:
        assert list(row) == ["query", "positive", "negative"]
        assert len(row["positive"]) == 1
        assert len(row["negative"]) == 2
        assert not set(row["positive"]) & set(row["negative"])
    assert all(list(row) == ["query"] for row in files["texts.jsonl"])


def test_no_text_is_on_both_sides_or_twice(data):
    _, _, files = data
    held_out = [row["text"] for name in ("queries", "corpus") for row in files[name]]
    pairs = [text for row in files["train.jsonl"] for text in (row["query"], *row["positive"])]
    assert len(set(held_out)) == len(held_out)
    assert len(set(pairs)) == len(pairs)
    assert len({row["query"] for row in files["texts.jsonl"]}) == len(files["texts.jsonl"])
    assert not training_texts(files) & set(held_out)


def test_no_held_out_document_resembles_a_training_text(data):
    _, _, files = data

    def runs(text: str) -> set[str]:
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[start : start + 4]) for start in range(len(words) - 3)}

    texts = [runs(text) for text in training_texts(files)]
    for row in files["corpus"][::10]:
        own = runs(row["text"])
        assert max(len(own & other) for other in texts) <= 0.5 * len(own), row["text"]


def test_plain_english(data):
    _, _, files = data
    documents = [row["positive"][0] for row in files["train.jsonl"]] + [row["text"] for row in files["corpus"]]
    texts = documents + [row["query"] for row in files["texts.jsonl"]]
    assert all(text.isascii() and text == " ".join(text.split()) and text[0].isupper() for text in texts)
    assert not [text for text in texts if ">>>" in text or "`" in text]
    assert max(len(text.split()) for text in documents) <= 80
    words = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    assert {"the", "a", "of", "to", "is", "in"} < {word for word, _ in words.most_common(12)}
    common = sum(words[word] for word in ("the", "a", "an", "of", "to", "is", "in", "and", "for", "if", "or", "be"))
    assert common > 0.2 * words.total()


def test_the_same_in_another_process(data, tmp_path):
    folder, counts, _ = data
    # Without the package, whose imports would take longer than the work.
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['write_docstring_data'](sys.argv[2]))"
    command = [sys.executable, "-c", script, quickstart_data.__file__, str(tmp_path)]
    finished = subprocess.run(
        command, env={"PYTHONHASHSEED": "12345"}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == str(counts)
    assert not finished.stderr
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(paths) == 5
    for path in paths:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_words_alone_find_some_of_it(data):
    folder, _, _ = data
    (item,) = load_eval_sources([EvalSource(str(folder / "held_out"), "retrieval")])
    (_, queries), (_, documents) = item.texts
    vectorizer = TfidfVectorizer().fit(documents)
    vectors = [torch.tensor(vectorizer.transform(texts).toarray()) for texts in (queries, documents)]
    assert 0.35 < item.score(*vectors)["ndcg@10"] < 0.6  # 0.46 on Python 3.11


MODULE = '''"""Work with letters that people send.

More about the letters is said in this paragraph of prose, which is long enough.

>>> example()
"""
import sys
open(sys.argv[0] + ".imported", "w")

class MailBox:
    """A box that holds the letters of one person."""

    def removeOld_letters(self):
        """Remove the letters that are old.

        - a list is no prose
        """

    def table(self):
        """a b c"""
'''


def test_reads_without_importing(tmp_path, monkeypatch):
    library = tmp_path / "library"
    for name in ("post/letters.py", "post/__init__.py", "test/letters.py", "tkinter/letters.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(MODULE if "letters" in name else '"""Everything that has to do with the post."""')
    monkeypatch.setattr(quickstart_data, "FEWEST_OBJECTS", 1)
    monkeypatch.setattr(quickstart_data, "HELD_OUT_PERCENT", 0)
    assert write_docstring_data(tmp_path / "data", library) == {"train": 4, "texts": 5, "queries": 0}
    details = "More about the letters is said in this paragraph of prose, which is long enough."
    rows = [(row["query"], row["positive"]) for row in read(tmp_path / "data" / "train.jsonl")]
    assert rows == [
        ("post", ["Everything that has to do with the post."]),
        ("Work with letters that people send.", [details]),
        ("post letters mail box", ["A box that holds the letters of one person."]),
        ("post letters mail box remove old letters", ["Remove the letters that are old."]),
    ]
    everything = set(itertools.chain.from_iterable(positive for _, positive in rows))
    for row in read(tmp_path / "data" / "train.jsonl"):
        assert len(row["negative"]) == 2
        assert set(row["negative"]) < everything - set(row["positive"])
    assert not list(tmp_path.rglob("*.imported"))


def test_a_library_without_sources_is_an_error(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds the source of 0 objects .* zipped or compiled"):
        write_docstring_data(tmp_path / "data", tmp_path)
    assert not (tmp_path / "data").exists()
