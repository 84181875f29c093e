"""The two records everything else in ``jmlr_jax.data`` speaks of, and the errors of bad input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jmlr_jax.errors import JmlrError

SPLITS = ("train", "dev", "test")
LETTERS = "ABCDEFGHIJ"
MIN_OPTIONS, MAX_OPTIONS = 2, len(LETTERS)


class RecordError(JmlrError, ValueError):
    """A record that cannot be read: which file, line and field, what was expected and what stood there."""

    def __init__(self, file: str, line: int, field: str, expected: str, got: object) -> None:
        shown = repr(got)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        super().__init__(f"{file}:{line}: field '{field}': expected {expected}, got {shown}")
        self.file, self.line, self.field, self.expected, self.got = file, line, field, expected, got


class FieldError(JmlrError, ValueError):
    """What is wrong with one field of a record, before anybody knows the file and line it came from."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"field '{field}': expected {expected}, got {got!r}")
        self.field, self.expected, self.got = field, expected, got

    def at(self, file: str, line: int) -> RecordError:
        """The same complaint with its place."""
        return RecordError(file, line, self.field, self.expected, self.got)


class InputError(JmlrError, ValueError):
    """What was given as a whole cannot be used: no questions, no passages, repeated ids, lengths that do not fit."""


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise FieldError(name, "non-empty text", value)


@dataclass(frozen=True)
class Question:
    """One question with its right answer.

    Attributes:
        id: unique within its set.
        question: the text that is asked.
        options: 2 to 10 choices, lettered A, B, ... in order; empty for a free-text question. Two may be equal, as
            in one of 200 published MedMCQA questions.
        answer: the right answer as text; of a multiple-choice question, the right option.
        answer_index: its place in ``options``; -1 for free text.
        gold_doc_ids: passages (or documents) known to hold the answer; may be empty. Never shown to training.
        kind: what sort of question, for reports only.
        meta: further labels a model must not see.

    Raises:
        FieldError: on an empty text, a count of options other than 0 or 2..10, or an answer that is not
            the option at ``answer_index``.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    answer_index: int
    gold_doc_ids: tuple[str, ...] = ()
    kind: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_text("id", self.id)
        _require_text("question", self.question)
        _require_text("answer", self.answer)
        if not self.options:
            if self.answer_index != -1:
                raise FieldError("answer_index", "-1 for a question without options", self.answer_index)
            return
        if not MIN_OPTIONS <= len(self.options) <= MAX_OPTIONS:
            raise FieldError("options", f"{MIN_OPTIONS} to {MAX_OPTIONS} options", len(self.options))
        for option in self.options:
            _require_text("options", option)
        if not 0 <= self.answer_index < len(self.options):
            raise FieldError("answer_index", f"0 to {len(self.options) - 1}", self.answer_index)
        if self.options[self.answer_index] != self.answer:
            raise FieldError("answer", f"the option {self.options[self.answer_index]!r}", self.answer)

    @property
    def letter(self) -> str:
        """Letter of the right option; empty for free text."""
        return LETTERS[self.answer_index] if self.options else ""


@dataclass(frozen=True)
class Passage:
    """One retrievable piece of text.

    Attributes:
        id: unique within the corpus; pieces of a split document are ``document#0``, ``document#1``, ...
        title: may be empty.
        text: what is read.
        source: where it comes from, for display.
        url: where it can be looked up, for display.

    Raises:
        FieldError: on an empty id or text.
    """

    id: str
    title: str
    text: str
    source: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        _require_text("id", self.id)
        _require_text("text", self.text)
