"""Take fewer rows, the same number of each cluster as far as it has them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .steps import step


def sample(inputs: Sequence[str | Path], output: str | Path, *, rows: int, seed: int = 0) -> Path:
    """
    Sample rows of each data set, balanced over its clusters; they keep their order.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`): The folder to write.
        rows (`int`): To keep of each data set. One with fewer keeps all.
        seed (`int`, *optional*, defaults to 0): Draws the rows.

    Returns:
        `Path`: `output`.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be 1 or more.")
    with step("sample", inputs, output, {"rows": rows, "seed": seed}) as running:
        for name in running.inputs:
            dataset = running.read(name)
            clusters = dataset.data.column("cluster").fill_null(-1).to_numpy()
            kept = balanced_sample(clusters, rows, seed)
            dropped = Counter({"not drawn": len(dataset) - len(kept)} if len(kept) < len(dataset) else {})
            running.write(name, dataset.select(kept), len(dataset), dropped)
    return Path(output)


def balanced_sample(clusters: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """`rows` indices into `clusters` (N,), in order: no cluster gives two more than another that has some left."""
    order = np.random.default_rng(seed).permutation(len(clusters))
    # How many rows of its cluster come before each one in the random order.
    by_cluster = order[np.argsort(clusters[order], kind="stable")]
    sizes = np.bincount(np.unique(clusters, return_inverse=True)[1])
    turn = np.empty(len(clusters), dtype=np.int64)
    turn[by_cluster] = np.concatenate([np.arange(size) for size in sizes])
    # First the first of every cluster, then the second of every cluster, and so on.
    rank = np.empty(len(clusters), dtype=np.int64)
    rank[order] = np.arange(len(clusters))
    return np.sort(np.lexsort((rank, turn))[:rows])
