"""What is asked and what is answered, as plain records with one JSON form, whoever asks: a terminal, a page, a program.

All likelihoods are mean negative log-likelihoods in nats per token, as in an evaluation; effects are differences of
them, positive where a passage made the answer likelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jmlr_jax.data.schema import LETTERS, MAX_OPTIONS, MIN_OPTIONS
from jmlr_jax.errors import JmlrError

VERSION = 1  # of the JSON form
MAX_QUESTION, MAX_OPTION = 8000, 1000  # characters


class AskError(JmlrError, ValueError):
    """A question that cannot be asked so; the message names the field and the limit."""


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
      question: its text.
      options: 2 to 10 to choose among; none for an answer in words.
      arm: who answers.
      k: passages read, at most as many as the arm was trained to read; None for all of these.
      sources: passages from elsewhere are left out; none named: all.

    Raises:
      AskError: an empty or overlong text, or a wrong number of options.
    """

    question: str
    options: tuple[str, ...] = ()
    arm: str = "jmlr"
    k: int | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_text("question", self.question, MAX_QUESTION)
        if self.options and not MIN_OPTIONS <= len(self.options) <= MAX_OPTIONS:
            count = f"{MIN_OPTIONS} to {MAX_OPTIONS}"
            raise AskError(f"options: {len(self.options)} given; give {count}, or none for an answer in words")
        for letter, option in zip(LETTERS, self.options, strict=False):
            _check_text(f"option {letter}", option, MAX_OPTION)
        if self.k is not None and self.k < 1:
            raise AskError(f"k: {self.k}; read at least one passage, or ask the arm closed_book")


def _check_text(name: str, text: str, most: int) -> None:
    if not text.strip():
        raise AskError(f"{name}: is empty; say what is asked")
    if len(text) > most:
        raise AskError(f"{name}: {len(text)} characters, at most {most} are read")
    if bad := next((c for c in text if not _is_text(c)), ""):
        raise AskError(f"{name}: holds the character U+{ord(bad):04X}, which is not text")


def _is_text(c: str) -> bool:
    """Whether a character is one: no control character but white space, no half of a surrogate pair."""
    return c in "\t\n\r" or not (c < " " or c == "\x7f" or 0xD800 <= ord(c) < 0xE000)


@dataclass(frozen=True)
class Span:
    """A piece of a passage's text that a question's token matches best: ``text[start:end]``, and by how much."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Source:
    """One passage of an answer.

    Attributes:
      rank: 1 is the best; the reader reads the best last.
      score: MaxSim or BM25's, as the retriever gave it.
      text: as the retriever saw it; `spans` are places in it.
      read: whether it fitted into the prompt.
      without: how much likelier the answer is than if this passage alone were missing; None where it was not read.
      alone: how much likelier the answer is after this passage alone than after none.
    """

    rank: int
    id: str
    source: str
    url: str
    text: str
    score: float
    spans: tuple[Span, ...] = ()
    read: bool = True
    without: float | None = None
    alone: float | None = None


@dataclass(frozen=True)
class Choice:
    """One option: its likelihood and its probability among all, calibrated where the answer is."""

    letter: str
    text: str
    nll: float
    probability: float


@dataclass(frozen=True)
class Said:
    """What a reader answers.

    Attributes:
      text: the option, or the words it wrote.
      letter: of the option; empty for words.
      nll: of that answer.
      probability: of the option among all; for words the mean probability of a token.
      choices: all options, in their order.
    """

    text: str
    letter: str
    nll: float
    probability: float
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer and what led to it.

    Attributes:
      said: after the passages; its probability is the confidence.
      closed_book: the same reader without passages.
      written: what the reader wrote itself, which among options may be another one.
      nll_none: of the answer (not of what the closed book says) without passages.
      passages: in the order of their ranks.
      calibrated: whether probabilities and threshold were fitted on dev questions; if not, `why` says what to do.
      threshold: how sure an answer must be to be given; None where none kept the risk, or nothing is calibrated.
      abstains: whether it is less sure than that.
      why: one sentence on `abstains` or on what is not calibrated; may be empty.
      shortened: the question was too long, and its beginning was not read.
    """

    asked: Asked
    said: Said
    closed_book: Said
    written: str
    nll_none: float
    passages: tuple[Source, ...]
    calibrated: bool
    threshold: float | None
    abstains: bool
    why: str
    shortened: bool = False
    seconds: float = field(default=0.0, compare=False)

    @property
    def effect(self) -> float:
        """How much likelier the answer is with its passages than without."""
        return self.nll_none - self.said.nll

    def to_json(self, anyway: bool = True) -> dict[str, Any]:
        """The agreed form: every attribute by its name, ``choices``, ``version`` and the disclaimer.

        Args:
          anyway: whether ``said`` is there also where the reader abstains; else it is null then.
        """
        found = asdict(self)
        asked, choices = found.pop("asked"), found["said"]["choices"]
        if self.abstains and not anyway:
            found["said"] = None
        return {"version": VERSION, "notice": NOTICE, **asked, **found, "choices": choices, "effect": self.effect}


NOTICE = "Research software, not medical advice."


def probabilities_of(texts: Sequence[str], p_O: Sequence[float], nll_O: Sequence[float]) -> tuple[Choice, ...]:
    """The options with their numbers."""
    rows = zip(LETTERS, texts, nll_O, p_O, strict=False)
    return tuple(Choice(letter, text, float(nll), float(p)) for letter, text, nll, p in rows)
