"""Number the clusters of a data set's queries, so that batches can be filled from one cluster."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from .embedding import embed_shards, load_encoders, take_rows
from .steps import check_complete, step


def cluster(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    model: str,
    instruction: str | None = None,
    clusters: int = 1024,
    iterations: int = 200,
    min_cluster_size: int = 20,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Path:
    """
    Cluster the queries of each data set by k-means, and write the number of its cluster into every row.

    Runs on all processes of `accelerate launch`. The defaults are those of the research code.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`): The folder to write.
        model, instruction, trust_remote_code: As in [`~data.prepare.embedding.load_encoders`].
        clusters (`int`, *optional*, defaults to 1024):
            At most; a data set has no more than it has `min_cluster_size` rows.
        iterations (`int`, *optional*, defaults to 200): Of k-means, on at most 256 queries per cluster.
        min_cluster_size (`int`, *optional*, defaults to 20): Rows of smaller clusters go to the nearest larger one.
        seed (`int`, *optional*, defaults to 0): Draws the first centroids and the queries that they are learned from.

    Returns:
        `Path`: `output`.
    """
    for name, value in (("clusters", clusters), ("iterations", iterations), ("min_cluster_size", min_cluster_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    parameters = {"model": model, "instruction": instruction, "clusters": clusters, "iterations": iterations}
    parameters |= {"min_cluster_size": min_cluster_size, "seed": seed}
    others = [model] if Path(model).exists() else []
    with step("cluster", inputs, output, parameters, others=others, distributed=True) as running:
        encode_query, _ = load_encoders(model, instruction, trust_remote_code=trust_remote_code)
        data = {name: running.read(name) for name in running.inputs}
        for name, rows in data.items():
            check_complete(rows, name)
        for name, rows in data.items():
            queries = rows.select_columns("query").rename_column("query", "text")
            paths = embed_shards(running, queries, encode_query, name)
            if running.is_main:
                numbers = cluster_embeddings(paths, len(rows), clusters, iterations, min_cluster_size, seed)
                rows = rows.remove_columns("cluster").add_column("cluster", numbers)
                running.write(name, rows, len(rows), Counter())
    return Path(output)


def cluster_embeddings(
    paths: Sequence[Path], rows: int, clusters: int, iterations: int, min_cluster_size: int, seed: int
) -> np.ndarray:
    """The cluster of every embedding (N,), numbered from 0; each has at least `min_cluster_size` rows or all."""
    count = max(1, min(clusters, rows // min_cluster_size))
    learned = np.sort(np.random.default_rng(seed).permutation(rows)[: 256 * count])
    sample = take_rows(paths, learned)
    # Cosine, as the embeddings have length 1: the nearest centroid is that of the largest product.
    kmeans = faiss.Kmeans(sample.shape[1], count, niter=iterations, seed=seed + 1, spherical=True)
    kmeans.cp.min_points_per_centroid = 1  # we see to it
    kmeans.train(sample)
    kept = np.arange(count)
    while True:
        index = faiss.IndexFlatIP(sample.shape[1])
        index.add(kmeans.centroids[kept])
        nearest = np.concatenate([index.search(np.load(path), 1)[1][:, 0] for path in paths])
        sizes = np.bincount(nearest, minlength=len(kept))
        if sizes.min() >= min_cluster_size or len(kept) == 1:
            return nearest
        # The smallest half of those that are too small, since their rows make others larger.
        small = np.flatnonzero(sizes < min_cluster_size)
        small = small[np.argsort(sizes[small], kind="stable")][: (len(small) + 1) // 2]
        kept = np.delete(kept, small if len(small) < len(kept) else small[1:])
