"""
`clean` keeps a row, without its worthless texts, if a query and a positive are left; the manifest counts the reasons
of those that go.
"""

import json

import pytest
from conftest import read_json_lines, write_json_lines

from lusifer_hf.data.prepare.cleaning import clean, script_of


pytestmark = pytest.mark.usefixtures("own_cache")


def run(tmp_path, rows, **parameters) -> tuple[list[dict], dict[str, int]]:
    """The rows that stay, and the counts of why others went."""
    clean([write_json_lines(tmp_path / "x.jsonl", rows)], tmp_path / "out", **parameters)
    (entry,) = json.loads((tmp_path / "out" / "manifest.json").read_text())
    kept, counts = read_json_lines(tmp_path / "out" / "x.jsonl"), entry["data"]["x"]
    assert counts["rows_in"] == len(rows) and counts["rows_out"] == len(kept)
    assert sum(counts["dropped"].values()) == len(rows) - len(kept)
    return kept, counts["dropped"]


GOOD = {"query": "where do bears sleep", "positive": ["Bears sleep in dens."]}
DROPPED = {
    "empty query": {"query": " \n"},
    "too short query": {"query": "a"},
    "too long query": {"query": "word " * 100},
    "damaged query": {"query": "where do b\ufffdars sleep"},
    "no positive": {"positive": []},
    "empty positive": {"positive": ["", "\t"]},
    "too short positive": {"positive": ["."]},
    "too long positive": {"positive": ["word " * 100]},
    "damaged positive": {"positive": ["Bears sleep\x00 in dens."]},
    "identical positive": {"positive": ["Where  do bears SLEEP "]},
}


@pytest.mark.parametrize("reason, fields", DROPPED.items(), ids=DROPPED)
def test_row_goes(tmp_path, reason, fields):
    kept, dropped = run(tmp_path, [GOOD, GOOD | fields], max_characters=100)
    assert kept == [GOOD] and dropped == {reason: 1}


def test_worthless_texts_go_and_the_row_stays(tmp_path):
    row = {
        "query": "  where do bears sleep\n",
        "positive": ["", "Where do bears sleep", " In dens.", "IN DENS.", "In caves."],
        "positive_id": ["d0", "d1", "d2", "d3", "d4"],
        "negative": ["in dens.", "In nests.", "\x07bell", "in nests.", "where do bears sleep"],
        "negative_id": ["n0", "n1", "n2", "n3", "n4"],
        "cluster": 3,
    }
    (kept,), dropped = run(tmp_path, [row])
    assert dropped == {}
    assert kept == {
        "query": "where do bears sleep",
        "positive": ["In dens.", "In caves."],
        "positive_id": ["d2", "d4"],
        "negative": ["In nests."],
        "negative_id": ["n1"],
        "cluster": 3,
    }


def test_line_breaks_and_joiners_are_no_damage(tmp_path):
    # Persian and the emoji need their joiners; a text may have lines.
    row = {"query": "کتاب\u200cهای خوب", "positive": ["first line\n\tsecond line 👩\u200d🌾"]}
    assert run(tmp_path, [row]) == ([row], {})


def test_min_query_words(tmp_path):
    rows = [GOOD, GOOD | {"query": "bears sleeping"}]
    assert run(tmp_path, rows, min_query_words=3) == ([GOOD], {"too short query": 1})


def test_scripts(tmp_path):
    rows = [
        GOOD,
        {"query": "где спят медведи", "positive": ["Медведи спят в берлоге."]},
        {"query": "where do bears sleep?", "positive": ["Медведи спят в берлоге.", "In dens."]},
        {"query": "what is γ radiation", "positive": ["Light of 10¹⁹ Hz."]},
        {"query": "2 + 2 = ?", "positive": ["4!"]},  # nothing to tell a script by
    ]
    kept, dropped = run(tmp_path, rows, scripts=["latin"])
    assert kept == [GOOD, {**rows[2], "positive": ["In dens."]}, *rows[3:]]
    assert dropped == {"other script query": 1}
    with pytest.raises(ValueError, match="'KLINGON' is no script"):
        clean([tmp_path / "x.jsonl"], tmp_path / "other", scripts=["Klingon"])


def test_script_of_sentences(sentences):
    """Every sentence of the quickstart is nearly all in one script."""
    scripts = [[script for letter in sentence if (script := script_of(letter))] for sentence in sentences]
    assert all(max(map(found.count, found)) >= 0.9 * len(found) for found in scripts)
    assert {found[0] for found in scripts} == {
        *("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "BENGALI", "TELUGU", "HANGUL")
    }


def test_limits_that_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="min_characters=9 and max_characters=8"):
        clean([write_json_lines(tmp_path / "x.jsonl", [GOOD])], tmp_path / "out", min_characters=9, max_characters=8)


def test_real_data(tmp_path, shared_folder):
    """Of a set of whole sentences nearly nothing goes, and no text of the rest is changed."""
    path = shared_folder / "data" / "train" / "squad_sent.jsonl.gz"
    clean([path], tmp_path / "out", scripts=["LATIN"])
    rows, kept = read_json_lines(path), read_json_lines(tmp_path / "out" / path.name)
    assert 0.99 * len(rows) < len(kept) <= len(rows)
    texts = {text for row in rows for text in (row["query"], *row["positive"])}
    assert all({row["query"], *row["positive"]} <= texts for row in kept)
