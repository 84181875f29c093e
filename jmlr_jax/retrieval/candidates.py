"""Candidate tables: for every question the rows of its passages, best first, -1 where there are fewer.

A table is int32 [N, K] (docs/design.md, Candidates). Steps read nothing else of the index, so a run is as
deterministic as its tables. Gold passages appear only in :func:`recall`, a metric; no table is made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

SEARCH_CHUNK = 2048  # questions searched at once: an exact index moves its corpus to the device once per search


def build_table(
    search: Search, query_batches: Iterable[np.ndarray], questions: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages of every question, with their scores.

    Args:
      search: of an index over the corpus, ``(q_NxQxC, k)`` to rows and scores.
      query_batches: float [n, Q, C] pieces in question order, as ``retrieval.encode.encode_queries_batched`` yields
        them (what it shows of its progress then covers the searches as well).
      questions: N, how many the pieces hold in all.
      k: candidates per question.

    Returns:
      int32 [N, k], -1 on the right where the corpus holds fewer, and MaxSim float32 [N, k], -inf there.

    Raises:
      ValueError: the pieces do not hold N questions.
    """
    table_NxK, score_NxK = np.full((questions, k), -1, np.int32), np.full((questions, k), -np.inf, np.float32)
    done, waiting = 0, 0
    pieces: list[np.ndarray] = []

    def flush() -> None:
        nonlocal done, waiting
        if pieces:
            if done + waiting > questions:
                raise ValueError(f"more than {questions} encoded questions for a table of {questions} rows")
            where = slice(done, done + waiting)
            table_NxK[where], score_NxK[where] = search(np.concatenate(pieces), k)
            done, waiting = done + waiting, 0
            pieces.clear()

    for piece in query_batches:
        pieces.append(piece)
        waiting += len(piece)
        if waiting >= SEARCH_CHUNK:
            flush()
    flush()
    if done != questions:
        raise ValueError(f"{done} encoded questions for a table of {questions} rows")
    return table_NxK, score_NxK


def random_table(questions: int, passages: int, k: int, seed: int) -> np.ndarray:
    """k different passages per question, uniform, int32 [N, k]; -1 on the right where the corpus holds fewer."""
    table_NxK = np.full((questions, k), -1, np.int32)
    rng = np.random.default_rng(seed)
    take = min(k, passages)
    for row in table_NxK:
        row[:take] = rng.choice(passages, take, replace=False, shuffle=True)
    return table_NxK


def mixed_table(parts: Mapping[str, tuple[np.ndarray, int]], k: int, seed: int) -> np.ndarray:
    """Candidates from several tables, in a random order, as the generator's warm-up reads them.

    From each part in turn come its best ``count`` passages that the row does not hold yet; what is then still free
    is filled from the parts' further passages, one from each at a time. The order within a row is shuffled, so that
    the position of a passage does not tell where it came from.

    Args:
      parts: name -> (table int32 [N, any], count): all with the same N; counts add up to at most k.
      k: width of the result.
      seed: of the shuffling.

    Returns:
      int32 [N, k], every passage at most once a row, -1 on the right where the parts hold fewer.

    Raises:
      ValueError: no parts, tables of different N, or counts above k.

    >>> retrieved, lexical = np.array([[5, 3, 8]]), np.array([[3, 9, -1]])
    >>> sorted(mixed_table({"retrieved": (retrieved, 2), "bm25": (lexical, 1)}, 4, seed=0)[0].tolist())
    [3, 5, 8, 9]
    """
    sizes = {name: len(table) for name, (table, _) in parts.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"tables of the same number of questions are needed; got {sizes}")
    if sum(count for _, count in parts.values()) > k:
        raise ValueError(f"counts { ({name: count for name, (_, count) in parts.items()}) } add up to more than k={k}")
    questions = next(iter(sizes.values()))
    rng = np.random.default_rng(seed)
    mixed_NxK = np.full((questions, k), -1, np.int32)
    for i in range(questions):
        chosen: dict[int, None] = {}  # keeps order, holds each passage once
        left = [iter([int(r) for r in table[i] if r >= 0]) for table, _ in parts.values()]
        for rows, (_, count) in zip(left, parts.values(), strict=True):
            _take(rows, chosen, count)
        while len(chosen) < k:
            before = len(chosen)
            for rows in left:
                if len(chosen) < k:
                    _take(rows, chosen, 1)
            if len(chosen) == before:
                break
        mixed_NxK[i, : len(chosen)] = rng.permutation(np.fromiter(chosen, np.int32, len(chosen)))
    return mixed_NxK


def _take(rows: Iterable[int], chosen: dict[int, None], count: int) -> None:
    """Moves the next ``count`` rows that are new into ``chosen``."""
    if count == 0:
        return
    for row in rows:
        if row not in chosen:
            chosen[row] = None
            count -= 1
            if count == 0:
                return


def overlap(a_NxK: np.ndarray, b_NxK: np.ndarray) -> float:
    """Index staleness: mean over questions of |a and b| / max(|a|, |b|); 1 for the same sets, empty ones included.

    >>> overlap(np.array([[1, 2], [3, -1]]), np.array([[2, 1], [4, -1]]))
    0.5

    Raises:
      ValueError: tables of different numbers of questions, or of none.
    """
    if len(a_NxK) != len(b_NxK) or not len(a_NxK):
        raise ValueError(f"tables of the same, positive number of questions are needed; got {len(a_NxK)}, {len(b_NxK)}")
    found = []
    for a, b in zip(a_NxK, b_NxK, strict=True):
        one, other = set(a[a >= 0].tolist()), set(b[b >= 0].tolist())
        found.append(len(one & other) / max(len(one), len(other)) if one or other else 1.0)
    return float(np.mean(found))


def recall(table_NxK: np.ndarray, gold: Sequence[Sequence[int]], ks: Sequence[int]) -> dict[int, float]:
    """Mean fraction of a question's gold passages among its k best, for each k; questions without gold do not count.

    >>> recall(np.array([[7, 2, 5], [1, -1, -1]]), [[2, 9], []], (1, 2))
    {1: 0.0, 2: 0.5}

    Raises:
      ValueError: another number of gold lists than questions, no question with gold, or a k wider than the table.
    """
    if len(gold) != len(table_NxK):
        raise ValueError(f"{len(gold)} gold lists for {len(table_NxK)} questions")
    if max(ks) > table_NxK.shape[1]:
        raise ValueError(f"recall at {max(ks)} needs a table of that width; this one has {table_NxK.shape[1]}")
    judged = [(row, set(g)) for row, g in zip(table_NxK, gold, strict=True) if len(g)]
    if not judged:
        raise ValueError("no question has a gold passage: there is no recall to report")
    return {k: float(np.mean([len(g.intersection(row[:k].tolist())) / len(g) for row, g in judged])) for k in ks}
