"""Retrieval scores and the choice of passages: method.md, steps 1 to 3, pure ``jax.numpy``, static shapes.

Letters: B questions, K candidates, M sampled, N read, Q query tokens, P passage tokens, C vector width.
A candidate that does not exist (-1 in the candidate table) is False in ``valid_BxK`` and can never be chosen
before one that does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

# Below any sum of cosines, yet small enough that a sum over thousands of query tokens stays finite in float32.
MASKED_SIMILARITY = -1e9


def maxsim(q_BxQxC: Array, p_BxKxPxC: Array, keep_BxKxP: Array, query_keep_BxQ: Array | None = None) -> Array:
    """Late-interaction score of every candidate: ``sum_q max_p <q, p>`` (method.md, step 1; ColBERT).

    Args:
      q_BxQxC: query token vectors, any float dtype.
      p_BxKxPxC: passage token vectors, any float dtype.
      keep_BxKxP: bool; False tokens (padding, punctuation) never win the maximum, even against negative similarities.
      query_keep_BxQ: bool; False query tokens add nothing. None counts all.

    Returns:
      score_BxK, float32, accumulated in float32 whatever the dtype of the vectors.

    >>> q = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> p = jnp.array([[[[1.0, 0.0], [0.5, 0.75]], [[-0.5, -0.75], [0.0, 1.0]]]])
    >>> keep = jnp.array([[[True, True], [True, False]]])
    >>> print(maxsim(q, p, keep))  # 1 + 0.75, and -0.5 - 0.75 since the second token is masked
    [[ 1.75 -1.25]]
    >>> print(maxsim(q, p, keep, jnp.array([[True, False]])))
    [[ 1.  -0.5]]
    """
    similarity_BxKxQxP = jnp.einsum(
        "bqc,bkpc->bkqp", q_BxQxC, p_BxKxPxC, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    best_BxKxQ = jnp.max(jnp.where(keep_BxKxP[:, :, None, :], similarity_BxKxQxP, MASKED_SIMILARITY), axis=-1)
    if query_keep_BxQ is not None:
        best_BxKxQ = jnp.where(query_keep_BxQ[:, None, :], best_BxKxQ, 0.0)
    return jnp.sum(best_BxKxQ, axis=-1)


def minmax(score_BxK: Array, valid_BxK: Array) -> Array:
    """Scores of each question's valid candidates stretched to [-1, 1] (method.md, step 2).

    Scores that differ by no more than float32 rounding count as equal: such a question gets zeros, and its
    gradient is zero rather than 0/0. Invalid candidates get 0.

    Args:
      score_BxK: float; entries of invalid candidates may hold anything.
      valid_BxK: bool.

    Returns:
      float32 [B, K] in [-1, 1], differentiable.

    >>> score = jnp.array([[3.0, 1.0, 2.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    >>> valid = jnp.array([[True, True, True, False], [True, True, True, True]])
    >>> print(minmax(score, valid))
    [[ 1. -1.  0.  0.]
     [ 0.  0.  0.  0.]]
    """
    score_BxK = jnp.where(valid_BxK, score_BxK.astype(jnp.float32), 0.0)
    low_Bx1 = jnp.min(jnp.where(valid_BxK, score_BxK, jnp.inf), axis=-1, keepdims=True)
    high_Bx1 = jnp.max(jnp.where(valid_BxK, score_BxK, -jnp.inf), axis=-1, keepdims=True)
    any_Bx1 = jnp.any(valid_BxK, axis=-1, keepdims=True)
    low_Bx1, high_Bx1 = jnp.where(any_Bx1, low_Bx1, 0.0), jnp.where(any_Bx1, high_Bx1, 0.0)
    span_Bx1 = high_Bx1 - low_Bx1
    rounding_Bx1 = 8 * jnp.finfo(jnp.float32).eps * jnp.maximum(jnp.abs(low_Bx1), jnp.abs(high_Bx1))
    differ_Bx1 = span_Bx1 > rounding_Bx1
    # The divisor is replaced before dividing: a `where` after 0/0 would still send NaN into the gradient.
    scaled_BxK = 2.0 * (score_BxK - low_Bx1) / jnp.where(differ_Bx1, span_Bx1, 1.0) - 1.0
    return jnp.where(valid_BxK & differ_Bx1, scaled_BxK, 0.0)


def top(score_BxK: Array, valid_BxK: Array, n: int) -> tuple[Array, Array]:
    """The n best-scored valid candidates, best first; equal scores keep their order (method.md, step 6).

    Returns:
      index_BxN int32 in [0, K), and taken_BxN bool, False where a question has fewer than n valid candidates.
      An index that is not taken is in range but means nothing.

    Raises:
      ValueError: n is not between 1 and K.

    >>> index, taken = top(jnp.array([[0.2, 0.9, 0.5]]), jnp.array([[True, False, True]]), 3)
    >>> print(index[:, :2], taken)
    [[2 0]] [[ True  True False]]
    """
    candidates = score_BxK.shape[-1]
    if not 1 <= n <= candidates:
        raise ValueError(f"cannot choose {n} of {candidates} candidates; set between 1 and {candidates}")
    _, index_BxN = jax.lax.top_k(jnp.where(valid_BxK, score_BxK.astype(jnp.float32), -jnp.inf), n)
    return index_BxN.astype(jnp.int32), jnp.take_along_axis(valid_BxK, index_BxN, axis=-1)


def sample(score_BxK: Array, valid_BxK: Array, gumbel_BxK: Array, m: int) -> tuple[Array, Array]:
    """M candidates without replacement, with probability ``softmax(score)`` over the valid ones (method.md, step 3).

    Adding standard Gumbel noise and keeping the M largest draws exactly this distribution with static shapes
    (Kool, van Hoof and Welling, arXiv 1903.06059).

    Args:
      score_BxK: normalised scores, see :func:`minmax`.
      valid_BxK: bool.
      gumbel_BxK: independent standard Gumbel noise (``jax.random.gumbel``).
      m: how many; a question with fewer valid candidates has all of them taken and the rest masked.

    Returns:
      index_BxM int32 in draw order and taken_BxM bool, as :func:`top`.

    Raises:
      ValueError: m is not between 1 and K.

    >>> score, valid = jnp.array([[1.0, -1.0, 0.0]]), jnp.ones((1, 3), bool)
    >>> index, taken = sample(score, valid, jnp.array([[-1.0, 2.5, 0.5]]), 2)
    >>> print(index, taken)  # 1.0 - 1.0, -1.0 + 2.5, 0.0 + 0.5
    [[1 2]] [[ True  True]]
    """
    return top(jax.lax.stop_gradient(score_BxK) + gumbel_BxK, valid_BxK, m)
