"""
P12: a global batch holds rows of one data set, filled cluster by cluster; no row comes twice and none is lost but the
counted remainder, another one in every epoch. The order depends on (seed, epoch), not on the number of processes.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
from golden import golden_case, needs_golden, read_json

from lusifer_hf.data.mixture import DataSource
from lusifer_hf.data.samplers import MixtureBatchSampler


SIZES = [23, 10, 37, 16]


@dataclass
class Rows:
    """What the sampler needs of a mixture."""

    sizes: list[int]
    cluster_ids: list
    sources: list[DataSource]

    def clusters(self, dataset):
        return self.cluster_ids[dataset]


def mixture(sizes=SIZES, clusters=4, weights=None) -> Rows:
    """Data sets with cluster ids that are no counts from 0, except the first, which has none."""
    rng = np.random.default_rng(3)
    ids = [None] + [rng.integers(0, clusters, size) * 7 - 1 for size in sizes[1:]]
    weights = weights or [1.0] * len(sizes)
    return Rows(sizes, ids, [DataSource(f"{i}.jsonl", weight=weight) for i, weight in enumerate(weights)])


def sampler_of(rows: Rows, batch_size=4, epoch=0, **options) -> MixtureBatchSampler:
    sampler = MixtureBatchSampler(rows, batch_size, **{"seed": 11, **options})
    sampler.set_epoch(epoch)
    return sampler


def read(rows: Rows, batch_size=4, epoch=0, **options) -> list[list[tuple[int, int]]]:
    """The batches of an epoch, each row as (data set, row)."""
    sampler = sampler_of(rows, batch_size, epoch, **options)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {e for batch in batches for e, _ in batch} == {epoch}
    starts = np.cumsum([0, *rows.sizes])
    sets = [[int(np.searchsorted(starts, index, side="right")) - 1 for _, index in batch] for batch in batches]
    return [
        [(dataset, int(index - starts[dataset])) for dataset, (_, index) in zip(own, batch, strict=True)]
        for own, batch in zip(sets, batches, strict=True)
    ]


def flat(batches) -> list[tuple[int, int]]:
    return [row for batch in batches for row in batch]


def test_one_data_set_in_a_batch_nothing_twice_nothing_lost():
    rows = mixture()
    left_out = Counter()
    for epoch in range(40):
        sampler = sampler_of(rows, epoch=epoch)
        assert sampler.left_out == {"0": 3, "1": 2, "2": 1, "3": 0} and len(sampler) == 5 + 2 + 9 + 4
        batches = read(rows, epoch=epoch)
        assert all(len(batch) == 4 and len({dataset for dataset, _ in batch}) == 1 for batch in batches)
        taken = flat(batches)
        assert len(set(taken)) == len(taken) == 80
        left_out.update({(d, row) for d, size in enumerate(SIZES) for row in range(size)} - set(taken))
    # Over the epochs every row is left out as often as the others.
    for dataset, (size, count) in enumerate(zip(SIZES, (3, 2, 1, 0), strict=True)):
        expected = 40 * count / size
        assert all(abs(left_out[dataset, row] - expected) <= 1 for row in range(size))


def test_another_remainder_in_the_next_epoch():
    rows = mixture([9, 11])
    remainders = [
        set(range(9)) - {row for dataset, row in flat(read(rows, epoch=e)) if dataset == 0} for e in range(9)
    ]
    assert len(set.union(*remainders)) == 9 and all(len(remainder) == 1 for remainder in remainders)
    assert len({frozenset(flat(read(rows, seed=seed))) for seed in range(9)}) == 9


def assert_cluster_by_cluster(batches, clusters, size):
    """
    Whether the batches of a data set can be laid one after the other so that each cluster is one stretch.

    A cluster that is spread over b batches fills at least b - 2 of them alone, and the stretches of k clusters have
    k - 1 borders, at which alone a batch may hold a further cluster.
    """
    held = [Counter(clusters[row] for row in batch) for batch in batches]
    assert sum(len(count) - 1 for count in held) <= len(set(clusters)) - 1
    for cluster in set(clusters):
        assert sum(cluster in count and len(count) > 1 for count in held) <= 2


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_cluster_by_cluster(weight):
    rows = mixture([8, 203, 150], clusters=5, weights=[1.0, weight, weight])
    neighbours = defaultdict(set)
    for epoch in range(10):
        batches = read(rows, batch_size=8, epoch=epoch)
        for dataset in (1, 2):
            own = [[row for _, row in batch] for batch in batches if batch[0][0] == dataset]
            assert_cluster_by_cluster(own, rows.clusters(dataset), rows.sizes[dataset])
            held = [{int(rows.clusters(dataset)[row]) for row in batch} for batch in own]
            neighbours[dataset] |= {pair for clusters in held for pair in combinations(sorted(clusters), 2)}
    assert all(len(pairs) > 4 for pairs in neighbours.values())  # the clusters' order is another one each time


def test_batches_of_all_data_sets_are_shuffled():
    rows = mixture([400, 400], clusters=2)
    sets = [batch[0][0] for batch in read(rows)]
    changes = sum(a != b for a, b in pairwise(sets))
    assert 60 < changes < 140  # of 199; 100 expected
    clusters = [rows.clusters(1)[batch[0][1]] for batch in read(rows) if batch[0][0] == 1]
    assert 25 < sum(a != b for a, b in pairwise(clusters)) < 75  # of 99


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("processes, accumulation", [(2, 1), (4, 1), (1, 2), (2, 4)])
def test_processes_together_read_what_one_reads(processes, accumulation, homogeneous):
    rows = mixture([40, 61, 16], weights=[1.0, 0.7, 2.0])
    options = {"num_processes": processes, "accumulation_steps": accumulation, "homogeneous": homogeneous}
    for epoch in range(2):
        alone = read(rows, 8, epoch, homogeneous=homogeneous)
        size = 8 // processes // accumulation
        shares = [read(rows, size, epoch, process_index=i, **options) for i in range(processes)]
        # A process's batches of one step, one after the other.
        shares = [[flat(share[i : i + accumulation]) for i in range(0, len(share), accumulation)] for share in shares]
        assert [flat(batches) for batches in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("homogeneous", [True, False])
def test_deterministic_in_seed_and_epoch(homogeneous):
    rows = mixture()
    first = read(rows, homogeneous=homogeneous)
    sampler = sampler_of(rows, homogeneous=homogeneous)
    assert list(sampler) == list(sampler)  # reading changes nothing
    assert read(rows, homogeneous=homogeneous) == first
    for other in ({"epoch": 1}, {"seed": 12}):
        batches = read(rows, homogeneous=homogeneous, **other)
        assert len({frozenset(batch) for batch in batches} & {frozenset(batch) for batch in first}) < 4


def test_weights():
    rows = mixture([40, 40, 10, 37], weights=[1.0, 0.25, 3.0, 1.6])
    sampler = sampler_of(rows)
    assert sampler.left_out == {"0": 0, "1": 2, "2": 2, "3": 3}
    counts = Counter()
    for epoch in range(5):
        batches = read(rows, epoch=epoch)
        assert all(len(set(batch)) == 4 for batch in batches)  # also where a pass ends within a batch
        assert Counter(batch[0][0] for batch in batches) == {0: 10, 1: 2, 2: 7, 3: 14}
        taken = Counter(flat(batches))
        assert set(Counter({row: n for row, n in taken.items() if row[0] < 2}).values()) == {1}
        assert all(n in (2, 3) for row, n in taken.items() if row[0] == 2)
        assert all(n in (1, 2) for row, n in taken.items() if row[0] == 3)
        counts.update(taken)
        # No row comes again before all others have come.
        for dataset, size in enumerate(rows.sizes):
            own = [counts[dataset, row] for row in range(size)]
            assert max(own) - min(own) <= 1
    assert all(counts[1, row] == 1 for row in range(40))


def test_mixed():
    rows = mixture([23, 10, 37, 2], weights=[1.0, 2.0, 0.5, 1.0])  # one smaller than a batch
    total = 23 + 20 + 18 + 2
    lost = set()
    for epoch in range(20):
        sampler = sampler_of(rows, epoch=epoch, homogeneous=False)
        assert len(sampler) == total // 4 and sampler.left_out == {"mixture": total % 4}
        batches = read(rows, epoch=epoch, homogeneous=False)
        taken = Counter(flat(batches))
        assert sum(taken.values()) == total // 4 * 4
        assert all(n <= (2 if row[0] == 1 else 1) for row, n in taken.items())
        assert sum(len({dataset for dataset, _ in batch}) > 1 for batch in batches) > len(batches) / 2
        lost |= {(0, row) for row in range(23)} - set(taken)
    assert len(lost) > 5


def test_errors():
    with pytest.raises(ValueError, match=r"data set 1 has 10 of its 10 rows an epoch, .* batch of 12 \(3 x 4\): make"):
        sampler_of(mixture(), num_processes=3)
    with pytest.raises(ValueError, match="The data set 2 has 1 of its 37 rows an epoch"):
        sampler_of(mixture(weights=[1.0, 1.0, 0.02, 1.0]))
    # Repeating rows would put one into a batch twice.
    with pytest.raises(ValueError, match="The data set 0 has 9 of its 3 rows an epoch, which do not fill"):
        sampler_of(mixture([3, 8], weights=[3.0, 1.0]))
    with pytest.raises(ValueError, match="The mixture has 5 rows an epoch, which do not fill a global batch of 8"):
        sampler_of(mixture([2, 3]), batch_size=8, homogeneous=False)


@needs_golden
@pytest.mark.parametrize("size", [8, 6])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_it_shares_with_the_research_sampler(size, processes):
    """As many batches of each data set, one data set in each, nothing twice, as clustered; the order is our own."""
    golden = read_json(golden_case("data_samplers") / "expected.json")
    sizes = golden["each_data_sizes"]
    starts = np.cumsum([0, *sizes])
    clusters = [np.empty(n, int) for n in sizes]
    for ids, info in zip(clusters, golden["cluster_info"], strict=True):
        for cluster, rows in info:
            ids[rows] = cluster
    (case,) = (
        case
        for case in golden["expected"]
        if (case["sampler"], case["seed"], case["drop_last"], case["shuffle"])
        == ("ClusteringDataSampler", 777, True, True)
        and (case["num_replicas"], case["global_batch_size"]) == (processes, size)
    )
    # There the processes take turns in a batch, here each takes a slice.
    research = np.array(case["per_rank"]).T.reshape(-1, size)
    research = [[(int(np.searchsorted(starts, i, side="right")) - 1, i) for i in batch] for batch in research]
    research = [[(dataset, i - starts[dataset]) for dataset, i in batch] for batch in research]
    # Data set 3 has three rows: there it is silently never read, here it must be left out of the mixture.
    kept = [0, 1, 2, 4]
    rows = Rows([sizes[i] for i in kept], [clusters[i] for i in kept], [DataSource(f"{i}.jsonl") for i in kept])
    shares = [read(rows, size // processes, num_processes=processes, process_index=i) for i in range(processes)]
    ours = [[(kept[d], row) for d, row in flat(batches)] for batches in zip(*shares, strict=True)]
    for batches in (ours, research):
        assert all(len({dataset for dataset, _ in batch}) == 1 for batch in batches)
        assert Counter(flat(batches)).most_common(1)[0][1] == 1
        for dataset in kept:
            own = [[row for _, row in batch] for batch in batches if batch[0][0] == dataset]
            assert len(own) == sizes[dataset] // size
            assert_cluster_by_cluster(own, clusters[dataset], sizes[dataset])
    # Only ours has another order, and leaves out other rows, in the next epoch.
    again = read(rows, size, epoch=1)
    assert set(flat(read(rows, size))) != set(flat(again))
