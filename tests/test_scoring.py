"""MaxSim, min-max and sampling (method.md, steps 1 to 3; faults 4, 7, 10 and 14 of the released code)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.method import scoring


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def loop_maxsim(q, p, keep):
    """One question, one passage, written as in the paper."""
    return sum(max(float(t @ s) for s, k in zip(p, keep, strict=True) if k) for t in q)


def test_maxsim_equals_the_loop():
    rng = np.random.default_rng(0)
    q, p, keep = unit(rng, 3, 5, 8), unit(rng, 3, 4, 7, 8), rng.random((3, 4, 7)) < 0.6
    keep[..., 0] = True
    want = [[loop_maxsim(q[b], p[b, k], keep[b, k]) for k in range(4)] for b in range(3)]
    np.testing.assert_allclose(scoring.maxsim(q, p, keep), want, rtol=1e-5)


def test_maxsim_mask_beats_negative_similarities():
    """Multiplying by the mask instead would give 0, the score of an orthogonal token that is not there."""
    q = jnp.array([[[1.0, 0.0]]])
    p = jnp.array([[[[-0.5, 0.0], [0.9, 0.0]]]])
    assert float(scoring.maxsim(q, p, jnp.array([[[True, False]]]))[0, 0]) == -0.5


def test_maxsim_accumulates_in_float32():
    """Fault 10: 512 query tokens in half precision tie; here neighbours that differ by 1/128 stay apart."""
    q = jnp.ones((1, 512, 1), jnp.bfloat16)
    p = jnp.array([1.0, 1.0 - 2**-8], jnp.bfloat16).reshape(1, 2, 1, 1)
    score = scoring.maxsim(q, p, jnp.ones((1, 2, 1), bool))
    assert score.dtype == jnp.float32
    np.testing.assert_array_equal(score, [[512.0, 510.0]])
    # 0.3 rounds to 0.30078125 in bfloat16; 512 of them add up without further rounding
    p = jnp.full((1, 1, 1, 1), 0.3, jnp.bfloat16)
    assert float(scoring.maxsim(q, p, jnp.ones((1, 1, 1), bool))[0, 0]) == 0.30078125 * 512


def test_maxsim_batch_equals_singles():
    """Fault 7: no question of a batch is dropped or mixed with another."""
    rng = np.random.default_rng(1)
    q, p, keep = unit(rng, 4, 3, 8), unit(rng, 4, 5, 6, 8), rng.random((4, 5, 6)) < 0.7
    keep[..., 0] = True
    batch = scoring.maxsim(q, p, keep)
    valid = jnp.array(rng.random((4, 5)) < 0.8)
    for b in range(4):
        one = scoring.maxsim(q[b : b + 1], p[b : b + 1], keep[b : b + 1])
        np.testing.assert_allclose(batch[b : b + 1], one, rtol=1e-6)
        np.testing.assert_allclose(
            scoring.minmax(batch, valid)[b], scoring.minmax(one, valid[b : b + 1])[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("valid", [[True] * 4, [True, False, False, False], [False] * 4])
def test_minmax_of_equal_scores_is_zero_with_finite_gradient(valid):
    """Fault 4: 0/0 when all scores are equal (or one candidate, or none)."""
    mask = jnp.array([valid])
    score = jnp.full((1, 4), 2.5)
    weights = jnp.arange(4.0)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(weights * scoring.minmax(s, mask)))(score)
    np.testing.assert_array_equal(scoring.minmax(score, mask), 0.0)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_minmax_treats_rounding_noise_as_equal():
    score = jnp.array([[17.0, 17.0 * (1 + 2e-7)]])
    assert score[0, 0] != score[0, 1]
    np.testing.assert_array_equal(scoring.minmax(score, jnp.ones((1, 2), bool)), 0.0)


def test_minmax_ignores_what_invalid_entries_hold():
    score = jnp.array([[4.0, jnp.nan, 2.0, jnp.inf]])
    valid = jnp.array([[True, False, True, False]])
    np.testing.assert_array_equal(scoring.minmax(score, valid), [[1.0, 0.0, -1.0, 0.0]])
    gradient = jax.grad(lambda s: scoring.minmax(s, valid)[0, 0] * 3)(score)
    assert np.isfinite(gradient).all()


def test_minmax_gradient_matches_differences():
    valid = jnp.array([[True, True, False, True, True]])
    weights = jnp.array([0.3, -1.0, 5.0, 2.0, 0.7])
    score = np.array([[1.0, 3.0, 7.0, 2.0, 1.7]], np.float32)

    def f(s):
        return jnp.sum(weights * scoring.minmax(s, valid))

    step = 1e-2
    eye = np.eye(5, dtype=np.float32)[:, None] * step
    differences = [(f(score + e) - f(score - e)) / (2 * step) for e in eye]
    np.testing.assert_allclose(jax.grad(f)(jnp.array(score))[0], differences, atol=2e-3)


def exact_ordered(probability, m):
    """Probability of every ordered draw of m without replacement."""
    table = {}
    for draw in itertools.permutations(range(len(probability)), m):
        mass, left = 1.0, 1.0
        for i in draw:
            mass *= probability[i] / left
            left -= probability[i]
        table[draw] = mass
    return table


def test_sample_is_softmax_without_replacement():
    """Chi-square of 40,000 ordered draws of 2 from 4 valid candidates (a fifth is invalid) against enumeration."""
    draws, valid = 40_000, np.array([True, True, False, True, True])
    score = np.array([1.0, -1.0, 9.0, 0.2, -0.4], np.float32)
    live = np.flatnonzero(valid)
    soft = np.exp(score[live]) / np.exp(score[live]).sum()
    want = {tuple(live[list(d)]): p for d, p in exact_ordered(soft, 2).items()}
    gumbel = jax.random.gumbel(jax.random.key(3), (draws, 5))
    index, taken = scoring.sample(jnp.tile(score, (draws, 1)), jnp.tile(valid, (draws, 1)), gumbel, 2)
    assert np.all(taken)
    seen, count = np.unique(np.asarray(index), axis=0, return_counts=True)
    got = dict(zip(map(tuple, seen), count, strict=True))
    assert set(got) == set(want)
    chi2 = sum((got[d] - draws * p) ** 2 / (draws * p) for d, p in want.items())
    assert chi2 < 31.3  # 99.9th percentile at 11 degrees of freedom


def test_fewer_valid_than_wanted_are_all_taken():
    """Faults 4 and 14: short candidate lists neither crash nor shift; the rest is masked."""
    valid = jnp.array([[True, False, True, False, False], [False] * 5, [True] * 5])
    score = jnp.zeros((3, 5))
    gumbel = jax.random.gumbel(jax.random.key(0), (3, 5))
    for index, taken in (scoring.sample(score, valid, gumbel, 4), scoring.top(score, valid, 4)):
        assert index.shape == taken.shape == (3, 4) and index.dtype == jnp.int32
        np.testing.assert_array_equal(taken.sum(-1), [2, 0, 4])
        assert set(np.asarray(index[0])[np.asarray(taken[0])]) == {0, 2}
        assert np.all((index >= 0) & (index < 5))
        assert all(len(set(np.asarray(row))) == 4 for row in index)


def test_top_breaks_ties_by_position():
    index, _ = scoring.top(jnp.array([[0.5, 0.5, 0.9, 0.5]]), jnp.ones((1, 4), bool), 3)
    np.testing.assert_array_equal(index, [[2, 0, 1]])


@pytest.mark.parametrize("m", [0, 6])
def test_impossible_sizes_are_refused(m):
    with pytest.raises(ValueError, match="candidates"):
        scoring.sample(jnp.zeros((1, 5)), jnp.ones((1, 5), bool), jnp.zeros((1, 5)), m)
