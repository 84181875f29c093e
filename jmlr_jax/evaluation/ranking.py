"""How well passages are ranked, in plain numpy: one value per question, so that the same values feed a mean, a
bootstrap interval and a paired comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def hits(table_NxK: ArrayLike, gold_NxG: ArrayLike) -> NDArray[np.bool_]:
    """Whether the passage at each rank is a gold one, ``[N, K]``.

    Args:
      table_NxK: passage rows, best first; -1 where there is none.
      gold_NxG: gold passage rows in any order; -1 where there is none.
    """
    table, gold = np.asarray(table_NxK), np.asarray(gold_NxG)
    if table.ndim != 2 or gold.ndim != 2 or len(table) != len(gold):
        raise ValueError(f"expected table [N, K] and gold [N, G], got {table.shape} and {gold.shape}")
    found = np.zeros(table.shape, bool)
    for g in range(gold.shape[1]):  # a loop over G keeps memory at N x K
        found |= (table == gold[:, g : g + 1]) & (table >= 0)
    return found


def hit_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int) -> Values:
    """1 where any gold passage stands among the first k, else 0; NaN for a question without gold passages.

    One gold passage is enough to answer from, so open-domain QA calls this top-k accuracy or recall; with a single
    gold passage it equals hit@k.

    >>> hit_at([[4, 2, -1], [5, 6, 7], [1, 2, 3]], [[2, -1], [-1, -1], [9, 8]], 2)
    array([ 1., nan,  0.])
    """
    return _with_gold(hits(table_NxK, gold_NxG)[:, :k].any(1).astype(np.float64), gold_NxG)


def mrr_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int = 10) -> Values:
    """Reciprocal rank of the first gold passage among the first k, 0 when there is none; NaN without gold.

    >>> mrr_at([[4, 2], [5, 6]], [[2], [9]])
    array([0.5, 0. ])
    """
    found = hits(table_NxK, gold_NxG)[:, :k]
    rank = found.argmax(1) + 1 if found.shape[1] else np.ones(len(found))
    return _with_gold(np.where(found.any(1), 1 / rank, 0.0), gold_NxG)


def ndcg_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int = 10) -> Values:
    """Normalised discounted cumulative gain over the first k with gains 0 and 1; NaN for a question without gold.

    >>> ndcg_at([[4, 2, 7]], [[2, 4]]).round(4)  # both on top, in either order
    array([1.])
    >>> ndcg_at([[4, 2, 7]], [[2, 9]]).round(4)  # (1 / log2 3) / (1 + 1 / log2 3)
    array([0.3869])
    """
    found = hits(table_NxK, gold_NxG)[:, :k].astype(np.float64)
    discount = 1 / np.log2(np.arange(2, k + 2))
    gold_count = np.minimum(_gold_count(gold_NxG), k)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[gold_count]
    return _with_gold(found @ discount[: found.shape[1]] / np.where(ideal > 0, ideal, 1.0), gold_NxG)


def ranking_summary(table_NxK: ArrayLike, gold_NxG: ArrayLike, hit_ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Means over the questions that have gold passages: ``hit@k`` for each k, ``mrr@10``, ``ndcg@10`` and ``n``.

    ``n`` is the number of questions averaged; with n = 0 the means are left out.
    """
    n = int((_gold_count(gold_NxG) > 0).sum())
    if n == 0:
        return {"n": 0}
    summary = {f"hit@{k}": float(np.nanmean(hit_at(table_NxK, gold_NxG, k))) for k in hit_ks}
    summary["mrr@10"] = float(np.nanmean(mrr_at(table_NxK, gold_NxG)))
    summary["ndcg@10"] = float(np.nanmean(ndcg_at(table_NxK, gold_NxG)))
    return {**summary, "n": n}


def _gold_count(gold_NxG: ArrayLike) -> NDArray[np.int64]:
    # Distinct rows only: a gold passage listed twice can be found once.
    return np.array([len(set(row[row >= 0].tolist())) for row in np.asarray(gold_NxG)], np.int64)


def _with_gold(values: ArrayLike, gold_NxG: ArrayLike) -> Values:
    return np.where(_gold_count(gold_NxG) > 0, values, np.nan).astype(np.float64)
