"""Prompts joined on the device: order, what is dropped, and widths; the docstring's example runs as a test."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.method import prompt as module
from jmlr_jax.method.prompt import join_pieces, read_prompt

BOS, PAD = 1, 0
# Two questions, three passages best first: tokens 10, 20, 30 stand for the first, second and third.
BATCH = {
    "reader_ids_BxKxL": jnp.array([[[10, 11, 12], [20, 0, 0], [30, 31, 0]], [[10, 0, 0], [20, 21, 22], [0, 0, 0]]]),
    "reader_len_BxK": jnp.array([[3, 1, 2], [1, 3, 0]]),
    "question_ids_BxS": jnp.array([[5, 6], [7, 0]]),
    "question_len_B": jnp.array([2, 1]),
}
ANSWER = jnp.array([[8, 9], [8, 0]]), jnp.array([2, 1])


def prompts(total: int, batch: dict = BATCH, answer: tuple | None = ANSWER) -> tuple[list[list[int]], list[int]]:
    """Real tokens of each row, and how many passages were dropped; what follows must be padding."""
    tokens, length, dropped = read_prompt(batch, total=total, bos_id=BOS, pad_id=PAD, answer=answer)
    assert tokens.shape == (len(batch["question_len_B"]), total) and tokens.dtype == length.dtype == jnp.int32
    for row, n in zip(tokens, length, strict=True):
        assert n <= total and not row[n:].any()
    return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)], dropped.tolist()


def test_docstring() -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 4 and result.failed == 0


def test_worst_first_best_last_then_question_then_answer() -> None:
    rows, dropped = prompts(14)
    assert rows == [[1, 30, 31, 20, 10, 11, 12, 5, 6, 8, 9], [1, 20, 21, 22, 10, 7, 8]]
    assert dropped == [0, 0]  # a place without passage is not a passage dropped


def test_without_answer_the_question_is_last() -> None:
    rows, _ = prompts(14, answer=None)
    assert [row[-1] for row in rows] == [6, 7]


@pytest.mark.parametrize(
    ("total", "first", "dropped"),
    [
        (11, [30, 31, 20, 10, 11, 12], 0),
        (10, [20, 10, 11, 12], 1),
        (9, [20, 10, 11, 12], 1),
        (8, [10, 11, 12], 2),
        (7, [], 3),
        (5, [], 3),
    ],
)
def test_passages_are_dropped_worst_first_and_counted(total: int, first: list[int], dropped: int) -> None:
    """At 7 the third passage alone would fit, but a worse passage is never read in place of a better one."""
    one = {name: x[:1] for name, x in BATCH.items()}
    rows, count = prompts(total, one, tuple(x[:1] for x in ANSWER))
    assert rows == [[1, *first, 5, 6, 8, 9]] and count == [dropped]


def test_a_row_that_fits_is_not_touched_by_one_that_does_not() -> None:
    rows, dropped = prompts(8)
    assert dropped == [2, 0] and rows[1] == [1, 20, 21, 22, 10, 7, 8]


def test_no_passages_at_all() -> None:
    empty = BATCH | {"reader_ids_BxKxL": jnp.zeros((2, 0, 3), jnp.int32), "reader_len_BxK": jnp.zeros((2, 0), int)}
    none = BATCH | {"reader_len_BxK": jnp.zeros((2, 3), int)}
    for batch in (empty, none):
        assert prompts(6, batch) == ([[1, 5, 6, 8, 9], [1, 7, 8]], [0, 0])


def test_wider_than_its_pieces_is_padding_and_narrower_keeps_what_is_real() -> None:
    piece = jnp.array([[4, 3, 0, 0], [2, 0, 0, 0]]), jnp.array([2, 1])
    tokens, length = join_pieces([piece, piece], BOS, 99, 12)
    assert tokens.tolist() == [[1, 4, 3, 4, 3] + [99] * 7, [1, 2, 2] + [99] * 9] and length.tolist() == [5, 3]
    tokens, _ = join_pieces([piece, piece], BOS, 99, 5)
    assert tokens.tolist() == [[1, 4, 3, 4, 3], [1, 2, 2, 99, 99]]


def test_agrees_with_lists_on_random_pieces() -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(0, w + 1, 6) for w in (3, 5, 2)]
    ids = [rng.integers(2, 50, (6, w)) for w in (3, 5, 2)]  # the padding of a piece may hold anything
    pieces = [(jnp.asarray(i), jnp.asarray(n)) for i, n in zip(ids, lengths, strict=True)]
    tokens, length = jax.jit(lambda p: join_pieces(p, BOS, PAD, 11))(pieces)
    for b in range(6):
        expected = [BOS, *(t for i, n in zip(ids, lengths, strict=True) for t in i[b, : n[b]].tolist())]
        assert tokens[b].tolist() == expected + [PAD] * (11 - len(expected)) and length[b] == len(expected)
