"""Candidate tables: built, random, mixed, compared."""

import numpy as np
import pytest

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval import candidates
from jmlr_jax.retrieval.candidates import build_table, mixed_table, overlap, random_table, recall
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.scann import ScannIndex
from jmlr_jax.retrieval.vectors import TokenVectors


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return TokenVectors(unit(rng, 50, 6, 8).astype(np.float16), np.ones((50, 6), bool)), unit(rng, 23, 4, 8)


@pytest.mark.parametrize("chunk", [1, 10, 2048])
def test_table_is_the_search_in_order(data, chunk, monkeypatch):
    """However the questions are cut into batches and searches."""
    monkeypatch.setattr(candidates, "SEARCH_CHUNK", chunk)
    vectors, q = data
    index = ExactIndex(vectors)
    want, _ = index.search(q, 7)
    for cuts in ([], [5], [9, 10, 22]):
        np.testing.assert_array_equal(build_table(index.search, np.split(q, cuts), 23, 7)[0], want)


def test_table_is_deterministic(data):
    """A saved searcher is asked twice; training is not repeated."""
    vectors, q = data
    index = ScannIndex.build([vectors], vectors, len(vectors), IndexConfig(rerank=20, bits=16), seed=0)
    one, two = (build_table(index.search, [q], 23, 60)[0] for _ in range(2))
    assert one.dtype == np.int32 and one.shape == (23, 60)
    np.testing.assert_array_equal(one, two)
    assert np.all(one[:, 50:] == -1) and all(sorted(row[:50]) == list(range(50)) for row in one)


@pytest.mark.parametrize("questions", [22, 24])
def test_table_of_another_size_is_refused(data, questions):
    vectors, q = data
    with pytest.raises(ValueError, match=f"{questions}"):
        build_table(ExactIndex(vectors).search, [q], questions, 3)


def test_random_table_is_uniform_without_repeats():
    table = random_table(4000, 10, 4, seed=1)
    assert table.dtype == np.int32 and table.shape == (4000, 4)
    assert all(len(set(row)) == 4 for row in table)
    for column in table.T:  # each of ten passages 400 times in 4000, standard deviation 19
        assert np.all(np.abs(np.bincount(column, minlength=10) - 400) < 95)
    np.testing.assert_array_equal(table, random_table(4000, 10, 4, seed=1))
    assert not np.array_equal(table, random_table(4000, 10, 4, seed=2))
    short = random_table(3, 2, 4, seed=0)
    assert np.all(short[:, 2:] == -1) and np.all(np.sort(short[:, :2]) == [0, 1])


def test_mixed_table_holds_its_shares_once_each():
    retrieved = np.array([[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    lexical = np.array([[1, 0, 7, 8, 9], [-1, -1, -1, -1, -1]])
    chance = np.array([[20, 21, 22, 23, 24], [20, 1, 0, 21, -1]])
    parts = {"retrieved": (retrieved, 2), "bm25": (lexical, 2), "random": (chance, 1)}
    table = mixed_table(parts, 6, seed=0)
    assert table.dtype == np.int32
    # best two retrieved; bm25's best two that are new; one random; then the next retrieved
    assert set(table[0]) == {0, 1, 7, 8, 20, 2}
    # bm25 is empty: its places go to what the others still have, padding on the right
    assert set(table[1, :4]) == {0, 1, 20, 21} and np.all(table[1, 4:] == -1)
    np.testing.assert_array_equal(table, mixed_table(parts, 6, seed=0))


def test_mixed_table_hides_where_a_passage_came_from():
    n = 2000
    parts = {"a": (np.tile([0, 1], (n, 1)), 2), "b": (np.tile([2, 3], (n, 1)), 2)}
    table = mixed_table(parts, 4, seed=3)
    for column in table.T:  # 500 each, standard deviation 19
        assert np.all(np.abs(np.bincount(column, minlength=4) - 500) < 95)


def test_mixed_table_refusals():
    one = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="same number"):
        mixed_table({"a": (one, 1), "b": (one[:1], 1)}, 4, 0)
    with pytest.raises(ValueError, match="same number"):
        mixed_table({}, 4, 0)
    with pytest.raises(ValueError, match="more than k=4"):
        mixed_table({"a": (one, 3), "b": (one, 2)}, 4, 0)


def test_overlap():
    a = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1]])
    assert overlap(a, a) == 1.0
    assert overlap(a, a[:, ::-1]) == 1.0
    b = np.array([[1, 2, 7, 8], [5, 6, 7, 8], [1, -1, -1, -1]])
    assert overlap(a, b) == overlap(b, a) == pytest.approx((0.5 + 0.5 + 0) / 3)
    with pytest.raises(ValueError, match="positive number"):
        overlap(a, b[:2])


def test_recall():
    table = np.array([[4, 2, 9], [1, 3, -1], [7, 8, 0]])
    got = recall(table, [[2, 5], [1, 3], []], (1, 2, 3))
    assert got == {1: pytest.approx(0.25), 2: pytest.approx(0.75), 3: pytest.approx(0.75)}
    with pytest.raises(ValueError, match="width"):
        recall(table, [[1], [1], [1]], (4,))
    with pytest.raises(ValueError, match="2 gold lists for 3"):
        recall(table, [[1], [1]], (1,))
    with pytest.raises(ValueError, match="no question has a gold"):
        recall(table, [[], [], []], (1,))
