"""How far an answer is to be trusted: probabilities of the options, how well they hold, and when to abstain.

The probability of an option is ``softmax(-nll / T)`` over the options of its question, nll in nats per token, so that
the likeliest option is the one that counts as the answer. The temperature T and the threshold below which no answer is
given are chosen on dev questions and used on others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jmlr_jax.evaluation.answers import first_equal

Values = NDArray[np.float64]
BINS = 10
LOG_T = (-5.0, 5.0)  # of the temperatures that are tried
TRIED, ROUNDS = 41, 4


class Options(NamedTuple):
    """Options of the multiple-choice questions among some rows, those of a question that say the same being one.

    Attributes:
      nll_NxO: inf where a question has fewer options.
      right_N: place of the right option.
    """

    nll_NxO: Values
    right_N: NDArray[np.int64]


class Sure(NamedTuple):
    """What was answered: its probability, and whether it was right."""

    confidence_N: Values
    correct_N: NDArray[np.bool_]


def options_of(rows: Sequence[Mapping[str, Any]]) -> Options:
    """Losses of the options; rows without any are left out."""
    losses, right = [], []
    for row in rows:
        if not row["options"]:
            continue
        first = first_equal(row["option_texts"])
        kept = list(dict.fromkeys(first))
        losses.append([min(x for x, f in zip(row["option_nll"], first, strict=True) if f == each) for each in kept])
        right.append(kept.index(first[row["answer"]]))
    nll_NxO = np.full((len(losses), max(map(len, losses), default=1)), np.inf)
    for i, row_O in enumerate(losses):
        nll_NxO[i, : len(row_O)] = row_O
    return Options(nll_NxO, np.array(right, np.int64))


def probabilities(options: Options, temperature: float = 1.0) -> Values:
    """``p_NxO`` of the options at a temperature; 0 where there is none."""
    z_NxO = -(options.nll_NxO - options.nll_NxO.min(axis=1, keepdims=True)) / temperature
    p_NxO: Values = np.exp(z_NxO)
    return p_NxO / p_NxO.sum(axis=1, keepdims=True)


def fit_temperature(options: Options) -> float:
    """The temperature with the lowest Brier score, the squared distance of probabilities from what was right.

    Not with the highest likelihood: of a reader that is now and then very sure and wrong, a few such answers would
    decide it, and leave all others less sure than they deserve.

    Raises:
      ValueError: no questions.
    """
    if not len(options.right_N):
        raise ValueError("a temperature is fitted on questions with options; there are none")

    def score(log_t: float) -> float:
        p_NxO = probabilities(options, np.exp(log_t))
        p_NxO[np.arange(len(p_NxO)), options.right_N] -= 1
        return float((p_NxO**2).sum(axis=1).mean())

    low, high = LOG_T
    for _ in range(ROUNDS):  # a grid, then finer ones around the best of it: the score may have several valleys
        tried = np.linspace(low, high, TRIED)
        best = int(np.argmin([score(log_t) for log_t in tried]))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, TRIED - 1)]
    return float(np.exp(tried[best]))


def sureness(options: Options, temperature: float = 1.0) -> Sure:
    """Probability of each answer and whether it is right."""
    p_NxO = probabilities(options, temperature)
    return Sure(p_NxO.max(axis=1), options.nll_NxO.argmin(axis=1) == options.right_N)


def reliability(sure: Sure) -> list[dict[str, float]]:
    """Answers by probability, in ten bins of equal width, empty ones left out: ``n``, mean ``confidence``,
    ``accuracy``."""
    place_N = np.minimum((sure.confidence_N * BINS).astype(int), BINS - 1)
    bins = [(int(hits.sum()), hits) for b in range(BINS) if (hits := place_N == b).any()]
    return [
        {"n": n, "confidence": float(sure.confidence_N[hits].mean()), "accuracy": float(sure.correct_N[hits].mean())}
        for n, hits in bins
    ]


def calibration_error(sure: Sure) -> float:
    """Expected calibration error: the mean over answers of how far their bin's accuracy lies from its probability.

    >>> calibration_error(Sure(np.array([0.9, 0.9, 0.2, 0.2]), np.array([True, False, False, False])))
    0.3
    """
    gaps = [(one["n"], abs(one["confidence"] - one["accuracy"])) for one in reliability(sure)]
    return round(sum(n * gap for n, gap in gaps) / len(sure.confidence_N), 12)


def risk_coverage(sure: Sure) -> tuple[Values, Values]:
    """``(coverage_N, risk_N)``: share of answers given and share of these that are wrong, the surest answers first.

    Answers that are equally sure stand or fall together; between them the curve is a straight count of errors.

    >>> [x.tolist() for x in risk_coverage(Sure(np.array([0.5, 0.9]), np.array([False, True])))]
    [[0.5, 1.0], [0.0, 0.5]]
    """
    level, place_N = np.unique(-sure.confidence_N, return_inverse=True)
    sizes = np.bincount(place_N, minlength=len(level))
    wrong = np.bincount(place_N, ~sure.correct_N, len(level)) / sizes
    given = np.arange(1, len(place_N) + 1)
    return given / len(place_N), np.cumsum(np.repeat(wrong, sizes)) / given


def threshold(sure: Sure, most: float) -> float | None:
    """The lowest probability from which on at most so large a share of the answers is wrong; None if there is none.

    >>> threshold(Sure(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True])), 0.25)
    0.6
    """
    order = np.argsort(-sure.confidence_N, kind="stable")
    confidence = sure.confidence_N[order]
    risk = np.cumsum(~sure.correct_N[order]) / np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence) != 0, True)  # of the answers that are equally sure
    good = np.flatnonzero(last & (risk <= most))
    return float(confidence[good[-1]]) if len(good) else None
