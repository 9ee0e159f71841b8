"""
The order in which training reads a mixture, decided by (seed, epoch) alone.

An epoch in four steps: (1) every data set has a fixed random order, which repeats for ever, and an epoch takes the
next rows of it: what one epoch leaves out is where the next begins, so that no row comes a second time before all
others have come, (2) these rows are shuffled anew and put cluster by cluster, (3) they are cut into global batches,
(4) the batches of all data sets are shuffled. Of each global batch a process takes its slice.
"""

from collections.abc import Iterator

import numpy as np

from .mixture import Mixture


class MixtureBatchSampler:
    """
    The batches of one process, each a list of `(epoch, index)` into a [`~data.mixture.Mixture`].

    A `DataLoader` takes it as its `batch_sampler`. `accelerate` must not prepare that one: it would shard the batches
    once more.

    Args:
        mixture ([`~data.mixture.Mixture`]): A data set of weight `w` gives `w` times its rows to every epoch.
        batch_size (`int`): Rows of a process's batch.
        num_processes, process_index (`int`, *optional*)
        accumulation_steps (`int`, *optional*, defaults to 1):
            So many batches of each of `num_processes` processes together are a global batch, in which the same rows
            stand however it is divided.
        seed (`int`, *optional*, defaults to 0)
        homogeneous (`bool`, *optional*, defaults to `True`):
            Whether a global batch holds rows of one data set, filled cluster by cluster: the next cluster begins only
            where one ends. Otherwise all rows are shuffled together.

    Attributes:
        left_out (`dict[str, int]`): For each data set (if not homogeneous, for all together) the rows that every epoch
            leaves out because they fill no global batch; other ones each time.

    Raises:
        `ValueError`: for a data set that does not fill a global batch.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation_steps: int = 1,
        seed: int = 0,
        homogeneous: bool = True,
    ):
        self.batch_size, self.process_index, self.seed = batch_size, process_index, seed
        self.accumulation_steps = accumulation_steps
        self.global_batch_size = batch_size * accumulation_steps * num_processes
        self.homogeneous = homogeneous
        self.epoch = 0
        self.sizes = mixture.sizes
        # Counted from 0, so that a cluster's number is its place in an array.
        clusters = [mixture.clusters(i) if homogeneous else None for i in range(len(mixture.sizes))]
        self._clusters = [None if ids is None else np.unique(ids, return_inverse=True)[1] for ids in clusters]
        names = [source.name for source in mixture.sources]
        rows = [round(source.weight * size) for source, size in zip(mixture.sources, mixture.sizes, strict=True)]
        if homogeneous:
            for name, size, count in zip(names, self.sizes, rows, strict=True):
                self._check_size(f"The data set {name}", min(size, count), f"{count:,} of its {size:,} rows an epoch")
            self.left_out = {name: count % self.global_batch_size for name, count in zip(names, rows, strict=True)}
            rows = [count - count % self.global_batch_size for count in rows]
        else:
            self._check_size("The mixture", sum(rows), f"{sum(rows):,} rows an epoch")
            self.left_out = {"mixture": sum(rows) % self.global_batch_size}
        self.rows = rows  # that an epoch takes of each data set

    def _check_size(self, name: str, available: int, rows: str):
        if available < self.global_batch_size:
            raise ValueError(
                f"{name} has {rows}, which do not fill a global batch of {self.global_batch_size:,} "
                f"({self.global_batch_size // self.batch_size} x {self.batch_size}): make the batch smaller, give it "
                "more rows or a larger weight, or leave it out."
            )

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return self._global_batches * self.accumulation_steps

    @property
    def _global_batches(self) -> int:
        return sum(self.rows) // self.global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        rng = np.random.default_rng((self.seed, epoch))
        starts = np.cumsum([0, *self.sizes])
        indices = np.concatenate([starts[i] + self._dataset_rows(i, epoch, rng) for i in range(len(self.sizes))])
        if not self.homogeneous:
            rng.shuffle(indices)
        batches = indices[: self._global_batches * self.global_batch_size]
        batches = batches.reshape(self._global_batches, -1, self.accumulation_steps, self.batch_size)
        for batch in rng.permutation(self._global_batches):
            for own in batches[batch, self.process_index].tolist():
                yield [(epoch, index) for index in own]

    def _dataset_rows(self, dataset: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """The rows of a data set in an epoch, in the order in which they fill batches."""
        size, count = self.sizes[dataset], self.rows[dataset]
        order = np.random.default_rng((self.seed, dataset, size)).permutation(size)
        rows = order.take(np.arange(epoch * count, (epoch + 1) * count), mode="wrap")
        # Pieces without a repeated row, so that none comes twice in a batch; more than one if the weight is above 1.
        step = size - size % self.global_batch_size if self.homogeneous else size
        for start in range(0, count, step):
            piece = rows[start : start + step]
            rng.shuffle(piece)
            if (clusters := self._clusters[dataset]) is not None:
                places = rng.permutation(clusters.max() + 1)
                piece[:] = piece[np.argsort(places[clusters[piece]], kind="stable")]
        return rows
