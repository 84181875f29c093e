"""Losses against brute force in plain numpy, their gradients, and method.md, fault 5 (ties, divisor)."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.method import losses
from jmlr_jax.method.losses import RANK_LOSSES, answer_nll, llm_rank_loss, pair_accuracy, sampling_entropy

B, M = 5, 6


@pytest.fixture(scope="module")
def batch():
    """Scores, nlls with ties, and taken masks from full to empty."""
    rng = np.random.default_rng(0)
    score = rng.uniform(-1, 1, (B, M)).astype(np.float32)
    nll = rng.uniform(0, 3, (B, M)).astype(np.float32)
    nll[0, 1] = nll[0, 4] = nll[0, 2]
    taken = np.ones((B, M), bool)
    taken[1, 3:] = False
    taken[2, 0] = False
    taken[3, 1:] = False
    taken[4] = False
    return score, nll, taken


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def brute(name, score, nll, taken):
    s, n = score[taken].astype(np.float64), nll[taken].astype(np.float64)
    if len(s) == 0:
        return 0.0
    if name == "kl":
        target, model = log_softmax(-n), log_softmax(s)
        return float((np.exp(target) * (target - model)).sum())
    if name == "emdr2":
        return float(-np.log((np.exp(log_softmax(s)) * np.exp(-n)).sum()))
    terms = []
    for i in range(len(s)):
        for j in range(i + 1, len(s)):
            if n[i] != n[j]:
                p = 1 / (1 + np.exp(-(s[i] - s[j])))
                terms.append(-np.log(p if n[i] < n[j] else 1 - p))
    return float(np.mean(terms)) if terms else 0.0


def test_doctests():
    result = doctest.testmod(losses)
    assert result.attempted >= 12 and result.failed == 0


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_rank_loss_equals_brute_force(name, batch):
    expected = [brute(name, *row) for row in zip(*batch, strict=True)]
    np.testing.assert_allclose(jax.jit(RANK_LOSSES[name])(*batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_gradient_through_scores_only_and_not_from_empty_slots(name, batch):
    score, nll, taken = batch
    nll = np.where(taken, nll, np.nan)  # what stands in a slot not taken must not matter
    score = np.where(taken, score, np.inf)
    g_score, g_nll = jax.grad(lambda s, n: RANK_LOSSES[name](s, n, taken).sum(), argnums=(0, 1))(score, nll)
    assert np.all(np.isfinite(g_score)) and not np.any(np.asarray(g_score)[~taken])
    assert np.all(np.any(np.asarray(g_score)[:3] != 0, axis=1))
    assert not np.any(np.nan_to_num(g_nll, nan=1.0))


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_gradient_equals_finite_difference(name, batch):
    score, nll, taken = batch
    gradient = np.asarray(jax.grad(lambda s: RANK_LOSSES[name](s, nll, taken).sum())(score))
    for b, m in [(0, 1), (1, 0), (2, 5)]:
        up, down = score[b].astype(np.float64), score[b].astype(np.float64)
        up[m] += 1e-5
        down[m] -= 1e-5
        slope = (brute(name, up, nll[b], taken[b]) - brute(name, down, nll[b], taken[b])) / 2e-5
        assert gradient[b, m] == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_a_descent_step_prefers_the_better_passage(name):
    score, nll = jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[2.0, 0.1, 1.0]])
    gradient = jax.grad(lambda s: RANK_LOSSES[name](s, nll, jnp.ones((1, 3), bool)).sum())(score)[0]
    assert gradient[1] < gradient[2] < gradient[0]


def test_ten_passages_are_divided_by_45_pairs():
    """Fault 5: every pair has logit 0 and so costs ln 2; a divisor of 46 would give 45/46 of it."""
    nll = jnp.arange(10.0)[None]
    loss = llm_rank_loss(jnp.zeros((1, 10)), nll, jnp.ones((1, 10), bool))
    assert loss[0] == pytest.approx(np.log(2), rel=1e-6)


def test_ties_are_weightless():
    """Fault 5: all tied gives 0 and no gradient; the order of the slots does not matter either."""
    taken = jnp.ones((1, 4), bool)
    score = jnp.array([[1.0, -1.0, 0.5, 0.0]])
    tied = jnp.full((1, 4), 0.7)
    assert llm_rank_loss(score, tied, taken)[0] == 0
    assert not np.any(jax.grad(lambda s: llm_rank_loss(s, tied, taken).sum())(score))
    one_better = tied.at[0, 2].set(0.2)
    shuffled = jnp.array([3, 2, 0, 1])
    expected = np.mean(np.log1p(np.exp(-(0.5 - np.array([1.0, -1.0, 0.0])))))
    assert llm_rank_loss(score, one_better, taken)[0] == pytest.approx(expected, rel=1e-6)
    assert llm_rank_loss(score[:, shuffled], one_better[:, shuffled], taken)[0] == pytest.approx(expected, rel=1e-6)


def test_with_a_margin_a_pair_counts_where_its_better_passage_helps():
    """Of five passages two lie below the median, 1.0, one of them by more than 0.5; that another misleads most is no
    reason to prefer the rest to it. The divisor stays the number of pairs that differ. A slot without a passage does
    not move the median."""
    nll = jnp.array([[1.0, 0.2, 0.6, 3.0, 1.0, -9.0]])
    taken = jnp.array([[True] * 5 + [False]])
    score = jnp.array([[0.0, -1.0, 0.5, 1.0, -0.5, 0.0]])
    helping = np.log1p(np.exp(-(-1.0 - np.array([0.0, 0.5, 1.0, -0.5]))))
    assert llm_rank_loss(score, nll, taken, 0.5)[0] == pytest.approx(helping.sum() / 9, rel=1e-6)
    gradient = jax.grad(lambda s: llm_rank_loss(s, nll, taken, 0.5).sum())(score)[0]
    assert gradient[1] < 0 < gradient[0] and gradient[5] == 0
    assert llm_rank_loss(score, nll, taken, 0.9)[0] == 0 and pair_accuracy(score, nll, taken, 0.5) == 0


def test_extreme_values_stay_finite():
    score, nll = jnp.array([[1e4, -1e4, 0.0]]), jnp.array([[300.0, 0.0, 1.0]])
    for loss in RANK_LOSSES.values():
        value, gradient = jax.value_and_grad(lambda s, f=loss: f(s, nll, jnp.ones((1, 3), bool)).sum())(score)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_low_precision_input_is_computed_in_float32(name, batch):
    score, nll, taken = batch
    low = RANK_LOSSES[name](jnp.asarray(score, jnp.bfloat16), jnp.asarray(nll, jnp.bfloat16), taken)
    again = RANK_LOSSES[name](
        jnp.asarray(score, jnp.bfloat16).astype(jnp.float32), jnp.asarray(nll, jnp.bfloat16).astype(jnp.float32), taken
    )
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, again)


def test_answer_nll_equals_brute_force():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 4, 7)).astype(np.float32) * 5
    answer = rng.integers(0, 7, (2, 3, 4))
    length = np.array([[4, 1, 2], [0, 3, 4]])
    answer[np.arange(4) >= length[..., None]] = -1  # any padding
    expected = np.zeros((2, 3))
    for i, j in np.ndindex(2, 3):
        real = range(length[i, j])
        if length[i, j]:
            expected[i, j] = -np.mean([log_softmax(logits[i, j, a])[answer[i, j, a]] for a in real])
    got = answer_nll(jnp.asarray(logits), jnp.asarray(answer), jnp.asarray(length))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_answer_nll_gradient_ignores_padding_and_float16_does_not_overflow():
    logits = jnp.full((1, 3, 4), 6e4, jnp.float16)
    value, gradient = jax.value_and_grad(lambda x: answer_nll(x, jnp.zeros((1, 3), int), jnp.array([2])).sum())(logits)
    assert value == pytest.approx(np.log(4), rel=1e-6)
    assert np.any(gradient[0, :2]) and not np.any(gradient[0, 2])


def test_pair_accuracy_pools_the_pairs_of_the_batch(batch):
    score, nll, taken = batch
    score = score.copy()
    score[0, 0] = score[0, 3]
    right = counted = 0.0
    for s, n, t in zip(score, nll, taken, strict=True):
        for i in range(M):
            for j in range(i + 1, M):
                if t[i] and t[j] and n[i] != n[j]:
                    counted += 1
                    right += 0.5 if s[i] == s[j] else float((s[i] > s[j]) == (n[i] < n[j]))
    assert pair_accuracy(score, nll, taken) == pytest.approx(right / counted)
    assert pair_accuracy(score, nll, np.zeros_like(taken)) == 0
    assert pair_accuracy(-nll, nll, taken) == 1 and pair_accuracy(nll, nll, taken) == 0


def test_sampling_entropy(batch):
    score, _, valid = batch
    expected = [
        -(np.exp(log_softmax(s[v])) * log_softmax(s[v])).sum() if v.any() else 0.0
        for s, v in zip(score, valid, strict=True)
    ]
    np.testing.assert_allclose(sampling_entropy(jnp.asarray(score), jnp.asarray(valid)), expected, atol=1e-6)
