"""Batches of the reading warm-up (``train.warmup``; what it is for stands in ``WarmupConfig``)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from jmlr_jax.data.batches import Batch, assemble
from jmlr_jax.retrieval.candidates import mixed_table
from jmlr_jax.run.candidates import bm25_table, fixed_table
from jmlr_jax.run.open import Run

OTHERS = 16  # passages per question that need not state the answer, half of them BM25's


class ReadingLessons:
    """One passage per question: often one that states the answer, otherwise one that BM25 or chance finds.

    Args:
      run: its seed and ``train.warmup`` decide everything.
    """

    def __init__(self, run: Run):
        self.run = run
        self.distant = bm25_table(run, "train", run.cfg.train.warmup.distant_depth, with_answer=True)
        parts = {source: (fixed_table(run, source, "train", OTHERS), OTHERS // 2) for source in ("bm25", "random")}
        self.others = mixed_table(parts, OTHERS, run.seed("lessons"))

    def batch(self, step: int, rows: np.ndarray, held: np.ndarray) -> Batch:
        """The rows `held` of the batch of a step; equal for equal seed, step and rows.

        All draws are for the whole batch, so that it does not depend on who makes which part of it.
        """
        rng = np.random.default_rng(self.run.seed("lessons", step))
        near = self.pick(rng, self.distant[rows])
        other = self.pick(rng, self.others[rows])
        table_Bx1 = np.where(rng.random(len(rows)) < self._distant_probability(step), near, other)[:, None]
        batch = assemble(self.run.prepared, "train", rows, table_Bx1)
        batch = rename(batch, self.renamed, rng) if len(self.renamed) else batch
        return {name: x_B[held] for name, x_B in batch.items()}

    def _distant_probability(self, step: int) -> float:
        first, last = self.run.cfg.train.warmup.distant_probability
        return first + (last - first) * step / self.run.cfg.train.warmup.steps

    @cached_property
    def renamed(self) -> np.ndarray:
        """Sorted ids of the generator's tokens that renaming exchanges: of training answers, not special ones, and in
        no more passages than ``train.warmup.rename`` allows (of real language the common words had better stay)."""
        prepared = self.run.prepared
        ids, most = prepared.generator_ids, self.run.cfg.train.warmup.rename
        rows = np.arange(len(prepared.questions("train")))
        answers, _ = prepared.tokens("train.answers").padded(rows, prepared.card["lengths"]["answer"], ids.pad)
        found = np.setdiff1d(answers, [ids.pad, ids.bos, ids.eos])
        if most == 1:
            return found
        held = self._passages_with()[found]
        return found[(held > 0) & (held <= most * len(prepared.passages))]

    def _passages_with(self) -> np.ndarray:
        """int64 [V]: how many passages hold a token of the generator."""
        table, size = self.run.prepared.tokens("references"), self.run.prepared.generator_ids.vocab_size
        row = np.repeat(np.arange(len(table.offsets) - 1), np.diff(table.offsets))
        return np.bincount(np.unique(row * size + table.ids) % size, minlength=size)

    @staticmethod
    def pick(rng: np.random.Generator, table_BxK: np.ndarray) -> np.ndarray:
        """One valid passage of each row at random; -1 where there is none."""
        valid = (table_BxK >= 0).sum(1)
        place = (rng.random(len(table_BxK)) * np.maximum(valid, 1)).astype(np.int64)
        return table_BxK[np.arange(len(table_BxK)), place]


def rename(batch: Batch, tokens: np.ndarray, rng: np.random.Generator) -> Batch:
    """Exchanges the given generator tokens at random, another exchange for each example, alike in all its pieces.

    Args:
      batch: from ``assemble``; not changed.
      tokens: distinct ids; each is replaced by another of them (or itself), everything else stays.
      rng: draws the permutations.
    """
    size = max(int(tokens.max()), *(int(batch[name].max()) for name in _PIECES)) + 1
    renamed = dict(batch)
    table_BxV = np.tile(np.arange(size, dtype=np.int32), (len(batch["question_len_B"]), 1))
    table_BxV[:, tokens] = rng.permuted(np.tile(tokens.astype(np.int32), (len(table_BxV), 1)), axis=1)
    for name in _PIECES:
        flat = batch[name].reshape(len(table_BxV), -1)
        renamed[name] = np.take_along_axis(table_BxV, flat, axis=1).reshape(batch[name].shape)
    return renamed


_PIECES = ("reader_ids_BxKxL", "question_ids_BxS", "answer_ids_BxA")
