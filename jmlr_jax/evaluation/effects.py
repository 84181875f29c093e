"""What retrieval does to answers: whom it helps and harms, its ceiling and floor, and whether scores know it.

Everything is read from rows of ``questions.jsonl``, of one seed or several. A measure is ``n mean low high``: questions
of all seeds, the mean over seeds, and its interval over seeds and questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmlr_jax.evaluation.answers import first_equal
from jmlr_jax.evaluation.intervals import Interval, Sample, Values, resampled, seeds_interval

Row = Mapping[str, Any]
Measure = dict[str, float]
CELLS = 4_000_000  # of resamples and passages that are weighed at once


@dataclass(frozen=True)
class SeedRows:
    """Rows of one arm and seed; `world` is equal for seeds that were asked the same questions."""

    rows: Sequence[Row]
    world: object = None


def measure(
    seeds: Sequence[SeedRows], value: Callable[[Row], float | None], resamples: int, seed: int = 0
) -> Measure | None:
    """The measure of a value of rows; rows without one (None) are left out, and None is returned where all are."""
    samples = []
    for one in seeds:
        known = [(x, row["group"]) for row in one.rows if (x := value(row)) is not None]
        if known:
            samples.append(Sample([float(x) for x, _ in known], [group for _, group in known], one.world))
    if not samples:
        return None
    interval = seeds_interval(samples, seed=seed, resamples=resamples)
    return {"n": sum(len(np.asarray(sample.values)) for sample in samples), **interval._asdict()}


def probed(seeds: Sequence[SeedRows], resamples: int, seed: int = 0) -> dict[str, Any]:
    """What the probes of an evaluation (:mod:`jmlr_jax.evaluation.probes`) found; what was not asked for is left out.

    ``conditions``: name -> accuracy after those passages. ``orders``: ``accuracy``, over all cyclic orders of the
    options, and ``moved``, the share of questions whose answer is not the same in all of them. ``passages``: see
    :func:`passages`.
    """
    found: dict[str, Any] = {}
    names = dict.fromkeys(name for one in seeds for row in one.rows for name in row.get("conditions", ()))

    def after(name: str, row: Row) -> float | None:
        condition = row.get("conditions", {}).get(name)
        return None if condition is None else condition["correct"]

    means = {name: measure(seeds, partial(after, name), resamples, seed) for name in names}
    if known := {name: mean for name, mean in means.items() if mean is not None}:
        found["conditions"] = known
    accuracy = measure(seeds, lambda row: _over_orders(row)[0], resamples, seed)
    moved = measure(seeds, lambda row: _over_orders(row)[1], resamples, seed)
    if accuracy is not None:
        found["orders"] = {"accuracy": accuracy, "moved": moved}
    if any(row.get("judged") for one in seeds for row in one.rows):
        found["passages"] = passages(seeds, resamples, seed)
    return found


def _over_orders(row: Row) -> tuple[float | None, float | None]:
    """Share of the orders in which the answer is right, and whether it moves."""
    chosen = [option for option in row.get("orders", ()) if option is not None]
    if not chosen:
        return None, None
    first = first_equal(row["option_texts"])
    right = [first[option] == first[row["answer"]] for option in chosen]
    return float(np.mean(right)), float(len({first[option] for option in chosen}) > 1)


def passages(seeds: Sequence[SeedRows], resamples: int, seed: int = 0) -> dict[str, Any]:
    """Whether single passages help: the right answer's loss after the passage alone is below that without any.

    ``helpful``: share of the passages read. ``auc``: area under the curve of the score predicting that a passage helps,
    over the passages of all questions together (0.5 is chance), and ``auc_within``, the same among the passages of one
    question, a mean over those that have both kinds. Each of them ``after`` training and, where the retriever was
    trained, ``before``: scores of the first retriever for the very same passages.
    """

    def helpful(row: Row) -> float | None:
        read = [one["nll"] < row["nll_none"] for one in row.get("judged", ()) if one["read"]]
        return float(np.mean(read)) if read else None

    found: dict[str, Any] = {"helpful": measure(seeds, helpful, resamples, seed)}
    for kind, area in (("auc", _auc), ("auc_within", _auc_within)):
        times = {
            when: area(seeds, key, resamples, seed) for when, key in (("before", "score_before"), ("after", "score"))
        }
        found[kind] = {when: one for when, one in times.items() if one is not None}
    return found


def _scored(row: Row, key: str) -> tuple[Values, NDArray[np.bool_]]:
    """Scores of a question's passages that have one, and which of the passages help."""
    known = [one for one in row.get("judged", ()) if one.get(key) is not None]
    scores = np.array([one[key] for one in known], np.float64)
    return scores, np.array([one["nll"] < row["nll_none"] for one in known], bool)


def _auc_within(seeds: Sequence[SeedRows], key: str, resamples: int, seed: int) -> Measure | None:
    def within(row: Row) -> float | None:
        scores, helps = _scored(row, key)
        area = weighted_auc(scores, helps, np.ones((1, len(scores))))[0] if len(scores) else np.nan
        return None if np.isnan(area) else float(area)

    return measure(seeds, within, resamples, seed)


def _auc(seeds: Sequence[SeedRows], key: str, resamples: int, seed: int) -> Measure | None:
    samples, scores = [], []
    for one in seeds:
        parts = [(*_scored(row, key), row["group"]) for row in one.rows]
        helps = np.concatenate([part[1] for part in parts])
        if helps.any() and not helps.all():
            scores.append(np.concatenate([part[0] for part in parts]))
            groups = [group for values, _, group in parts for _ in values]
            samples.append(Sample(helps.astype(np.float64), groups, one.world))
    if not samples:
        return None

    def areas(place: int, cluster_n: NDArray[np.int64], counts_RxG: NDArray[np.int64]) -> Values:
        helps, rows = np.asarray(samples[place].values) > 0, max(1, CELLS // len(cluster_n))
        pieces = [counts_RxG[first : first + rows] for first in range(0, len(counts_RxG), rows)]
        return np.concatenate([weighted_auc(scores[place], helps, piece[:, cluster_n]) for piece in pieces])

    every = [
        weighted_auc(values, np.asarray(sample.values) > 0, np.ones((1, len(values))))[0]
        for sample, values in zip(samples, scores, strict=True)
    ]
    low, high = np.nanquantile(resampled(samples, areas, seed, resamples), [0.025, 0.975])
    interval = Interval(float(np.mean(every)), float(low), float(high))
    return {"n": sum(map(len, scores)), **interval._asdict()}


def weighted_auc(score_n: Values, helps_n: NDArray[np.bool_], weight_Rxn: NDArray[Any]) -> Values:
    """Area under the ROC curve for each row of weights: how often a passage that helps scores above one that does not,
    equal scores counting half. NaN where only one kind has weight.

    >>> helps = np.array([True, False, True, False])
    >>> weighted_auc(np.array([3.0, 1, 2, 2]), helps, np.array([[1, 1, 1, 1], [0, 1, 1, 0]]))
    array([0.875, 1.   ])
    """
    order = np.argsort(score_n, kind="stable")
    starts = np.flatnonzero(np.diff(score_n[order], prepend=-np.inf))
    weights = weight_Rxn[:, order].astype(np.float64)
    good, bad = (np.add.reduceat(weights * side, starts, axis=1) for side in (helps_n[order], ~helps_n[order]))
    above = np.cumsum(bad, axis=1) - bad / 2
    with np.errstate(invalid="ignore"):
        area: Values = (good * above).sum(1) / (good.sum(1) * bad.sum(1))
    return area


def against(arm: Sequence[SeedRows], closed: Sequence[SeedRows], resamples: int) -> dict[str, Any] | None:
    """An arm beside the closed book on the same questions: shares of all that both answered.

    ``helped`` (right where the closed book is wrong), ``harmed`` (the other way round), ``unchanged_right``,
    ``unchanged_wrong``, ``oracle`` (right by either). None without a question in common.
    """
    pairs = []
    for one, other in zip(arm, closed, strict=True):
        bare = {row["id"]: row for row in other.rows}
        both = [{**row, "closed": bare[row["id"]]["correct"]} for row in one.rows if row["id"] in bare]
        pairs.append(SeedRows(both, one.world))
    kinds: dict[str, Callable[[bool, bool], bool]] = {
        "helped": lambda with_, without: with_ and not without,
        "harmed": lambda with_, without: without and not with_,
        "unchanged_right": lambda with_, without: with_ and without,
        "unchanged_wrong": lambda with_, without: not with_ and not without,
        "oracle": lambda with_, without: with_ or without,
    }

    def share(kind: str) -> Measure | None:
        return measure(pairs, lambda row: float(kinds[kind](row["correct"], row["closed"])), resamples)

    found = {kind: share(kind) for kind in kinds}
    return None if found["helped"] is None else found
