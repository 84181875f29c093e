"""Turns every question and passage into token rows, once; what did not fit is cut by rule and counted.

Rules, when a piece is longer than its configured length:

* retriever queries and passages, and passages as the generator reads them, lose their end;
* a question as the generator reads it loses the beginning of the question's text, never its options and never its last
  words, which in exam questions hold what is asked; if the rest alone does not fit, the question does not fit;
* answers and options are never cut: a cut option could equal another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import LETTERS, Question
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.parallel.progress import track

_BATCH = 512


@dataclass(frozen=True)
class CutCount:
    """How many rows a table has, how many of them were cut, how many tokens that lost, and the longest row uncut."""

    rows: int
    cut: int
    tokens_lost: int
    longest: int


@dataclass(frozen=True)
class Misfit:
    """A question whose ``piece`` needs ``needed`` tokens where ``limit`` are configured under ``key``."""

    row: int
    id: str
    piece: str
    needed: int
    limit: int
    key: str

    def __str__(self) -> str:
        return f"question {self.id}: {self.piece} needs {self.needed} tokens, {self.key} is {self.limit}"


def encode_all(engine: Tokenizer, texts: Sequence[str], label: str) -> Iterable[np.ndarray]:
    """Yields int32 token ids of each text, in batches and without special tokens."""
    for start in track(range(0, len(texts), _BATCH), len(texts), f"tokenising {label}", "texts", each=_BATCH):
        for encoding in engine.encode_batch_fast(list(texts[start : start + _BATCH]), add_special_tokens=False):
            yield np.asarray(encoding.ids, np.int32)


def tokenise(
    engine: Tokenizer,
    texts: Sequence[str],
    limit: int,
    label: str,
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> tuple[TokenTable, CutCount]:
    """A table with a row ``before tokens after`` for each text; tokens lose their end so that it fits ``limit``."""
    room = limit - len(before) - len(after)
    rows, lengths = [], []
    for ids in encode_all(engine, texts, label):
        lengths.append(len(ids))
        rows.append(np.concatenate([before, ids[:room], after]).astype(np.int32))
    over = [length - room for length in lengths if length > room]
    longest = max(lengths, default=0) + limit - room
    return TokenTable.of(rows), CutCount(len(rows), len(over), sum(over), longest)


def tokenise_questions(
    engine: Tokenizer, prompts: Prompts, questions: Sequence[Question], tail: Sequence[int] = ()
) -> tuple[TokenTable, CutCount, list[Misfit]]:
    """Questions with their options as the generator reads them; a row that does not fit is empty and a Misfit.

    Args:
        tail: tokens that every row ends with, of a chat template.
    """
    limit = prompts.generator.question_length - len(tail)
    texts = [prompts.question(question.question, question.options) for question in questions]
    rows, lengths, misfits = [], [], []
    for place, ids in enumerate(encode_all(engine, texts, "questions (generator)")):
        lengths.append(len(ids))
        if len(ids) > limit:
            ids = _shortened(engine, prompts, questions[place], len(ids), limit)
        if len(ids) > limit:
            needed, whole = len(ids) + len(tail), prompts.generator.question_length
            piece = "what surrounds the question (its options too)"
            misfits.append(Misfit(place, questions[place].id, piece, needed, whole, "generator.question_length"))
            ids = ids[:0]
        rows.append(ids)
    lost = [length - len(row) for length, row in zip(lengths, rows, strict=True) if length > limit]
    table = TokenTable.of([np.append(row, tail).astype(np.int32) for row in rows]) if tail else TokenTable.of(rows)
    longest = max(lengths, default=-len(tail)) + len(tail)
    return table, CutCount(len(rows), len(lost), sum(lost), longest), misfits


def _shortened(engine: Tokenizer, prompts: Prompts, question: Question, length: int, limit: int) -> np.ndarray:
    """Tokens of the question without as many first tokens of its text as it takes; too long still if all do not do."""
    starts = [begin for begin, _ in engine.encode(question.question, add_special_tokens=False).offsets]
    drop = 0
    ids = np.zeros(0, np.int32)
    while length > limit and drop < len(starts):
        drop = min(drop + length - limit, len(starts))
        rest = question.question[starts[drop] :] if drop < len(starts) else ""
        text = prompts.question(rest.lstrip(), question.options)
        ids = np.asarray(engine.encode(text, add_special_tokens=False).ids, np.int32)
        length = len(ids)
    return ids if starts else np.zeros(length, np.int32)


@dataclass(frozen=True)
class AnswerTables:
    """``answers``: a row for each question. ``options``: the options of question ``i`` are the rows ``starts[i]`` to
    ``starts[i + 1]`` (``starts`` int64 [questions + 1]), none for free text. Every row ends with the end token."""

    answers: TokenTable
    options: TokenTable
    starts: np.ndarray


def tokenise_answers(
    engine: Tokenizer, prompts: Prompts, questions: Sequence[Question], eos: int
) -> tuple[AnswerTables, list[Misfit]]:
    """Right answers, and every option as an answer; a question with a row that does not fit is a Misfit."""
    limit = prompts.generator.answer_length
    texts = [prompts.answer(question) for question in questions]
    option_texts = [prompts.answer(question, i) for question in questions for i in range(len(question.options))]
    starts = np.concatenate([[0], np.cumsum([len(question.options) for question in questions])]).astype(np.int64)
    answers = [np.append(ids, eos) for ids in encode_all(engine, texts, "answers")]
    options = [np.append(ids, eos) for ids in encode_all(engine, option_texts, "options")]
    misfits = []
    for place, question in enumerate(questions):
        pieces = options[starts[place] : starts[place + 1]] or [answers[place]]  # an option is the answer
        needed, last = max((len(piece), -number) for number, piece in enumerate(pieces))
        if needed > limit:
            piece = f"option {LETTERS[-last]}" if question.options else "the answer"
            misfits.append(Misfit(place, question.id, piece, needed, limit, "generator.answer_length"))
    return AnswerTables(TokenTable.of(answers), TokenTable.of(options), starts), misfits
