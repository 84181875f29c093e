"""Whether the judge can tell: its judgements of passages that are known to be right, tried every few steps.

The retriever learns from nothing but the generator's judgements, so these are to be watched. A fixed sample of dev
questions is judged with a gold passage of each, lexical ones (BM25's best that are not gold) and random ones. Gold
passages are read here for a metric alone; nothing that trains sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jmlr_jax.data.batches import assemble
from jmlr_jax.parallel.placement import addressable_rows, place_batch
from jmlr_jax.retrieval.candidates import random_table
from jmlr_jax.retrieval.vectors import drawn_rows
from jmlr_jax.run.candidates import bm25_table
from jmlr_jax.run.open import Run
from jmlr_jax.training.program import PhaseProgram

LEXICAL, RANDOM = 3, 2
HIT = "judge/hit"


def on_dev(
    run: Run, compute: Callable[[dict[str, jax.Array]], jax.Array], rows_P: np.ndarray, table_PxK: np.ndarray
) -> np.ndarray:
    """What `compute` gives of a batch, [P, ...], for these dev questions with these passages, one question or more.

    It is asked in batches of one compiled shape; the last is filled up with the first questions again.
    """
    size, count, made = run.cfg.train.batch_size, len(rows_P), []
    for first in range(0, count, size):
        rows, held = np.arange(first, first + size) % count, addressable_rows(run.mesh, size)
        batch = assemble(run.prepared, "dev", rows_P[rows[held]], table_PxK[rows[held]])
        made.append(np.asarray(compute(place_batch(run.mesh, batch, held, size)))[: count - first])
    return np.concatenate(made)


class JudgeProbe:
    """The trials of one phase.

    Attributes:
      rows: of the dev questions.
      table_PxK: their passages: the first gold one, then lexical ones, then random ones; -1 where there is none.
    """

    def __init__(self, run: Run, program: PhaseProgram):
        self._run, self._program = run, program
        gold = run.gold("dev") if run.cfg.train.probe_questions else []
        having = np.array([row for row, found in enumerate(gold) if found], np.int64)
        chosen = drawn_rows(len(having), run.cfg.train.probe_questions, run.seed("judge probe"))
        self.rows = having[chosen]
        self.table_PxK = self._passages([set(gold[row]) for row in self.rows])

    def _passages(self, gold: list[set[int]]) -> np.ndarray:
        passages, spare = len(self._run.prepared.passages), max(map(len, gold), default=0)
        if not gold:
            return np.zeros((0, 1 + LEXICAL + RANDOM), np.int32)
        lexical = bm25_table(self._run, "dev", LEXICAL + spare)[self.rows]
        chance = random_table(len(gold), passages, RANDOM + LEXICAL + spare, self._run.seed("judge probe", "random"))
        table = np.full((len(gold), 1 + LEXICAL + RANDOM), -1, np.int32)
        for row, (right, near, far) in enumerate(zip(gold, lexical, chance, strict=True)):
            near = [p for p in near if p >= 0 and p not in right][:LEXICAL]
            far = [p for p in far if p >= 0 and p not in right and p not in near][:RANDOM]
            table[row, 0] = min(right)
            table[row, 1 : 1 + len(near)] = near
            table[row, 1 + LEXICAL : 1 + LEXICAL + len(far)] = far
        return table

    def measure(self, params: Any, frozen: Any) -> dict[str, float]:
        """What the judge makes of the trials, empty where there is none.

        ``judge/hit``: share of questions whose gold passage is judged the best. ``judge/lexical judge/random``: how
        often it is judged better than one of these, an equal judgement being half. ``judge/gap``: nats per token by
        which it leads another, median. ``judge/noise``: nats per token that two passages which are not
        gold lie apart, median: what a retriever should not learn from.
        """
        if not len(self.rows):
            return {}
        judge = partial(self._program.probe, params, frozen)
        nll_PxK, there_PxK = on_dev(self._run, judge, self.rows, self.table_PxK), self.table_PxK >= 0
        right_Px1, other_PxJ, there_PxJ = nll_PxK[:, :1], nll_PxK[:, 1:], there_PxK[:, 1:]
        other_PxJ = np.where(there_PxJ, other_PxJ, np.nan)
        better_PxJ = (right_Px1 < other_PxJ) + 0.5 * (right_Px1 == other_PxJ)
        apart = np.abs(other_PxJ[:, :, None] - other_PxJ[:, None])[:, *np.triu_indices(LEXICAL + RANDOM, 1)]
        found = {
            HIT: np.mean(right_Px1[:, 0] < np.nanmin(other_PxJ, axis=1, initial=np.inf)),
            "judge/lexical": _mean(better_PxJ[:, :LEXICAL][there_PxJ[:, :LEXICAL]]),
            "judge/random": _mean(better_PxJ[:, LEXICAL:][there_PxJ[:, LEXICAL:]]),
            "judge/gap": _median((other_PxJ - right_Px1)[there_PxJ]),
            "judge/noise": _median(apart[~np.isnan(apart)]),
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def fallen(self, first: float, now: float) -> str | None:
        """What to say where the judge has become worse than it was at first, beyond two standard errors."""
        error = math.sqrt(2 * max(first * (1 - first), 0.02) / max(len(self.rows), 1))
        if now >= first - 2 * error:
            return None
        return (
            f"the judge puts the right passage first for {now:.0%} of {len(self.rows)} dev questions, {first:.0%} at "
            "the start of this phase: the retriever learns from worse judgements now (train.judge_decay)"
        )


def _mean(x: np.ndarray) -> float | None:
    return float(np.mean(x)) if x.size else None


def _median(x: np.ndarray) -> float | None:
    return float(np.median(x)) if x.size else None
