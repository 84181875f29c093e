"""Where answers come from: a run, or a folder that `jmlr export --with-index` wrote; both are asked the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from jmlr_jax.answering.asked import AskError
from jmlr_jax.answering.carried import CARD, Carried
from jmlr_jax.answering.retrieval import Corpus, Searcher, run_searcher
from jmlr_jax.answering.trust import Trust, trust_of
from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.schema import Question
from jmlr_jax.evaluation.arms import reader_of
from jmlr_jax.evaluation.reading import Reader
from jmlr_jax.files import local_path
from jmlr_jax.run.open import DataError, Run
from jmlr_jax.run.phases import PHASES, trained_retriever
from jmlr_jax.run.weights import INITIAL, is_trained, phase_weights, trained

BEFORE = "before"  # the arm that joint training starts from: the warmed-up generator with the retriever as it came
ASKED = ("jmlr", "separate", "frozen", "bm25", "closed_book")  # arms that answer; passages of chance answer nothing
EXAMPLES = 12  # questions that a page offers, at most
ABOUT = {
    "jmlr": "Joint training",
    BEFORE: "Before joint training",
    "separate": "Trained one after the other",
    "frozen": "Retriever as it came",
    "bm25": "Word search (BM25)",
    "closed_book": "Without passages",
}


@dataclass(frozen=True)
class Arm:
    """Who answers.

    Attributes:
      name: of :data:`ABOUT`.
      reader: the generator.
      searcher: what finds its passages; None for BM25's, and where none are read.
      lexical: whether BM25 finds them.
      trust: how sure its answers are.
    """

    name: str
    reader: Reader
    searcher: Searcher | None
    lexical: bool
    trust: Trust

    @property
    def reads(self) -> bool:
        """Whether it reads passages at all."""
        return self.lexical or self.searcher is not None


class Home(Protocol):
    """A place of trained arms with the corpus that they read."""

    @property
    def corpus(self) -> Corpus:
        """Passages, tokenizers, configuration."""

    @property
    def llama(self) -> LlamaConfig:
        """Shape of the generator."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms that can be asked, the one to ask first in front."""

    def arm(self, name: str) -> Arm:
        """Opens an arm; AskError if there is none of this name."""

    def examples(self) -> list[Question]:
        """Some questions of the test set, of dev where there are none."""


class RunHome:
    """The arms of a run directory; each is opened when it is first asked for, and kept."""

    def __init__(self, run: Run):
        self.run = run
        self._arms: dict[str, Arm] = {}
        self._searchers: dict[str, Searcher] = {}

    @property
    def corpus(self) -> Corpus:
        """The run."""
        return self.run

    @property
    def llama(self) -> LlamaConfig:
        """Of the run."""
        return self.run.llama

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Trained arms, and what joint training started from.

        Raises:
          DataError: nothing has been trained.
        """
        found = [arm for arm in ASKED if is_trained(self.run, arm)]
        if not found:
            raise DataError(f"{self.run.directory}: no arm has been trained to its end; run `jmlr train --arm jmlr`")
        if "jmlr" in found:
            found.insert(1, BEFORE)
        return tuple(found)

    def arm(self, name: str) -> Arm:
        """See :meth:`Home.arm`; DataError and IndexUnusable where something of it is missing."""
        check_arm(self.arms, name)
        if name not in self._arms:
            self._arms[name] = self._open(name)
        return self._arms[name]

    def _open(self, name: str) -> Arm:
        run, before = self.run, name == BEFORE
        phase = PHASES["jmlr" if before else name]
        generator = phase_weights(run, phase)["generator"] if before else trained(run, name, "generator")
        index = INITIAL if before else trained_retriever(name) or INITIAL
        return Arm(
            name,
            reader_of(run, generator),
            self._searcher(index) if phase.passages in ("live", "retriever") else None,
            phase.passages == "bm25",
            Trust(uncalibrated="not calibrated: it is here to compare with") if before else trust_of(run, name),
        )

    def _searcher(self, name: str) -> Searcher:
        if name not in self._searchers:
            self._searchers[name] = run_searcher(self.run, name)
        return self._searchers[name]

    def examples(self) -> list[Question]:
        """See :meth:`Home.examples`."""
        return some_questions(self.run)


def some_questions(run: Run) -> list[Question]:
    """Questions spread evenly over the test set, or dev; without their gold passages."""
    for split in ("test", "dev"):
        if count := len(questions := run.prepared.questions(split)):
            rows = np.unique(np.linspace(0, count - 1, min(EXAMPLES, count)).round().astype(int))
            return [questions[int(row)] for row in rows]
    return []


class CarriedHome:
    """The one arm of an exported folder."""

    def __init__(self, carried: Carried):
        self.carried = carried
        self._arm: Arm | None = None

    @property
    def corpus(self) -> Corpus:
        """The folder."""
        return self.carried

    @property
    def llama(self) -> LlamaConfig:
        """Of the exported generator."""
        return self.carried.llama

    @property
    def arms(self) -> tuple[str, ...]:
        """The exported arm."""
        return (self.carried.card.arm,)

    def arm(self, name: str) -> Arm:
        """See :meth:`Home.arm`."""
        check_arm(self.arms, name)
        if self._arm is None:
            card, index = self.carried.card, self.carried.open_index()
            searcher = None if index is None else Searcher(self.carried, self.carried.retriever_params, index)
            self._arm = Arm(name, self.carried.reader, searcher, card.source == "bm25", card.trust)
        return self._arm

    def examples(self) -> list[Question]:
        """See :meth:`Home.examples`."""
        return list(self.carried.card.examples)


def check_arm(arms: Sequence[str], name: str) -> None:
    """Raises AskError if no arm has this name."""
    if name not in arms:
        why = "passages drawn by chance answer nothing; " if name == "random" else ""
        raise AskError(f"arm: {name} is not here; {why}there are {', '.join(arms)}")


def open_home(cfg: Config) -> Home:
    """The run of a configuration, or the exported folder that its ``run_dir`` names.

    Raises:
      JmlrError: neither is there, or something of it is missing or does not belong together.
    """
    folder = local_path(cfg.run_dir)
    if (folder / CARD).is_file():
        return CarriedHome(Carried.open(folder, cfg))
    return RunHome(Run.open(cfg))
