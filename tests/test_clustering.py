"""
The contract of `cluster`:

- texts that lie together get one number, each cluster has a minimum size, and no row is without;
- the same numbers for the same seed, however the embeddings lie in shards;
- training fills its batches from the numbers.
"""

import inspect
import json

import numpy as np
import pytest
from conftest import read_json_lines, write_json_lines

from lusifer_hf import LusiferModel
from lusifer_hf.data.mixture import DataSource, load_mixture
from lusifer_hf.data.prepare import embedding
from lusifer_hf.data.prepare.clustering import cluster, cluster_embeddings
from lusifer_hf.data.samplers import MixtureBatchSampler


pytestmark = pytest.mark.usefixtures("own_cache")

SIZES = (90, 60, 30, 4)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around four directions, and which one each has."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    vectors = 4 * np.eye(len(SIZES), 16)[labels] + 0.3 * rng.normal(size=(len(labels), 16))
    # The small group lies beside the second one.
    vectors[labels == 3, 1] = 3
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture
def save_shards(tmp_path, monkeypatch):
    def save(vectors: np.ndarray, size: int):
        monkeypatch.setattr(embedding, "SHARD_TEXTS", size)
        paths = [tmp_path / f"{size}_{start}.npy" for start in range(0, len(vectors), size)]
        for index, path in enumerate(paths):
            np.save(path, vectors[index * size : (index + 1) * size])
        return paths

    return save


def partition(numbers: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(np.flatnonzero(numbers == number)) for number in np.unique(numbers)}


def test_defaults_are_the_research_settings(shared_folder):
    recipe = json.loads((shared_folder / "facts" / "recipe.json").read_text())["clusters"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(cluster).parameters.items()}
    names = {"clusters": "centroids", "iterations": "iterations", "min_cluster_size": "minimum_points_per_centroid"}
    assert {name: defaults[name] for name in names} == {name: recipe[theirs] for name, theirs in names.items()}


def test_groups_are_found(blobs, save_shards):
    vectors, labels = blobs
    paths = save_shards(vectors, 50)
    rows = len(vectors)
    found = cluster_embeddings(paths, rows, clusters=4, iterations=20, min_cluster_size=1, seed=0)
    assert partition(found) == partition(labels) and set(found) == {0, 1, 2, 3}
    # The four rows of the small group go where they are nearest.
    found = cluster_embeddings(paths, rows, clusters=4, iterations=20, min_cluster_size=20, seed=0)
    assert partition(found) == partition(np.where(labels == 3, 1, labels)) and set(found) == {0, 1, 2}


@pytest.mark.parametrize("clusters, smallest", [(30, 10), (64, 2), (184, 1), (1024, 20), (5, 200)])
def test_every_cluster_has_its_size(blobs, save_shards, clusters, smallest):
    vectors, _ = blobs
    options = {"clusters": clusters, "iterations": 5, "min_cluster_size": smallest}
    found = cluster_embeddings(save_shards(vectors, 50), len(vectors), seed=0, **options)
    sizes = np.bincount(found)
    assert len(found) == len(vectors) and len(sizes) <= clusters
    assert sizes.min() >= smallest or len(sizes) == 1
    if smallest < 20:
        assert len(sizes) > 4
    again = cluster_embeddings(save_shards(vectors, 184), len(vectors), seed=0, **options)
    np.testing.assert_array_equal(again, found)
    if clusters == 30:
        assert partition(cluster_embeddings(save_shards(vectors, 50), 184, seed=1, **options)) != partition(found)


def test_training_takes_batches_from_clusters(tmp_path, sentences, tiny_repository):
    rows = [
        {"id": str(index), "query": text, "positive": ["p"], "negative": ["n"]} for index, text in enumerate(sentences)
    ]
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    few = write_json_lines(tmp_path / "few.jsonl", rows[:3])
    cluster([path, few], tmp_path / "out", model=str(tiny_repository), clusters=4, min_cluster_size=5)
    clustered = read_json_lines(tmp_path / "out" / "x.jsonl")
    assert [{field: row[field] for field in rows[0]} for row in clustered] == rows
    numbers = np.array([row["cluster"] for row in clustered])
    assert 1 < len(set(numbers)) <= 4 and np.bincount(numbers).min() >= 5
    assert {row["cluster"] for row in read_json_lines(tmp_path / "out" / "few.jsonl")} == {0}

    # Queries of a cluster are alike.
    embeddings = LusiferModel.from_pretrained(tiny_repository).encode_query(
        sentences, normalize=True, show_progress_bar=False
    )
    cosines = embeddings @ embeddings.T
    same = numbers[:, None] == numbers
    assert cosines[same & ~np.eye(len(numbers), dtype=bool)].mean() > cosines[~same].mean()

    mixture = load_mixture([DataSource(str(tmp_path / "out" / "x.jsonl"))], "representation")
    batches = list(MixtureBatchSampler(mixture, batch_size=3))
    mixed = [len({numbers[index] for _, index in batch}) > 1 for batch in batches]
    assert len(batches) == 14 and sum(mixed) < len(set(numbers))


def test_bad_values(tmp_path, tiny_repository):
    path = write_json_lines(
        tmp_path / "x.jsonl", [{"query": "a", "positive": ["b"]}, {"query": "", "positive": ["b"]}]
    )
    for options, message in [
        ({"clusters": 0}, "clusters=0 must be 1 or more"),
        ({"iterations": 0}, "iterations=0"),
        ({"min_cluster_size": -1}, "min_cluster_size=-1"),
        ({}, r"x, row 1 \(from 0\) lacks a query or a positive: clean the data set first"),
    ]:
        with pytest.raises(ValueError, match=message):
            cluster([path], tmp_path / "out", model=str(tiny_repository), **options)
        assert not (tmp_path / "out").exists()
