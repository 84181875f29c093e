"""Ranking metrics, intervals and the answer parser, each against an independent computation or a table."""

import doctest

import numpy as np
import pytest

from jmlr_jax.evaluation import metrics
from jmlr_jax.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    hit_at,
    mrr_at,
    ndcg_at,
    paired_bootstrap,
    parse_answer,
    ranking_summary,
    token_f1,
)


def test_doctests():
    result = doctest.testmod(metrics)
    assert result.attempted >= 8 and result.failed == 0


def test_ranking_equals_brute_force():
    rng = np.random.default_rng(0)
    table = np.array([rng.permutation(40)[:20] for _ in range(50)])
    table[::7, 5:] = -1
    gold = np.full((50, 4), -1)
    for row in gold[1:]:
        count = rng.integers(1, 5)
        row[:count] = rng.permutation(40)[:count]
    gold[2] = [3, 3, 8, -1]  # a row listed twice counts once
    expected = {"hit@1": [], "hit@5": [], "mrr@10": [], "ndcg@10": []}
    for row, golds in zip(table, gold, strict=True):
        golds = {int(g) for g in golds if g >= 0}
        if not golds:
            continue
        ranks = [r for r, p in enumerate(row, 1) if p >= 0 and int(p) in golds]
        expected["hit@1"].append(any(r <= 1 for r in ranks))
        expected["hit@5"].append(any(r <= 5 for r in ranks))
        expected["mrr@10"].append(max([1 / r for r in ranks if r <= 10], default=0))
        ideal = sum(1 / np.log2(1 + r) for r in range(1, min(len(golds), 10) + 1))
        expected["ndcg@10"].append(sum(1 / np.log2(1 + r) for r in ranks if r <= 10) / ideal)
    summary = ranking_summary(table, gold, (1, 5))
    assert summary.pop("n") == 49
    assert summary == pytest.approx({k: np.mean(v) for k, v in expected.items()})


def test_ranking_of_padding_short_tables_and_no_gold():
    table, gold = np.array([[-1, -1], [3, 1]]), np.array([[-1, -1], [1, -1]])
    assert np.isnan(hit_at(table, gold, 1)[0])  # padding on both sides is not a hit
    assert hit_at(table, gold, 50)[1] == 1 and mrr_at(table, gold)[1] == 0.5
    assert ndcg_at(table, gold, 10)[1] == pytest.approx(1 / np.log2(3))
    assert ranking_summary(table[:1], gold[:1]) == {"n": 0}
    assert hit_at(np.zeros((2, 0), int), gold, 5)[1] == 0
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        hit_at(table, gold[:1], 1)


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


OPTIONS = ("Aspirin", "Acute renal failure", "Renal failure", "E. coli infection")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", 1),
        ("b", 1),
        ("(b)", 1),
        ("b)", 1),
        ("B.", 1),
        (" B \n", 1),
        ("B:", 1),
        ("[C]", 2),
        ("**C**", 2),
        ('"C"', 2),
        ("B\nbecause of the kidneys", 1),
        ("Answer: B", 1),
        ("Answer: B.", 1),
        ("answer: b", 1),
        ("The answer is B", 1),
        ("The correct answer is (B).", 1),
        ("The answer is A because it thins the blood", 0),
        ("option B", 1),
        ("I would choose option b.", 1),
        ("I choose (D)", 3),
        ("B) Acute renal failure", 1),
        ("B. Acute renal failure", 1),
        ("B acute renal failure", 1),
        ("Acute renal failure", 1),
        ("ACUTE  renal\tfailure.", 1),
        ("'renal failure'", 2),
        ("renal-failure", 2),
        ("The patient has acute renal failure, I think.", 1),
        ("This points to renal failure", 2),
        ("e. coli infection", 3),
        ("E. coli infection", 3),
        ("An E. coli infection is likely", 3),
        ("Ａspirin", 0),  # full-width letter
        # Unparsed: nothing, nothing known, or two things.
        ("", None),
        ("   \n", None),
        ("...", None),
        ("\x00\ufffd", None),
        ("E", None),
        ("Answer: F", None),
        ("I do not know", None),
        ("A patient came in with a cold", None),
        ("The answer is a matter of taste", None),
        ("answer: Vitamin B-12", None),
        ("aspirin or renal failure", None),
        ("A or B", None),
        ("Answer: B or C", None),
        ("(A) and (B)", None),
        ("B) Aspirin", None),
        ("Answer: C. Acute renal failure", None),
        ("aspirins", None),
        ("non-aspirin", None),
        ("A" * 10_000, None),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text, OPTIONS) == expected


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("yes", ("yes", "no", "maybe"), 0),
        ("There is no doubt: yes", ("yes", "no", "maybe"), None),
        ("5%", ("5%", "15%", "0.5%"), 0),
        ("about 0.5% of cases", ("5%", "15%", "0.5%"), 2),
        ("<5", ("<5", ">5"), 0),
        ("take 1.5 mg", ("1", "1.5"), 1),
        ("C", ("A", "C", "D"), None),  # the option "C", or the third?
        ("A", ("A", "C", "D"), 0),
        ("J", tuple("option " + str(i) for i in range(10)), 9),
        ("anything", (), None),
        ("x", ("", "x"), 1),
        ("a+b (c", ("a+b (c", "[d"), 0),
    ],
)
def test_parse_answer_of_other_options(text, options, expected):
    assert parse_answer(text, options) == expected


def test_free_text_scores():
    assert exact_match(" An aspirin ", "the ASPIRIN.") and not exact_match("aspirins", "aspirin")
    assert token_f1("", "aspirin") == 0 and token_f1("heparin", "aspirin") == 0
    assert token_f1("Aspirin!", "aspirin") == 1
    assert token_f1("aspirin aspirin", "aspirin heparin") == pytest.approx(0.5)
