"""Prompts assembled on the device from pieces that were tokenised once: BOS, passages, question, answer.

Pieces are right-padded blocks of fixed width, so the whole has a static shape; their padding is squeezed out by one
gather, which leaves every prompt right-padded. One place decides what fits: :func:`read_prompt` drops passages from
the first that does not fit on, best kept, and counts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

Piece = tuple[Array, Array]  # ids int32 [B, width], length int32 [B]
Begin = int | tuple[int, ...]


def join_pieces(pieces: Sequence[Piece], bos_id: Begin, pad_id: int, total: int) -> tuple[Array, Array]:
    """One right-padded row per example: BOS, then the real tokens of each piece in order.

    Args:
      bos_id: what every row begins with: BOS, or in its place the opening of a chat template.
      pieces: right-padded ids with their lengths; a piece of length 0 vanishes.
      total: T, width of the result; the caller sees to it that every row fits.

    Returns:
      ``tokens_BxT`` int32 and ``length_B`` int32, BOS counted.

    >>> a = jnp.array([[5, 6], [7, 0]]), jnp.array([2, 1])
    >>> b = jnp.array([[8], [9]]), jnp.array([1, 1])
    >>> tokens, length = join_pieces([a, b], bos_id=1, pad_id=0, total=5)
    >>> print(tokens, length)
    [[1 5 6 8 0]
     [1 7 9 0 0]] [4 3]
    """
    rows = pieces[0][0].shape[0]
    begin = jnp.atleast_1d(jnp.asarray(bos_id, jnp.int32))
    ids = [jnp.broadcast_to(begin, (rows, len(begin))), *(ids for ids, _ in pieces)]
    real = [jnp.ones((rows, len(begin)), bool), *(jnp.arange(ids.shape[1]) < length[:, None] for ids, length in pieces)]
    ids_BxW, real_BxW = jnp.concatenate(ids, axis=1), jnp.concatenate(real, axis=1)
    width = ids_BxW.shape[1]
    # Sorting "is padding" stably moves the real tokens to the front and keeps their order.
    order_BxT = jnp.argsort(~real_BxW, axis=1, stable=True)[:, : min(total, width)]
    length_B = jnp.sum(real_BxW, axis=1, dtype=jnp.int32)
    tokens_BxT = jnp.take_along_axis(ids_BxW, order_BxT, axis=1)
    tokens_BxT = jnp.where(jnp.arange(tokens_BxT.shape[1]) < length_B[:, None], tokens_BxT, pad_id)
    return jnp.pad(tokens_BxT, ((0, 0), (0, total - tokens_BxT.shape[1])), constant_values=pad_id), length_B


def begin_length(bos_id: Begin) -> int:
    """Tokens that a prompt begins with: 1, or those of a chat template's opening."""
    return len(bos_id) if isinstance(bos_id, tuple) else 1


def reading_width(batch: dict[str, Array], max_length: int, answer: int, bos_id: Begin) -> int:
    """Tokens that a reading prompt of the batch can reach: BOS, K passages of L, a question of S and `answer` more, or
    `max_length` if that is less. Wider rows would hold padding alone."""
    _, K, L = batch["reader_ids_BxKxL"].shape
    return min(max_length, begin_length(bos_id) + K * L + batch["question_ids_BxS"].shape[1] + answer)


def read_prompt(
    batch: dict[str, Array], *, total: int, bos_id: Begin, pad_id: int, answer: Piece | None = None
) -> tuple[Array, Array, Array]:
    """Prompt of method.md, step 6: BOS, passages worst first and best last, question, and the answer if given.

    Args:
      batch: ``reader_ids_BxKxL reader_len_BxK`` (best first, length 0 where there is none), ``question_ids_BxS
        question_len_B``; all passages that fit are read.
      total: T, width of the prompt. From the first passage on that does not fit, passages are dropped.
      answer: tokens after the question, end token included.

    Returns:
      ``tokens_BxT`` and ``length_B`` int32, ``dropped_B`` int32, passages that did not fit.
    """
    tail = [(batch["question_ids_BxS"], batch["question_len_B"])] + ([] if answer is None else [answer])
    length_BxK = batch["reader_len_BxK"]
    room_B = jnp.asarray(total - begin_length(bos_id) - sum(length_B for _, length_B in tail))
    keep_BxK = jnp.cumsum(length_BxK, axis=1) <= room_B[:, None]
    dropped_B = jnp.sum((length_BxK > 0) & ~keep_BxK, axis=1)
    length_BxK = jnp.where(keep_BxK, length_BxK, 0)
    worst_first = reversed(range(length_BxK.shape[1]))
    passages = [(batch["reader_ids_BxKxL"][:, k], length_BxK[:, k]) for k in worst_first]
    tokens_BxT, length_B = join_pieces([*passages, *tail], bos_id, pad_id, total)
    return tokens_BxT, length_B, dropped_B
