"""Losses of the joint step (method.md, steps 4 to 6), as pure functions of arrays.

``answer_nll`` is what the generator minimises and what judges passages. The rank losses turn those
judgements into a loss on the retriever's scores. All of them treat the judgement ``nll_BxM`` as data:
no gradient ever reaches the generator through a rank loss. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

# Stands for minus infinity where a true infinity would make gradients NaN (inf - inf, 0 * inf).
_MASKED = -1e30

RankLoss = Callable[[Array, Array, Array], Array]


def answer_nll(logits_AxV: Array, answer_A: Array, length: Array) -> Array:
    """Mean negative log-likelihood over the answer's tokens (method.md, step 4).

    Leading axes, if any, are the same for all three arguments.

    Args:
      logits_AxV: ``[..., A, V]`` logits; row ``a`` predicts answer token ``a``. Any float dtype.
      answer_A: ``[..., A]`` int, right-padded token ids; ids past the length are not looked at.
      length: ``[...]`` int, number of real answer tokens, the end token included.

    Returns:
      ``[...]`` float32, nats per token; 0 where the length is 0.

    Two tokens out of a vocabulary of two, with probabilities 1/2 and 3/4; the third row is padding:

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    >>> print(f"{answer_nll(logits, jnp.array([0, 1, 1]), jnp.array(2)):.4f}")  # (ln 2 + ln 4/3) / 2
    0.4904
    """
    return -_masked_mean(answer_token_logp(logits_AxV, answer_A), _real(answer_A, length))


def answer_token_logp(logits_AxV: Array, answer_A: Array) -> Array:
    """Log-probability of each answer token, ``[..., A]`` float32, padding not masked; arguments as in `answer_nll`.

    >>> print(answer_token_logp(jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), jnp.array([0, 1])).round(4))
    [-0.6931 -0.2877]
    """
    logits_AxV = logits_AxV.astype(jnp.float32)
    # Relative to the largest, so that large logits lose no digits; the shift itself cancels in the gradient.
    logits_AxV = logits_AxV - jax.lax.stop_gradient(logits_AxV.max(-1, keepdims=True))
    # Padding may be any number, -1 included: clip, since an index out of range would read as NaN.
    index_A = jnp.clip(answer_A, 0, logits_AxV.shape[-1] - 1)
    chosen_A = jnp.take_along_axis(logits_AxV, index_A[..., None], axis=-1)[..., 0]
    return chosen_A - jnp.log(jnp.sum(jnp.exp(logits_AxV), axis=-1))


def llm_rank_loss(score_BxM: Array, nll_BxM: Array, taken_BxM: Array, margin: float = 0.0) -> Array:
    """LLM-Rank, the paper's loss (method.md, step 5): pairwise logistic loss against the generator's order.

    For each pair i < j of taken passages the logit is ``s_i - s_j`` and the label says whether passage i has
    the lower nll. Pairs with equal nll carry no weight; the mean is over the others. Every pair weighs the same, and
    where most passages are useless, most pairs are of two that are: one misleads the reader more than the other, which
    is no reason to retrieve either. With a margin, only pairs add something whose better passage helps: its nll is
    below the median of the question's by more than the margin. The others stay in the mean, or a question with one
    pair that counts would weigh as much as one with many.

    Args:
      score_BxM: normalised scores in [-1, 1]; the only argument with a gradient.
      nll_BxM: answer loss of each passage alone, nats per token.
      taken_BxM: bool, False for slots that hold no passage; their score and nll may be anything.
      margin: nats per token; 0 is the paper's loss, in which every pair counts.

    Returns:
      ``loss_B`` float32; 0 for a question in which no pair counts.

    Passage 0 is better than 1 and 2, which tie, so two pairs count, with logits 1 and 2:

    >>> score, nll = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[0.1, 0.7, 0.7]])
    >>> print(llm_rank_loss(score, nll, jnp.ones((1, 3), bool)).round(4))  # (ln(1 + e^-1) + ln(1 + e^-2)) / 2
    [0.2201]
    """
    score_BxM, nll_BxM = _clean(score_BxM, nll_BxM, taken_BxM)
    logit_BxMxM = score_BxM[:, :, None] - score_BxM[:, None, :]
    better_BxMxM, counts_BxMxM = counted_pairs(nll_BxM, taken_BxM, margin)
    # Cross-entropy with logit x is softplus(-x) for label 1 and softplus(x) for label 0: stable for any x.
    loss_BxMxM = jax.nn.softplus(jnp.where(better_BxMxM, -logit_BxMxM, logit_BxMxM))
    differs_BxMxM = counts_BxMxM if margin == 0 else counted_pairs(nll_BxM, taken_BxM, 0.0)[1]
    return _masked_mean(jnp.where(counts_BxMxM, loss_BxMxM, 0.0), differs_BxMxM, axis=(1, 2))


def kl_loss(score_BxM: Array, nll_BxM: Array, taken_BxM: Array) -> Array:
    """KL(softmax(-nll) || softmax(score)) over the taken passages: REPLUG's and Atlas's perplexity distillation.

    Arguments and result as in :func:`llm_rank_loss`; 0 with fewer than two taken passages.

    The generator says 3/4 : 1/4, the retriever 1/2 : 1/2:

    >>> score, nll = jnp.zeros((1, 2)), -jnp.log(jnp.array([[0.75, 0.25]]))
    >>> print(kl_loss(score, nll, jnp.ones((1, 2), bool)).round(4))  # ln 2 - H(3/4)
    [0.1308]
    """
    score_BxM, nll_BxM = _clean(score_BxM, nll_BxM, taken_BxM)
    target_BxM = _log_softmax(-nll_BxM, taken_BxM)
    gap_BxM = target_BxM - _log_softmax(score_BxM, taken_BxM)
    return jnp.sum(jnp.where(taken_BxM, jnp.exp(target_BxM) * gap_BxM, 0.0), axis=-1)


def emdr2_loss(score_BxM: Array, nll_BxM: Array, taken_BxM: Array) -> Array:
    """EMDR2: ``-log sum_m softmax(score)_m exp(-nll_m)``, the loss of the answer with the passage marginalised out.

    Arguments and result as in :func:`llm_rank_loss`; 0 when nothing is taken.

    >>> score, nll = jnp.zeros((1, 2)), -jnp.log(jnp.array([[0.75, 0.25]]))
    >>> print(emdr2_loss(score, nll, jnp.ones((1, 2), bool)).round(4))  # -ln(0.5 * 0.75 + 0.5 * 0.25)
    [0.6931]
    """
    score_BxM, nll_BxM = _clean(score_BxM, nll_BxM, taken_BxM)
    joint_BxM = jnp.where(taken_BxM, _log_softmax(score_BxM, taken_BxM) - nll_BxM, _MASKED)
    return jnp.where(taken_BxM.any(-1), -jax.nn.logsumexp(joint_BxM, axis=-1), 0.0)


RANK_LOSSES: dict[str, RankLoss] = {"llm_rank": llm_rank_loss, "kl": kl_loss, "emdr2": emdr2_loss}


def rank_loss(name: str, margin: float) -> RankLoss:
    """The rank loss of that name; the margin belongs to ``llm_rank``, the other two weigh differences by their size."""
    return partial(llm_rank_loss, margin=margin) if name == "llm_rank" else RANK_LOSSES[name]


def pair_accuracy(score_BxM: Array, nll_BxM: Array, taken_BxM: Array, margin: float = 0.0) -> Array:
    """Share of the batch's untied pairs that the scores order as the generator does; equal scores count one half.

    Arguments as in :func:`llm_rank_loss`. Returns a float32 scalar in [0, 1], 0 when no pair counts.

    Three pairs; 0 over 2 and 1 over 2 are right, 0 over 1 is not:

    >>> score, nll = jnp.array([[0.5, 1.0, -1.0]]), jnp.array([[0.1, 0.2, 0.9]])
    >>> print(pair_accuracy(score, nll, jnp.ones((1, 3), bool)).round(4))
    0.6667
    """
    score_BxM, nll_BxM = _clean(score_BxM, nll_BxM, taken_BxM)
    sign_BxMxM = jnp.sign(score_BxM[:, :, None] - score_BxM[:, None, :])
    better_BxMxM, counts_BxMxM = counted_pairs(nll_BxM, taken_BxM, margin)
    right_BxMxM = 0.5 + 0.5 * jnp.where(better_BxMxM, sign_BxMxM, -sign_BxMxM)
    return _masked_mean(right_BxMxM, counts_BxMxM, axis=(0, 1, 2))


def sampling_entropy(score_BxK: Array, valid_BxK: Array) -> Array:
    """Entropy in nats of the distribution that passages are sampled from, softmax(score) over the valid candidates.

    Returns ``entropy_B`` float32 in [0, log K]; 0 when fewer than two candidates are valid.

    >>> print(sampling_entropy(jnp.zeros((1, 4)), jnp.array([[True, True, True, False]])).round(4))  # ln 3
    [1.0986]
    """
    logp_BxK = _log_softmax(score_BxK.astype(jnp.float32), valid_BxK)
    return -jnp.sum(jnp.where(valid_BxK, jnp.exp(logp_BxK) * logp_BxK, 0.0), axis=-1)


def _clean(score_BxM: Array, nll_BxM: Array, taken_BxM: Array) -> tuple[Array, Array]:
    """Both in float32 with 0 in the slots not taken, and no gradient into the judgement."""
    score_BxM = jnp.where(taken_BxM, score_BxM.astype(jnp.float32), 0.0)
    nll_BxM = jnp.where(taken_BxM, jax.lax.stop_gradient(nll_BxM).astype(jnp.float32), 0.0)
    return score_BxM, nll_BxM


def counted_pairs(nll_BxM: Array, taken_BxM: Array, margin: float) -> tuple[Array, Array]:
    """(i better than j, the pair counts), both bool ``[B, M, M]``: i < j, both taken, another nll; and, with a margin,
    the better one's nll below the median of those taken by more."""
    upper_MxM = jnp.triu(jnp.ones((nll_BxM.shape[1],) * 2, bool), k=1)
    both_BxMxM = taken_BxM[:, :, None] & taken_BxM[:, None, :]
    counts_BxMxM = upper_MxM & both_BxMxM & (nll_BxM[:, :, None] != nll_BxM[:, None, :])
    if margin > 0:
        middle_Bx1 = jnp.nanmedian(jnp.where(taken_BxM, nll_BxM, jnp.nan), axis=1, keepdims=True)
        helps_BxM = nll_BxM < middle_Bx1 - margin
        counts_BxMxM &= helps_BxM[:, :, None] | helps_BxM[:, None, :]
    return nll_BxM[:, :, None] < nll_BxM[:, None, :], counts_BxMxM


def _log_softmax(x_BxM: Array, mask_BxM: Array) -> Array:
    return jax.nn.log_softmax(jnp.where(mask_BxM, x_BxM, _MASKED), axis=-1)


def _real(answer_A: Array, length: Array) -> Array:
    return jnp.arange(answer_A.shape[-1]) < length[..., None]


def _masked_mean(x: Array, mask: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """True mean over the masked-in entries, 0 where there are none."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1)
