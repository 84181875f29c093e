"""Reads rows in batches of few sizes: prompts of one question or of several, scored and continued together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jmlr_jax.answering.program import ROWS, next_tokens, prompt_widths, read_rows, smallest
from jmlr_jax.config import Config
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.schema import MAX_OPTIONS
from jmlr_jax.evaluation.reading import Reader
from jmlr_jax.method.prompt import begin_length, reading_width

Passages = tuple[np.ndarray, np.ndarray]  # ids int32 [K, L], lengths int32 [K], best first


@dataclass(eq=False)
class Row:
    """One prompt to be read, and what was found.

    Attributes:
      passages: of its question.
      read: places of those that are read here.
      question: token ids.
      options: token ids of what is scored after the prompt, at most 10.
      writes: whether the reader is to write an answer.
      wanted: whether anybody still waits for it; asked before each token.
      scored, wrote: told as soon as `nll` is there, and after every token.
      nll: of each option.
      tokens, logp: what the reader wrote, the end token included, and the log-probability of each token.
      dropped: how many of the passages read did not fit, the worst.
    """

    passages: Passages
    read: tuple[int, ...]
    question: np.ndarray
    options: Sequence[np.ndarray] = ()
    writes: bool = False
    wanted: Callable[[], bool] = lambda: True
    scored: Callable[[], None] = lambda: None
    wrote: Callable[[], None] = lambda: None
    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    dropped: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the passages read, 0 for the others, int32 [K]."""
        kept = np.zeros(len(self.passages[1]), np.int32)
        kept[list(self.read)] = self.passages[1][list(self.read)]
        return kept


class RowReader:
    """Reads rows with any reader of one shape.

    Args:
      prepared: lengths and special tokens.
      cfg: ``generator.max_length`` and ``train.read_passages``, the most passages of a prompt.
    """

    def __init__(self, prepared: Prepared, cfg: Config):
        lengths = prepared.card["lengths"]
        self.ids, self.most = prepared.generator_ids, cfg.train.read_passages
        self._L, self._S, self._A = lengths["reference"], lengths["question"], lengths["answer"]
        empty = self._batch([], 1)
        full = reading_width(empty, cfg.generator.max_length, self._A, self.ids.begin) - self._A
        self.widths = prompt_widths(full)

    def read(self, reader: Reader, rows: Sequence[Row]) -> None:
        """Reads all rows and fills them in."""
        for width, together in self._grouped(rows):
            self._read(reader, together, width)

    def compile(self, reader: Reader, told: Callable[[int, int], None]) -> None:
        """Compiles every shape for a reader; `told` takes how many of how many are done."""
        shapes = [(size, width) for width in self.widths for size in ROWS]
        for done, (size, width) in enumerate(shapes, 1):
            self._read(reader, [], width, size)
            told(done, len(shapes))

    def _grouped(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
        """Rows by the width they need, at most the largest batch at once; those that write come first."""
        for writes in (True, False):
            by_width: dict[int, list[Row]] = {}
            for row in rows:
                if row.writes == writes:
                    needed = begin_length(self.ids.begin) + int(row.lengths.sum()) + len(row.question)
                    width = smallest(self.widths, needed)
                    by_width.setdefault(width, []).append(row)
            for width, group in by_width.items():
                for first in range(0, len(group), ROWS[-1]):
                    yield width, group[first : first + ROWS[-1]]

    def _read(self, reader: Reader, rows: Sequence[Row], width: int, size: int | None = None) -> None:
        size = size or smallest(ROWS, len(rows))
        count = np.int32(max((len(row.options) for row in rows), default=1))
        found, cache = read_rows(
            reader.params, reader.adapters, self._batch(rows, size), count, cfg=reader.cfg, ids=self.ids, width=width
        )
        nll, dropped = np.asarray(found["nll"]), np.asarray(found["dropped"])
        for i, row in enumerate(rows):
            row.nll, row.dropped = nll[i, : len(row.options)].tolist(), int(dropped[i])
            row.scored()
        if not rows or any(row.writes for row in rows):
            self._write(reader, rows, found, cache)

    def _write(self, reader: Reader, rows: Sequence[Row], found: dict[str, Any], cache: Any) -> None:
        """Continues the rows that write until each has ended; without rows for a token, to compile."""
        token, logp, at_B = found["token"], found["logp"], np.asarray(found["length"])
        for made in range(1, self._A + 1):
            writing = [row for row in rows if row.writes and (not row.tokens or row.tokens[-1] not in self.ids.ends)]
            writing = [row for row in writing if row.wanted()]
            if rows and not writing:
                return
            said, sure = np.asarray(token), np.asarray(logp)
            for i, row in enumerate(rows):
                if any(row is each for each in writing):
                    row.tokens.append(int(said[i]))
                    row.logp.append(float(sure[i]))
                    row.wrote()
            if made == self._A:
                return
            token, logp, cache = next_tokens(reader.params, reader.adapters, cache, token, at_B, cfg=reader.cfg)
            at_B = at_B + np.int32(1)
            if not rows:
                return

    def _batch(self, rows: Sequence[Row], size: int) -> dict[str, Any]:
        """The arrays of a call; rows that only fill it up have a prompt of their begin token."""
        pad = self.ids.pad
        batch = {
            "reader_ids_BxKxL": np.full((size, self.most, self._L), pad, np.int32),
            "reader_len_BxK": np.zeros((size, self.most), np.int32),
            "question_ids_BxS": np.full((size, self._S), pad, np.int32),
            "question_len_B": np.zeros(size, np.int32),
            "option_ids_BxOxA": np.full((size, MAX_OPTIONS, self._A), pad, np.int32),
            "option_len_BxO": np.zeros((size, MAX_OPTIONS), np.int32),
        }
        for i, row in enumerate(rows):
            batch["reader_ids_BxKxL"][i], batch["reader_len_BxK"][i] = row.passages[0], row.lengths
            batch["question_ids_BxS"][i, : len(row.question)] = row.question
            batch["question_len_B"][i] = len(row.question)
            for o, ids in enumerate(row.options):
                batch["option_ids_BxOxA"][i, o, : len(ids)] = ids
                batch["option_len_BxO"][i, o] = len(ids)
        return batch
