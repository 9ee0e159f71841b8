"""
Confidence intervals of scores and of differences between two models, by the bootstrap.

`bootstrap` in three steps: (1) decide for each language what is resampled: the examples, where they are known for all
of its tasks, else the tasks, where there are enough, else nothing, (2) draw so many examples, or tasks, as there are,
with replacement, and score what was drawn, a thousand times, (3) take the percentiles. Sets of the same size are drawn
alike: both models of a comparison see the same examples, and the translations of one set stay together.

Symbols: R resamples, N examples of a set.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from mteb.results import TaskResult
from scipy.stats import norm, t
from tqdm.auto import tqdm

from .results import Entry, changed_tasks, entries


logger = logging.getLogger(__name__)

Unit = Literal["examples", "tasks"]
Key = tuple[str, str, str]  # task, split, subset

AVERAGE = "average"
CONFIDENCE = 0.95
# The widest interval that a resample of N values can give reaches from the least to the greatest, and misses a
# symmetric distribution's center in 2 of 2**N cases: with 5 in 6 %, with 3 in 25 %.
MIN_UNITS = 5
CHUNK_ELEMENTS = 250_000  # of a matrix of counts, which then stays in a CPU's cache: half the time


class Examples(Protocol):
    """The examples of one set: their score when each is counted so often."""

    size: int

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Scores (R,) of counts (R, N)."""


@dataclass(frozen=True)
class Mean:
    """A score that is the mean of the examples' own scores `values` (N,): nDCG, MAP, recall, accuracy."""

    values: np.ndarray

    @property
    def size(self) -> int:
        return len(self.values)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        return counts @ self.values / self.size


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of `predicted` (N,) with `gold` (N,)."""

    predicted: np.ndarray
    gold: np.ndarray

    @property
    def size(self) -> int:
        return len(self.gold)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        middle = (self.size + 1) / 2  # the mean of all ranks
        one, other = (_ranks(values, counts) - middle for values in (self.predicted, self.gold))
        weighted = counts * one
        spread = np.sqrt(_row_dot(weighted, one) * _row_dot(counts, other**2))
        # A resample of equal values has no correlation; in sets of a useful size it does not occur.
        return _row_dot(weighted, other) / np.where(spread > 0, spread, np.inf)


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision of `labels` (N,) of 0 and 1 by `similarities` (S, N), the largest of S ways to compare."""

    similarities: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        return len(self.labels)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        return np.max([self._score(values, counts) for values in self.similarities], axis=0)

    def _score(self, similarities: np.ndarray, counts: np.ndarray) -> np.ndarray:
        order, starts, _ = _groups(-similarities)
        drawn = np.add.reduceat(counts[:, order], starts, axis=1)
        positive = np.add.reduceat((counts * self.labels)[:, order], starts, axis=1)
        precision = positive.cumsum(1) / np.maximum(drawn.cumsum(1), 1)
        return (precision * positive).sum(1) / np.maximum(positive.sum(1), 1)


@dataclass(frozen=True)
class _Difference:
    """What two models differ by on the same examples."""

    one: Examples
    other: Examples

    @property
    def size(self) -> int:
        return self.one.size

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        return self.one(counts) - self.other(counts)


class Interval(NamedTuple):
    """
    An estimate with its 95 % confidence interval.

    `unit` is what was resampled, and `size` how many of it there are. Without a unit there is no interval: `low` and
    `high` are NaN.
    """

    estimate: float
    low: float
    high: float
    unit: Unit | None
    size: int
    tasks: int

    def __str__(self) -> str:
        if self.unit is None:
            return f"nothing: too few ({_count(self.tasks, 'task')})"
        basis = "" if self.unit == "tasks" else f" of {_count(self.tasks, 'task')}"
        return f"{self.size:,} {self.unit}{basis}"

    def _between(self, draws: np.ndarray, size: int) -> "Interval":
        """With the percentiles of draws (R,), further out for few units (Hesterberg 2015, arXiv 1411.5279, 4.1)."""
        level = norm.cdf(np.sqrt(size / (size - 1)) * t.ppf((1 - CONFIDENCE) / 2, size - 1))
        low, high = np.quantile(draws, (level, 1 - level))
        return self._replace(low=float(low), high=float(high))


class Comparison(NamedTuple):
    """Two models on one language: their scores, and `difference`, the first minus the second."""

    first: float
    second: float
    difference: Interval

    @property
    def verdict(self) -> Literal["first", "second", "within noise"] | None:
        """The better model, where the interval of the difference is on one side of 0; None without an interval."""
        if self.difference.unit is None:
            return None
        if self.difference.low > 0:
            return "first"
        return "second" if self.difference.high < 0 else "within noise"


def compare_results(
    first: Sequence[TaskResult],
    second: Sequence[TaskResult],
    examples: tuple[Mapping[Key, Examples], Mapping[Key, Examples]] | None = None,
    *,
    unit: Unit | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """
    Compare two models on what both were evaluated on, with the same resamples for both.

    Args:
        first, second (sequence of `TaskResult`):
            The evaluations of the two models.
        examples (pair of mappings, *optional*):
            The examples of each of them.
        unit, resamples, seed (*optional*):
            As in [`bootstrap`].

    Returns:
        A comparison for each language, and for `"average"` as in [`bootstrap`].

    Raises:
        `ValueError`: the two have no task, split and subset in common.
    """
    one, other = ({entry[:3]: entry for result in side for entry in entries(result)} for side in (first, second))
    changed = changed_tasks([*first, *second])
    common = [key for key in one if key in other and key[0] not in changed]
    if not common:
        tasks = [", ".join(sorted({key[0] for key in side})) or "none" for side in (one, other)]
        raise ValueError(f"The evaluations have no task in common. The first has {tasks[0]}; the second {tasks[1]}.")
    left_out = sorted({key[0] for key in one.keys() ^ other.keys()})
    if left_out:
        logger.warning(f"Left out what only one of the two was evaluated on: {', '.join(left_out)}.")

    paired = {}
    for key in common:
        pair = [side[key] for side in examples or () if key in side]
        if len(pair) == 2 and pair[0].size == pair[1].size:
            paired[key] = _Difference(*pair)
        elif len(pair) == 2:
            logger.warning(f"{' '.join(key)}: {pair[0].size:,} and {pair[1].size:,} examples, which are no pairs.")
    if unit == "examples":
        common = [key for key in common if key in paired]
    differences = [one[key]._replace(score=one[key].score - other[key].score) for key in common]
    intervals = bootstrap(differences, paired, unit=unit, resamples=resamples, seed=seed)
    means = [_means([side[key] for key in common]) for side in (one, other)]
    return {
        language: Comparison(means[0][language], means[1][language], found) for language, found in intervals.items()
    }


def bootstrap(
    rows: Sequence[Entry],
    examples: Mapping[Key, Examples],
    *,
    unit: Unit | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """
    The score of each language, the mean over its tasks, with its interval.

    Args:
        rows (sequence of `Entry`):
            What was evaluated, from [`entries`]; or differences of two models as their scores.
        examples (mapping):
            The examples of (task, split, subset), from [`load_examples`], as far as they are known.
        unit (`str`, *optional*):
            `"examples"` or `"tasks"`. With `"examples"` tasks without known examples are left out. By default
            examples for a language with the examples of all its tasks, else tasks.
        resamples (`int`, *optional*, defaults to 1000), seed (`int`, *optional*, defaults to 0):
            How many resamples, and their random numbers.

    Returns:
        An interval for each language. Where every language is resampled by examples also one for `"average"`, the
        mean over languages.
    """
    if unit is not None and unit not in get_args(Unit):
        raise ValueError(f"unit={unit!r} is not one of {', '.join(map(repr, get_args(Unit)))}.")
    if resamples < 100:
        raise ValueError(f"resamples={resamples} is too few for percentiles: give 100 or more.")
    if unit == "examples":
        rows = [row for row in rows if row[:3] in examples]
        if not rows:
            raise ValueError("The examples of no task are known: evaluate with predictions, or resample tasks.")
    by_language = _by_language(rows)
    exemplified = {
        language
        for language, tasks in by_language.items()
        if unit != "tasks"
        and all(row[:3] in examples and examples[row[:3]].size >= MIN_UNITS for row in chain(*tasks.values()))
    }
    used = {row[:3]: examples[row[:3]] for row in rows if row.language in exemplified}
    drawn = _resample(used, resamples, seed)

    intervals, draws = {}, {}
    for language, tasks in by_language.items():
        scores = np.array([np.mean([row.score for row in group]) for group in tasks.values()])
        interval = Interval(float(scores.mean()), np.nan, np.nan, None, 0, len(tasks))
        if language in exemplified:
            # As the score itself: the mean over tasks of the mean over a task's subsets.
            draws[language] = np.mean([np.mean([drawn[row[:3]] for row in group], 0) for group in tasks.values()], 0)
            sizes = [used[row[:3]].size for row in chain(*tasks.values())]
            interval = interval._between(draws[language], min(sizes))._replace(unit="examples", size=sum(sizes))
        elif unit != "examples" and len(tasks) >= MIN_UNITS:
            means = _resample({"tasks": Mean(scores)}, resamples, seed)["tasks"]
            interval = interval._between(means, len(tasks))._replace(unit="tasks", size=len(tasks))
        intervals[language] = interval
    if len(intervals) > 1 and len(draws) == len(intervals):
        estimate = float(np.mean([interval.estimate for interval in intervals.values()]))
        size, tasks = sum(examples.size for examples in used.values()), len({row.task for row in rows})
        average = Interval(estimate, np.nan, np.nan, "examples", size, tasks)
        smallest = min(examples.size for examples in used.values())
        intervals[AVERAGE] = average._between(np.mean(list(draws.values()), 0), smallest)
    return intervals


def _resample(sets: Mapping, resamples: int, seed: int) -> dict:
    """The scores (R,) of every set in all resamples."""
    by_size = defaultdict(list)
    for key, examples in sets.items():
        by_size[examples.size].append(key)
    scores = {}
    with tqdm(total=len(sets), desc="Resampling", unit="set", delay=2) as progress:
        for size, keys in by_size.items():
            parts = defaultdict(list)
            for counts in _counts(size, resamples, seed):
                for key in keys:
                    parts[key].append(sets[key](counts))
            scores |= {key: np.concatenate(parts[key]) for key in keys}
            progress.update(len(keys))
    return scores


def _counts(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of N examples is drawn in each resample, (R, N) in chunks; the same for every set of N."""
    generator = np.random.default_rng([seed, size])
    step = max(1, CHUNK_ELEMENTS // size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(float)


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of values (N,): their order, where in it each group of equal ones starts, and the group of each."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return np.argsort(group, kind="stable"), np.cumsum(sizes) - sizes, group


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranks (R, N) of values (N,) when each is counted so often; equal ones share the middle of their ranks."""
    order, starts, group = _groups(values)
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)  # (R, groups)
    return (drawn.cumsum(1) - (drawn - 1) / 2)[:, group]


def _row_dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.einsum("rn,rn->r", one, other)


def _by_language(rows: Iterable[Entry]) -> dict[str, dict[str, list[Entry]]]:
    by_language = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_language[row.language][row.task].append(row)
    return by_language


def _means(rows: Iterable[Entry]) -> dict[str, float]:
    """The score of each language, and their average."""
    means = {
        language: float(np.mean([np.mean([row.score for row in group]) for group in tasks.values()]))
        for language, tasks in _by_language(rows).items()
    }
    return means | {AVERAGE: float(np.mean(list(means.values())))}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
