"""What retrieval does to answers, on rows that were counted by hand."""

import doctest

import numpy as np
import pytest

from jmlr_jax.evaluation import effects
from jmlr_jax.evaluation.effects import SeedRows, against, measure, passages, probed, weighted_auc

R = 200  # resamples


def test_doctests():
    result = doctest.testmod(effects)
    assert result.attempted >= 2 and result.failed == 0


def row(i, correct=True, **more):
    return {"id": f"q{i}", "group": f"g{i}", "correct": correct, "nll_none": 1.0, **more}


def test_helped_harmed_and_unchanged():
    # Of eight questions: 3 helped, 1 harmed, 2 right both times, 2 wrong both times.
    with_, without = [1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]
    arm = SeedRows([row(i, bool(x)) for i, x in enumerate(with_)] + [row(99)], "w")  # q99 is asked of one alone
    closed = SeedRows([row(i, bool(x)) for i, x in reversed(list(enumerate(without)))], "w")
    found = against([arm], [closed], R)
    means = {kind: one["mean"] for kind, one in found.items()}
    expected = {"helped": 3, "harmed": 1, "unchanged_right": 2, "unchanged_wrong": 2, "oracle": 6}
    assert means == {kind: n / 8 for kind, n in expected.items()}
    assert all(one["n"] == 8 and one["low"] <= one["mean"] <= one["high"] for one in found.values())
    assert against([SeedRows([row(1)])], [SeedRows([row(2)])], R) is None


def test_seeds_count_alike_and_their_worlds_stay_apart():
    seeds = [SeedRows([row(0), row(1)], "a"), SeedRows([row(0, False)] * 1, "b")]
    found = measure(seeds, lambda r: float(r["correct"]), R)
    assert (found["n"], found["mean"]) == (3, 0.5)
    assert measure(seeds, lambda r: None, R) is None


def test_orders_and_conditions():
    texts = ["x", "y", "X", "z"]
    rows = [
        row(0, option_texts=texts, answer=0, orders=[0, 2, 0, 0]),  # options 0 and 2 say the same: it never moves
        row(1, option_texts=texts, answer=1, orders=[1, 3, 1, None]),
        row(2, option_texts=[], answer=-1, orders=[]),
    ]
    found = probed([SeedRows(rows)], R)
    assert found["orders"]["accuracy"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["orders"]["moved"]["mean"] == 0.5 and found["orders"]["moved"]["n"] == 2
    assert set(found) == {"orders"}
    rows = [row(0, conditions={"gold": {"correct": True}, "random": None}), row(1, conditions={"gold": None})]
    found = probed([SeedRows(rows)], R)
    assert set(found["conditions"]) == {"gold"}  # of random passages nothing was measured
    assert found["conditions"]["gold"] == {"n": 1, "mean": 1.0, "low": 1.0, "high": 1.0}


def judged(*entries):
    return [{"nll": nll, "read": read, "score": s, "score_before": b} for nll, read, s, b in entries]


def test_single_passages():
    rows = [
        row(0, judged=judged((0.5, True, 3.0, 1.0), (1.5, True, 2.0, 2.0), (0.9, False, 1.0, 3.0))),
        row(1, judged=judged((2.0, True, 2.5, 0.5), (0.1, False, 4.0, 0.0))),
        row(2, judged=judged((0.2, True, 5.0, None))),
        row(3, judged=[]),
    ]
    found = passages([SeedRows(rows)], R)
    assert found["helpful"]["mean"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    # Together, after: helpful 3, 1, 4, 5 against 2, 2.5: six of eight pairs.
    assert found["auc"]["after"]["mean"] == pytest.approx(6 / 8) and found["auc"]["after"]["n"] == 6
    # Before, without the passage that has no score: helpful 1, 3, 0 against 2, 0.5: 1 > .5, 3 > 2, 3 > .5 of six.
    assert found["auc"]["before"]["mean"] == pytest.approx(3 / 6)
    # Within questions, after: 3 > 2 and 1 < 2 is a half; 4 > 2.5 is one.
    assert found["auc_within"]["after"]["mean"] == pytest.approx(0.75)
    assert found["auc_within"]["before"]["mean"] == pytest.approx((0.5 + 0) / 2)
    for one in (*found["auc"].values(), *found["auc_within"].values()):
        assert one["low"] <= one["mean"] <= one["high"]
    unscored = [row(0, judged=[{"nll": 0.5, "read": True, "score": None}])]
    assert passages([SeedRows(unscored)], R)["auc"] == {}


def test_weighted_area_equals_repeated_passages():
    rng = np.random.default_rng(0)
    score, helps, weight = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4, rng.integers(0, 3, (5, 30))
    for area, w in zip(weighted_auc(score, helps, weight), weight, strict=True):
        good, bad = (np.repeat(score[side], w[side]) for side in (helps, ~helps))
        assert area == pytest.approx(np.mean([(g > b) + (g == b) / 2 for g in good for b in bad]))
    assert np.isnan(weighted_auc(score, np.ones(30, bool), weight)).all()
