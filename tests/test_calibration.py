"""Temperatures, calibration error and risk over coverage, against known answers and plain loops."""

import doctest

import numpy as np
import pytest

from jmlr_jax.evaluation import calibration
from jmlr_jax.evaluation.calibration import (
    Options,
    Sure,
    calibration_error,
    fit_temperature,
    options_of,
    probabilities,
    reliability,
    risk_coverage,
    sureness,
    threshold,
)


def test_doctests():
    result = doctest.testmod(calibration)
    assert result.attempted >= 3 and result.failed == 0


def drawn(temperature, n=4000, seed=0):
    """Options whose right one is drawn from the softmax at that temperature."""
    rng = np.random.default_rng(seed)
    nll = rng.normal(0, 2, (n, 4))
    nll[: n // 2, 3] = np.inf  # half of the questions have three options
    options = Options(nll, np.zeros(n, np.int64))
    p = probabilities(options, temperature)
    return Options(nll, np.array([rng.choice(4, p=row) for row in p]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_answers_is_found_and_calibrates(temperature):
    options = drawn(temperature)
    fitted = fit_temperature(options)
    assert fitted == pytest.approx(temperature, rel=0.1)
    other = drawn(temperature, seed=1)
    assert calibration_error(sureness(other, fitted)) < 0.03
    assert calibration_error(sureness(other, temperature * 4)) > 0.08


def test_a_few_answers_that_are_sure_and_wrong_do_not_decide():
    """Nine of ten options are drawn at temperature 1; the tenth is wrong by far, whatever the temperature."""
    options = drawn(1.0)
    nll, right = options.nll_NxO.copy(), options.right_N.copy()
    nll[::10, 0], right[::10] = nll[::10].min(axis=1) - 30, 1
    assert fit_temperature(Options(nll, right)) < 1.6


def test_a_temperature_changes_no_answer():
    options = drawn(1.0)
    one, other = sureness(options, 0.3), sureness(options, 5.0)
    assert (one.correct_N == other.correct_N).all() and (one.confidence_N >= other.confidence_N).all()
    assert (probabilities(options)[:2000, 3] == 0).all()
    with pytest.raises(ValueError, match="there are none"):
        fit_temperature(Options(np.zeros((0, 1)), np.zeros(0, np.int64)))


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(2)
    confidence = rng.random(300)
    sure = Sure(confidence, rng.random(300) < confidence**2)
    total = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if b / 10 <= c < (b + 1) / 10]
        total += abs(sum(confidence[i] - sure.correct_N[i] for i in inside))
    assert calibration_error(sure) == pytest.approx(total / 300)
    assert sum(one["n"] for one in reliability(sure)) == 300
    assert calibration_error(Sure(np.ones(3), np.ones(3, bool))) == 0


def test_risk_over_coverage_equals_a_loop():
    rng = np.random.default_rng(3)
    confidence = rng.permutation(50) / 50
    correct = rng.random(50) < confidence
    coverage, risk = risk_coverage(Sure(confidence, correct))
    order = sorted(range(50), key=lambda i: -confidence[i])
    for k in range(1, 51):
        assert coverage[k - 1] == pytest.approx(k / 50)
        assert risk[k - 1] == pytest.approx(np.mean([not correct[i] for i in order[:k]]))
    # Which of equally sure answers comes first decides nothing.
    same = Sure(np.full(4, 0.5), np.array([True, True, False, False]))
    assert risk_coverage(same)[1].tolist() == [0.5] * 4


def test_the_threshold_keeps_the_risk():
    rng = np.random.default_rng(4)
    confidence = np.round(rng.random(500), 2)  # with ties
    sure = Sure(confidence, rng.random(500) < confidence)
    for most in (0.05, 0.2, 0.4):
        least = threshold(sure, most)
        given = confidence >= least
        assert (~sure.correct_N[given]).mean() <= most
        lower = [c for c in np.unique(confidence) if c < least]
        assert all((~sure.correct_N[confidence >= c]).mean() > most for c in lower)
    assert threshold(Sure(np.array([0.9, 0.9]), np.array([True, False])), 0.2) is None


def test_options_that_say_the_same_are_one():
    rows = [
        {"options": 3, "option_texts": ["x", "y", "X."], "option_nll": [2.0, 1.0, 0.5], "answer": 0},
        {"options": 0, "option_texts": [], "option_nll": [], "answer": -1},
        {"options": 2, "option_texts": ["y", "x"], "option_nll": [1.0, 3.0], "answer": 1},
    ]
    options = options_of(rows)
    assert options.nll_NxO.tolist() == [[0.5, 1.0], [1.0, 3.0]] and options.right_N.tolist() == [0, 1]
    assert sureness(options).correct_N.tolist() == [True, False]
