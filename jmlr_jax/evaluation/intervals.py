"""How far a mean is to be trusted: bootstrap intervals over questions, and over seeds and questions both.

Questions about one thing are drawn together (clusters). Of several seeds, seeds are drawn and within each its
clusters: those that were asked the same questions share the draw of clusters, those with questions of their own do not,
so that clusters of different worlds are never taken for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmlr_jax.seeds import derived

Values = NDArray[np.float64]
BLOCK = 2_000_000  # counts drawn at once, which bounds memory at about 16 MB whatever the number of questions


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a - b with its bootstrap interval and the two-sided p of 'no difference'."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Sample:
    """Values of one seed.

    Attributes:
      values: one for each question.
      groups: as many hashable labels; questions of one label are drawn together. None: each for itself.
      world: equal for seeds that were asked the same questions.

    Raises:
      ValueError: no values, a NaN among them, or as many labels as there are values missing.
    """

    values: ArrayLike
    groups: Sequence[object] | None = None
    world: object = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"expected a non-empty vector of values, got shape {values.shape}")
        if np.isnan(values).any():
            raise ValueError("values hold NaN: leave out the questions that have no value before bootstrapping")
        if self.groups is not None and len(self.groups) != len(values):
            raise ValueError(f"{len(self.groups)} group labels for {len(values)} values")


Statistic = Callable[[int, NDArray[np.int64], NDArray[np.int64]], Values]
"""``(seed's place, cluster_n of its values, counts_RxG of clusters)`` to the statistic of each of R resamples."""


def seeds_interval(samples: Sequence[Sample], *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean over seeds of each seed's mean, resampling seeds and their clusters.

    One seed is an ordinary cluster bootstrap. With few seeds the interval is wide rather than exact: noise of the
    questions is in the means of seeds as well as in the draw of clusters.

    Args:
      seed: of the resampling; the same seed gives the same interval.
      resamples: number of bootstrap samples.
      level: coverage.

    Raises:
      ValueError: no samples.
    """
    means = resampled(samples, _mean_of(samples), seed, resamples)
    return Interval(_mean(samples), *_quantiles(means, level))


def seeds_difference(
    differences: Sequence[Sample], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Difference:
    """The same for differences of two systems, question by question.

    p is twice the smaller share of resampled differences on either side of zero, with one added above and below so that
    it is never exactly 0; 1 when the two never differ.
    """
    means = resampled(differences, _mean_of(differences), seed, resamples)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(tail)) / (1 + resamples))
    return Difference(_mean(differences), *_quantiles(means, level), p)


def bootstrap_interval(
    values_n: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """:func:`seeds_interval` of a single seed: the cluster bootstrap of a mean.

    When all values are equal every resample is the same and the interval has width 0: it then says nothing about
    the chance of a rare other outcome.
    """
    return seeds_interval([Sample(values_n, groups)], seed=seed, resamples=resamples, level=level)


def strata_interval(strata: Sequence[Sample], *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean over strata (tasks of a benchmark) of each one's mean; every stratum is resampled by itself.

    Raises:
      ValueError: no strata.
    """
    draws = [
        resampled([one], _mean_of([one]), derived(seed, "stratum", place), resamples)
        for place, one in enumerate(strata)
    ]
    if not draws:
        raise ValueError("no strata to resample")
    return Interval(_mean(strata), *_quantiles(np.mean(draws, axis=0), level))


def paired_bootstrap(
    a_n: ArrayLike,
    b_n: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Difference:
    """:func:`seeds_difference` of two systems on the questions of a single seed.

    Raises:
      ValueError: the two do not have the same number of values.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_n, b_n))
    if len(a) != len(b):
        raise ValueError(f"paired comparison of {len(a)} with {len(b)} values")
    return seeds_difference([Sample(a - b, groups)], seed=seed, resamples=resamples, level=level)


def resampled(samples: Sequence[Sample], statistic: Statistic, seed: int, resamples: int) -> Values:
    """Means over drawn seeds of a statistic of their drawn clusters, one for each resample.

    Raises:
      ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples to resample")
    seeds_of: dict[object, list[int]] = {}
    for place, sample in enumerate(samples):
        seeds_of.setdefault(sample.world if sample.world is not None else (place, "own"), []).append(place)
    clusters, counts = _clusters(samples, seeds_of)
    rng, S = np.random.default_rng(seed), len(samples)
    block = max(1, BLOCK // (S * max(counts.values())))
    means = []
    for start in range(0, resamples, block):
        R = min(block, resamples - start)
        seed_RxS = rng.integers(S, size=(R, S)) if S > 1 else np.zeros((R, 1), np.int64)
        value_SxRxS = np.empty((S, R, S))  # of a seed, were it drawn into each place
        for world, places in seeds_of.items():
            G = counts[world]
            # Seeds of one world have its clusters in common; a seed with a world of its own has another draw each time.
            draws = rng.multinomial(G, np.full(G, 1 / G), R if len(places) > 1 else R * S)
            for place in places:
                value_SxRxS[place] = statistic(place, clusters[place], draws).reshape(R, -1)
        drawn_RxS = np.take_along_axis(value_SxRxS, seed_RxS[None], axis=0)[0]
        known_RxS = ~np.isnan(drawn_RxS)
        with np.errstate(invalid="ignore"):  # none of the drawn seeds has a value
            means.append(np.where(known_RxS, drawn_RxS, 0).sum(axis=1) / known_RxS.sum(axis=1))
    return np.concatenate(means)


def _clusters(
    samples: Sequence[Sample], seeds_of: dict[object, list[int]]
) -> tuple[dict[int, NDArray[np.int64]], dict[object, int]]:
    """Cluster of each value by place of the seed, numbered within its world, and how many clusters a world has."""
    clusters, counts = {}, {}
    for world, places in seeds_of.items():
        numbers: dict[object, int] = {}
        for place in places:
            groups = samples[place].groups
            labels = range(len(np.asarray(samples[place].values))) if groups is None else groups
            clusters[place] = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
        counts[world] = len(numbers)
    return clusters, counts


def _mean_of(samples: Sequence[Sample]) -> Statistic:
    def mean(place: int, cluster_n: NDArray[np.int64], counts_RxG: NDArray[np.int64]) -> Values:
        G = counts_RxG.shape[1]
        sums = np.bincount(cluster_n, np.asarray(samples[place].values, np.float64), G)
        sizes = np.bincount(cluster_n, minlength=G).astype(np.float64)
        with np.errstate(invalid="ignore"):  # none of the seed's own clusters was drawn
            found: Values = counts_RxG @ sums / (counts_RxG @ sizes)
        return found

    return mean


def _mean(samples: Sequence[Sample]) -> float:
    return float(np.mean([np.mean(np.asarray(sample.values, np.float64)) for sample in samples]))


def _quantiles(means: Values, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
