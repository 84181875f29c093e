"""Reciprocal rank fusion and TREC run files."""

import numpy as np
import pytest

from jmlr_jax.retrieval.fusion import reciprocal_rank, write_trec


def test_fusion_is_the_sum_of_reciprocal_ranks():
    """Against a slow dictionary; padding anywhere, three rankings of different depth."""
    rng = np.random.default_rng(0)
    rankings = {}
    for name, depth in (("a", 7), ("b", 12), ("c", 5)):
        rows = np.stack([rng.permutation(20)[:depth] for _ in range(30)])
        rankings[name] = np.where(np.arange(depth) < rng.integers(0, depth + 1, (30, 1)), rows, -1).astype(np.int32)
    got, scores = reciprocal_rank(rankings, 9)
    for i in range(30):
        want: dict[int, float] = {}
        for rows in rankings.values():
            for rank, row in enumerate(rows[i].tolist(), 1):
                if row >= 0:
                    want[row] = want.get(row, 0) + 1 / (60 + rank)
        best = sorted(want, key=lambda row: (-np.float32(want[row]), row))[:9]
        assert got[i, : len(best)].tolist() == best
        np.testing.assert_allclose(scores[i, : len(best)], [want[row] for row in best], rtol=1e-6)
        assert (got[i, len(best) :] == -1).all() and np.isneginf(scores[i, len(best) :]).all()


def test_rankings_of_other_questions_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        reciprocal_rank({"a": np.zeros((2, 3), np.int32), "b": np.zeros((3, 3), np.int32)}, 2)
    with pytest.raises(ValueError, match="same questions"):
        reciprocal_rank({}, 2)


def test_run_file(tmp_path):
    rows = np.array([[2, 0, -1], [1, -1, -1]], np.int32)
    scores = np.array([[1.5, 0.25, -np.inf], [3.0, -np.inf, -np.inf]], np.float32)
    write_trec(tmp_path / "run", ["q1", "q2"], ["p0", "p1", "p2"], rows, scores, "ours")
    assert (tmp_path / "run").read_text().splitlines() == [
        "q1 Q0 p2 1 1.500000 ours",
        "q1 Q0 p0 2 0.250000 ours",
        "q2 Q0 p1 1 3.000000 ours",
    ]
    with pytest.raises(ValueError, match="without white space"):
        write_trec(tmp_path / "other", ["q 1", "q2"], ["p0", "p1", "p2"], rows, scores, "ours")
    assert not (tmp_path / "other").exists()
