"""
The contract of `sample` and `stats`:

- no cluster gives two rows more than another that has some left; rows keep their order and are not changed;
- the same rows for the same seed, others for another;
- what `stats` counts is what is there, and what it writes is what it shows.
"""

import json

import numpy as np
import pytest
from conftest import read_json_lines, write_json_lines

from lusifer_hf.data.prepare.sampling import balanced_sample, sample
from lusifer_hf.data.prepare.stats import describe


pytestmark = pytest.mark.usefixtures("own_cache")

CLUSTERS = np.random.default_rng(0).permutation(np.repeat([4, 7, 9, -1], [50, 30, 3, 17]))


@pytest.mark.parametrize(
    "rows, sizes",
    {1: None, 2: None, 8: [2, 2, 2, 2], 12: [3, 3, 3, 3], 30: [9, 9, 3, 9], 80: [30, 30, 3, 17]}.items(),
)
def test_clusters_give_alike(rows, sizes):
    taken = balanced_sample(CLUSTERS, rows, seed=3)
    assert len(taken) == rows and (np.diff(taken) > 0).all()
    counts = [int((CLUSTERS[taken] == cluster).sum()) for cluster in (4, 7, 9, -1)]
    assert counts == sizes if sizes else sorted(counts)[-1] == 1


def test_other_rows_for_another_seed():
    first, again, other = (balanced_sample(CLUSTERS, 20, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    # Every row has its chance: of 50 draws of 3 among 17, none is left out by more than bad luck.
    drawn = np.concatenate([balanced_sample(CLUSTERS, 12, seed) for seed in range(50)])
    assert len(set(drawn) & set(np.flatnonzero(CLUSTERS == -1))) == 17


def test_sample_keeps_whole_rows(tmp_path):
    rows = [
        {"id": f"r{i}", "query": f"q {i}", "positive": [f"p {i}"], "negative": ["n"], "cluster": int(cluster)}
        for i, cluster in enumerate(CLUSTERS)
    ]
    # One set without clusters, another with fewer rows than are asked for.
    plain = [{field: row[field] for field in ("query", "positive")} for row in rows]
    paths = [tmp_path / f"{name}.jsonl" for name in ("clustered", "plain", "few")]
    for path, content in zip(paths, (rows, plain, rows[:5]), strict=True):
        write_json_lines(path, content)
    sample(paths, tmp_path / "out", rows=12)
    clustered, unclustered, few = (read_json_lines(tmp_path / "out" / path.name) for path in paths)
    assert clustered == [rows[index] for index in balanced_sample(CLUSTERS, 12, seed=0)]
    assert len(unclustered) == 12 and all(row in plain for row in unclustered)
    assert few == rows[:5]
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())[-1]["data"]
    assert counts["clustered"] == {"rows_in": 100, "rows_out": 12, "dropped": {"not drawn": 88}}
    assert counts["few"]["dropped"] == {}

    with pytest.raises(ValueError, match="rows=0 must be 1 or more"):
        sample(paths, tmp_path / "other", rows=0)


def test_stats_count_what_is_there(tmp_path):
    rows = [
        {"query": "a b", "positive": ["c" * 10], "negative": ["d" * 4, "e" * 6], "cluster": 2},
        {"query": "A, b!", "positive": ["c" * 10], "cluster": 2},  # the same words
        {"query": "f", "positive": ["g" * 100, "h"], "cluster": 5},
        {"query": "i", "positive": ["j"]},
    ]
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    text = describe([path], tmp_path / "stats")
    facts = json.loads((tmp_path / "stats" / "stats.json").read_text())["x"]
    assert (facts["rows"], facts["positives"], facts["negatives"]) == (4, 5, 2)
    assert facts["repeated queries"] == facts["repeated rows"] == 1
    assert facts["characters"]["positive"] == {"5 %": 1, "median": 10, "95 %": 100, "longest": 100}
    assert facts["clusters"] == {"number": 2, "smallest": 1, "largest": 2, "median": 1, "rows without": 1}
    assert (tmp_path / "stats" / "stats.md").read_text() == text + "\n"
    assert "| x | 4 | 5 | 2 | 1 | 1 |" in text and "| x, negative | 4 | 4 | 6 | 6 |" in text
    assert (tmp_path / "stats" / "stats.png").stat().st_size > 5000

    with pytest.raises(FileExistsError, match="stats"):
        describe([path], tmp_path / "stats")
    assert describe([path]) == text
    with pytest.raises(ValueError, match="Two inputs have the name 'x'"):
        describe([path, write_json_lines(tmp_path / "y" / "x.jsonl", rows)])
