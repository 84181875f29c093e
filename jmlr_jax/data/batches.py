"""What training and evaluation read: prepared data, the order of questions, and batches of token ids.

Everything is memory-mapped; nothing is tokenised here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jmlr_jax.data.builders import Records, read_passages, read_questions_split
from jmlr_jax.data.schema import SPLITS, InputError, Passage, Question
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.data.tokenizers import GeneratorIds, RetrieverIds
from jmlr_jax.files import local_path

Batch = dict[str, np.ndarray]
CARD = "prepare.json"


@dataclass(frozen=True)
class Prepared:
    """A directory written by :func:`jmlr_jax.data.prepare.prepare`.

    Attributes:
        card: the content of ``prepare.json``: lengths, special token ids, fingerprints and statistics.
        suites: further splits by name, and the folder of each; see :meth:`with_suite`.
        corpus: where the passages are, if not in ``directory``.
    """

    directory: Path
    card: dict[str, Any]
    suites: Mapping[str, Path] = field(default_factory=dict)
    corpus: Path | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Prepared:
        """Opens prepared data; raises FileNotFoundError if there is none."""
        path = local_path(directory)
        if not (path / CARD).is_file():
            raise FileNotFoundError(
                f"{path / CARD}: no prepared data; first run `jmlr prepare` with the same --config and values"
            )
        try:
            return cls(path, dict(json.loads((path / CARD).read_text(encoding="utf-8"))))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path / CARD}: not a card of prepared data ({error}); run `jmlr prepare` again"
            ) from None

    def with_suite(self, name: str, folder: Path, options: int, *, own_passages: bool = False) -> Prepared:
        """The same with one more split, which :func:`jmlr_jax.data.suites.write_suite` wrote into a folder.

        Args:
            name: of the split.
            options: the most that one of its questions has.
            own_passages: the passages are those of the folder.
        """
        card = {**self.card, "max_options": max(self.card["max_options"], options)}
        corpus = folder if own_passages else self.corpus
        return replace(self, card=card, suites={**self.suites, name: folder}, corpus=corpus)

    def questions(self, split: str) -> Records[Question]:
        """The records of a split; row ``i`` here is row ``i`` of its token tables."""
        self._check(split)
        return read_questions_split(self.suites.get(split, self.directory), split)

    @cached_property
    def passages(self) -> Records[Passage]:
        """The corpus; row ``i`` here is row ``i`` of its token tables and what candidate tables speak of."""
        return read_passages(self.corpus or self.directory)

    def tokens(self, name: str) -> TokenTable:
        """A token table: ``passages`` and ``references`` (the corpus for retriever and generator), and for each split
        ``SPLIT.queries``, ``SPLIT.questions``, ``SPLIT.answers``, ``SPLIT.options`` and ``SPLIT.gold`` (rows of gold
        passages in place of tokens)."""
        if name not in self._tables:  # when asked for: a folder of passages alone has no questions
            of_corpus = self.corpus if name in ("passages", "references") else None
            folder = of_corpus or self.suites.get(name.split(".")[0], self.directory)
            self._tables[name] = TokenTable.open(folder / "tokens", name)
        return self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, TokenTable]:
        return {}

    @cached_property
    def skip_V(self) -> np.ndarray:
        """bool [V]: retriever tokens that take no part in MaxSim on the passage side."""
        return np.load(self.directory / "tokens" / "skip.npy")

    @cached_property
    def retriever_ids(self) -> RetrieverIds:
        """Special token ids and vocabulary size of the retriever's tokenizer."""
        return RetrieverIds(**self.card["retriever_ids"])

    @cached_property
    def generator_ids(self) -> GeneratorIds:
        """Special token ids and vocabulary size of the generator's tokenizer."""
        said: dict[str, Any] = self.card["generator_ids"]
        return GeneratorIds(**said | {name: tuple(said.get(name, ())) for name in ("head", "tail", "stops")})

    def tokenizer_dir(self, which: str) -> str:
        """The saved tokenizer of ``retriever`` or ``generator``."""
        return str(self.directory / "tokenizers" / which)

    def gold(self, split: str, row: int) -> np.ndarray:
        """int32 rows of the passages that are gold for a question, those no longer in the corpus left out."""
        self._check(split)
        return self.tokens(f"{split}.gold").row(row)

    def query_tokens(self, split: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(ids [..., Q], length [...])`` int32 for the retriever; filled up with [MASK] if queries are augmented."""
        self._check(split)
        ids = self.retriever_ids
        fill = ids.mask if self.card["augment_queries"] else ids.pad
        return self.tokens(f"{split}.queries").padded(rows, self.card["lengths"]["query"], fill)

    def passage_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(ids [..., P], length [...])`` int32 for the retriever; row -1 is padding of length 0."""
        return self.tokens("passages").padded(rows, self.card["lengths"]["passage"], self.retriever_ids.pad)

    def option_tokens(self, split: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(ids [B, O, A], length [B, O])`` int32: every option as an answer, end token included.

        O is the most options any question of any split has; the missing ones of a question have length 0.
        """
        self._check(split)
        folder = self.suites.get(split, self.directory)
        starts = np.load(folder / "tokens" / f"{split}.option_starts.npy", mmap_mode="r")
        rows = np.asarray(rows)
        place = starts[rows][:, None] + np.arange(self.card["max_options"])
        place = np.where(place < starts[rows + 1][:, None], place, -1)
        table = self.tokens(f"{split}.options")
        return table.padded(place, self.card["lengths"]["answer"], self.generator_ids.pad)

    def _check(self, split: str) -> None:
        if split not in SPLITS and split not in self.suites:
            raise ValueError(f"no split {split!r}; there are {', '.join((*SPLITS, *self.suites))}")


def assemble(prepared: Prepared, split: str, rows_B: np.ndarray, table_BxK: np.ndarray) -> Batch:
    """The batch of a step.

    Args:
        prepared: the data.
        split: where the questions are.
        rows_B: int [B], rows of questions.
        table_BxK: int32 [B, K], rows of their candidate passages, -1 where there is none.

    Returns:
        int32 arrays ``query_ids_BxQ query_len_B passage_ids_BxKxP passage_len_BxK reader_ids_BxKxL reader_len_BxK
        question_ids_BxS question_len_B answer_ids_BxA answer_len_B`` and bool ``valid_BxK``. A candidate that is not
        valid is padding of length 0. Gold passages are not in it: training cannot read them.

    Raises:
        ValueError: if ``table_BxK`` does not have a row for each question.
        IndexError: if a row is not in the data.
    """
    rows_B, table_BxK = np.asarray(rows_B), np.asarray(table_BxK)
    if table_BxK.ndim != 2 or len(table_BxK) != len(rows_B):
        raise ValueError(f"a candidate table of shape {table_BxK.shape} for {len(rows_B)} questions")
    if rows_B.size and rows_B.min() < 0:
        raise IndexError(f"question row {rows_B.min()}")
    lengths, pad = prepared.card["lengths"], prepared.generator_ids.pad
    batch: Batch = {}
    batch["query_ids_BxQ"], batch["query_len_B"] = prepared.query_tokens(split, rows_B)
    batch["passage_ids_BxKxP"], batch["passage_len_BxK"] = prepared.passage_tokens(table_BxK)
    references = prepared.tokens("references")
    batch["reader_ids_BxKxL"], batch["reader_len_BxK"] = references.padded(table_BxK, lengths["reference"], pad)
    questions = prepared.tokens(f"{split}.questions")
    batch["question_ids_BxS"], batch["question_len_B"] = questions.padded(rows_B, lengths["question"], pad)
    answers = prepared.tokens(f"{split}.answers")
    batch["answer_ids_BxA"], batch["answer_len_B"] = answers.padded(rows_B, lengths["answer"], pad)
    batch["valid_BxK"] = table_BxK >= 0
    return batch


def question_stream(n: int, batch: int, seed: int) -> grain.DatasetIterator:
    """An endless Grain iterator of question rows, int64 [batch], the same for equal arguments.

    Every epoch visits each of the ``n`` rows once, in an order of its own; a batch may straddle two epochs. Of several
    processes each sees all rows of a batch and reads the questions that lie on its own devices, so neither the
    questions of a step nor their places in it depend on how many there are. ``get_state()`` is a small JSON-able dict;
    ``set_state`` continues exactly there.

    Raises:
        InputError: if there is no question.
    """
    if n < 1:
        raise InputError("no questions in this split")
    rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
