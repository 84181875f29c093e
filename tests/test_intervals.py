"""Bootstrap intervals: their coverage, and against loops over drawn groups and seeds."""

import numpy as np
import pytest

from jmlr_jax.evaluation.intervals import (
    Sample,
    bootstrap_interval,
    paired_bootstrap,
    seeds_difference,
    seeds_interval,
)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        interval = bootstrap_interval(rng.random(120) < 0.7, seed=i, resamples=400)
        covered += interval.low <= 0.7 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_cluster_interval_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(1)
    plain = cluster = 0
    groups = np.repeat(np.arange(40), 8)
    for i in range(100):
        values = np.repeat(rng.random(40) < 0.5, 8)  # the eight questions of a condition stand or fall together
        one = bootstrap_interval(values, seed=i, resamples=300)
        other = bootstrap_interval(values, groups=list(groups), seed=i, resamples=300)
        plain += one.low <= 0.5 <= one.high
        cluster += other.low <= 0.5 <= other.high
    assert plain < 70 and cluster >= 88


def test_interval_agrees_with_a_loop_over_groups():
    values, groups = np.array([0.0, 1, 1, 0, 1, 5]), ["x", "x", "y", "z", "z", "y"]
    members = {g: [v for v, h in zip(values, groups, strict=True) if h == g] for g in "xyz"}
    rng = np.random.default_rng(3)
    means = []
    for _ in range(20_000):
        drawn = [v for g in rng.choice(list("xyz"), 3) for v in members[g]]
        means.append(np.mean(drawn))
    interval = bootstrap_interval(values, groups=groups, resamples=20_000)
    assert interval.mean == pytest.approx(8 / 6)
    assert [interval.low, interval.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert interval == bootstrap_interval(values, groups=groups, resamples=20_000)
    narrow = bootstrap_interval(values, groups=groups, level=0.5)
    assert narrow.high - narrow.low < interval.high - interval.low


def test_paired_comparison_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    a, b = (hard < 0.56).astype(float), (hard < 0.5).astype(float)  # b is right only where a is
    difference = paired_bootstrap(a, b)
    assert difference.low > 0 and difference.p < 0.01
    assert difference.mean == pytest.approx((a - b).mean())
    assert bootstrap_interval(a).low < bootstrap_interval(b).high
    same = paired_bootstrap(a, a)
    assert same == (0, 0, 0, 1)
    assert paired_bootstrap(b, a).mean == -difference.mean


def test_p_is_about_uniform_when_nothing_differs():
    rng = np.random.default_rng(4)
    p = [paired_bootstrap(rng.normal(size=80), rng.normal(size=80), seed=i, resamples=300).p for i in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.11


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bootstrap_interval([]), "non-empty"),
        (lambda: bootstrap_interval([1.0, np.nan]), "NaN"),
        (lambda: bootstrap_interval([1.0, 0.0], groups=["a"]), "1 group labels for 2 values"),
        (lambda: paired_bootstrap([1.0, 0.0], [1.0]), "2 with 1 values"),
    ],
)
def test_bad_values_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_seeds_and_questions_are_drawn_by_a_loop():
    """Three seeds, two of one world: a loop that draws seeds, and clusters once for the world that they share."""
    shared, own = ["x", "x", "y"], ["x", "y"]  # the same labels mean other things in another world
    values = [np.array([0.0, 1, 4]), np.array([2.0, 0, 1]), np.array([9.0, 3])]
    samples = [Sample(values[0], shared, "a"), Sample(values[1], shared, "a"), Sample(values[2], own, "b")]
    rng, means = np.random.default_rng(5), []
    for _ in range(20_000):
        common = rng.choice(["x", "y"], 2)
        of_seed = []
        for s in rng.integers(3, size=3):
            groups, drawn = (shared, common) if s < 2 else (own, rng.choice(["x", "y"], 2))
            picked = [v for d in drawn for v, g in zip(values[s], groups, strict=True) if g == d]
            of_seed.append(np.mean(picked))
        means.append(np.mean(of_seed))
    interval = seeds_interval(samples, resamples=20_000)
    assert interval.mean == pytest.approx(np.mean([5 / 3, 1, 6]))
    assert [interval.low, interval.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.06)


def test_clusters_of_other_worlds_are_not_merged_and_shared_ones_are():
    rng = np.random.default_rng(6)
    hard = rng.random(50)  # what a question is like decides, whatever the seed
    same = [(hard + rng.normal(0, 0.05, 50) > 0.5).astype(float) for _ in range(4)]
    groups = list(range(50))
    together = seeds_interval([Sample(v, groups, "one") for v in same], resamples=500)
    apart = seeds_interval([Sample(v, groups, world) for world, v in enumerate(same)], resamples=500)
    # Four seeds on the same fifty questions are no two hundred questions.
    assert together.high - together.low > 1.2 * (apart.high - apart.low)


def test_seeds_that_differ_widen_the_interval_of_equal_questions():
    samples = [Sample(np.full(40, mean)) for mean in (0.2, 0.5, 0.8)]
    interval = seeds_interval(samples, resamples=2000)
    assert interval.mean == pytest.approx(0.5) and interval.low <= 0.3 and interval.high >= 0.7
    assert seeds_difference(samples, resamples=200).p == pytest.approx(2 / 201)
    with pytest.raises(ValueError, match="no samples"):
        seeds_interval([])
