"""Rankings put together and written out: reciprocal rank fusion, and the run files of TREC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jmlr_jax.files import write_text
from jmlr_jax.retrieval.tokens import best_of

RANK_OFFSET = 60  # of Cormack, Clarke and Buettcher (SIGIR 2009)


def reciprocal_rank(rankings: Mapping[str, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Several rankings of the same questions as one: a passage scores the sum of ``1 / (60 + rank)`` (Cormack et al.).

    Args:
      rankings: name -> rows int32 [N, any], best first, -1 padding, every row at most once a question.
      k: how many to keep.

    Returns:
      rows int32 [N, k], -1 where there is no further one, and scores float32 [N, k], -inf there; ties in row order.

    Raises:
      ValueError: no rankings, or rankings of different numbers of questions.

    >>> words, vectors = np.array([[4, 7, -1]]), np.array([[7, 2, 4]])
    >>> rows, scores = reciprocal_rank({"bm25": words, "maxsim": vectors}, 2)
    >>> print(rows, scores.round(4))  # 1/61 + 1/62, and 1/61 + 1/63
    [[7 4]] [[0.0325 0.0323]]
    """
    if len({len(rows) for rows in rankings.values()}) != 1:
        sizes = {name: len(rows) for name, rows in rankings.items()}
        raise ValueError(f"rankings of the same questions are needed; got {sizes}")
    every_NxR = np.concatenate(list(rankings.values()), axis=1)
    worth = [1 / (RANK_OFFSET + 1 + np.arange(rows.shape[1])) for rows in rankings.values()]
    worth_NxR = np.where(every_NxR >= 0, np.concatenate(worth), 0.0)
    # Equal rows stand together once sorted; the first of a group gets the sum of all.
    order = np.argsort(every_NxR, axis=1, kind="stable")
    row, value = np.take_along_axis(every_NxR, order, 1), np.take_along_axis(worth_NxR, order, 1)
    first = np.ones(row.shape, bool)
    first[:, 1:] = row[:, 1:] != row[:, :-1]
    total = np.zeros(row.shape)
    group = np.cumsum(first, axis=1) - 1
    np.add.at(total, (np.arange(len(row))[:, None], group), value)
    score = np.take_along_axis(total, group, 1)
    return best_of(np.where(first, row, -1), np.where(first, score, -np.inf), k)


def write_trec(
    path: Path | str,
    question_ids: Sequence[str],
    passage_ids: Sequence[str] | Mapping[int, str],
    rows_NxK: np.ndarray,
    score_NxK: np.ndarray,
    tag: str,
) -> None:
    """A run file as ``trec_eval`` reads it: ``question Q0 passage rank score tag``, ranks from 1; whole or not at all.

    Args:
      path: the file.
      question_ids: N of them.
      passage_ids: by row of the corpus.
      rows_NxK, score_NxK: as a search returns them.
      tag: name of the system.

    Raises:
      ValueError: an id or the tag is empty or holds white space, which separates the fields.
    """
    lines = []
    for question, rows, scores in zip(question_ids, rows_NxK, score_NxK, strict=True):
        for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1):
            if row >= 0:
                fields = (question, passage_ids[row], tag)
                if bad := [field for field in fields if len(field.split()) != 1]:
                    raise ValueError(f"{bad[0]!r}: a TREC run needs ids and tags without white space")
                lines.append(f"{question} Q0 {passage_ids[row]} {rank} {score:.6f} {tag}\n")
    write_text(path, "".join(lines))
