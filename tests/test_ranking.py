"""Ranking metrics against brute force."""

import doctest

import numpy as np
import pytest

from jmlr_jax.evaluation import ranking
from jmlr_jax.evaluation.ranking import hit_at, mrr_at, ndcg_at, ranking_summary


def test_doctests():
    result = doctest.testmod(ranking)
    assert result.attempted >= 4 and result.failed == 0


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
