"""Answers questions: retrieves, reads, scores, writes, and tells what each passage did; one or some together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jmlr_jax.answering.asked import Answer, Asked, AskError, Said, Source, Span, probabilities_of
from jmlr_jax.answering.home import Arm, Home
from jmlr_jax.answering.retrieval import AT_ONCE, allowed_rows, lexical_search, plain_source
from jmlr_jax.answering.rows import Row, RowReader
from jmlr_jax.answering.trust import option_probabilities
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import LETTERS, Question
from jmlr_jax.data.tokenise import tokenise_answers, tokenise_questions
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.errors import JmlrError

DEPTH = 50  # passages that a search gives, at most
Told = Callable[[int, str, Any], None]
"""``(number of the question, event, data)``: ``passages`` (a list), ``said`` (among options: ``said abstains why``),
``written`` (text so far), ``closed_book``, ``answer`` (all of it)."""


class Gone(JmlrError):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class _Work:
    """A question on its way to its answer."""

    number: int
    asked: Asked
    question: np.ndarray
    shortened: bool
    options: list[np.ndarray]
    rows_K: np.ndarray
    sources: list[Source] = field(default_factory=list)
    full: Row | None = None
    none: Row | None = None
    effects: list[Row] = field(default_factory=list)


class Engine:
    """Asks the arms of a home.

    Args:
      home: see :func:`jmlr_jax.answering.home.open_home`.
      arms: those that may be asked; None for all.
    """

    def __init__(self, home: Home, arms: Sequence[str] | None = None):
        self.home, self.corpus = home, home.corpus
        self.arms = home.arms if arms is None else tuple(arms)
        prepared, cfg = self.corpus.prepared, self.corpus.cfg
        self.rows = RowReader(prepared, cfg)
        self.prompts = Prompts(cfg.retriever, cfg.generator)
        self.sources_N = np.array([passage.source for passage in prepared.passages])
        self._tokens = encoder(load_tokenizer(prepared.tokenizer_dir("generator")), continues=True)

    @property
    def most(self) -> int:
        """Passages that are read, at most."""
        return self.rows.most

    def open(self, told: Callable[[str, int, int], None] = lambda what, done, of: None) -> None:
        """Opens all arms and compiles every shape, so that nothing is compiled when questions come.

        Args:
          told: takes what is being done, and how many of how many are done.
        """
        for number, name in enumerate(self.arms):
            told(f"opening {name}", number, len(self.arms))
            arm = self.arm(name)
            self.rows.compile(arm.reader, lambda done, of, name=name: told(f"compiling {name}", done, of))  # type: ignore[misc]
            if arm.searcher is not None:
                told(f"searching as {name}", 0, 1)
                arm.searcher.compile((self.most, DEPTH))
        told("ready", 1, 1)

    def arm(self, name: str) -> Arm:
        """An arm that may be asked; AskError if there is none of this name."""
        if name not in self.arms:
            raise AskError(f"arm: {name} is not here; there are {', '.join(self.arms)}")
        return self.home.arm(name)

    def answer(self, asked: Asked, told: Told = lambda number, event, data: None) -> Answer:
        """One question's answer; raises JmlrError where it cannot be asked so."""
        (found,) = self.answer_all([asked], told)
        if isinstance(found, JmlrError):
            raise found
        return found

    def answer_all(
        self,
        asked: Sequence[Asked],
        told: Told = lambda number, event, data: None,
        gone: Callable[[int], bool] = lambda number: False,
    ) -> list[Answer | JmlrError]:
        """Answers questions of one arm together; one that cannot be asked gives its error in its place.

        Args:
          told: hears of each question as soon as something is known.
          gone: whether nobody waits for a question any more; what is left of its work is then left out.
        """
        started, results = time.monotonic(), dict[int, Answer | JmlrError]()
        work: list[_Work] = []
        for number, question in enumerate(asked):
            try:
                work.append(self._begun(number, question))
            except JmlrError as error:
                results[number] = error
        try:
            arm = self.arm(asked[0].arm)
        except JmlrError as error:
            return [results.get(number, error) for number in range(len(asked))]
        self._retrieve(arm, work, results)
        work = [one for one in work if one.number not in results]
        for one in work:
            told(one.number, "passages", [asdict(source) for source in one.sources])
        self._read(arm, work, told, gone)
        for one in work:
            if gone(one.number):
                results[one.number] = Gone("nobody waits for this answer")
        work = [one for one in work if one.number not in results]
        self._effects(arm, work)
        for one in work:
            found = replace(self._answer(arm, one), seconds=round(time.monotonic() - started, 3))
            told(one.number, "answer", found.to_json())
            results[one.number] = found
        return [results[number] for number in range(len(asked))]

    def search(self, text: str, arm: str, k: int, sources: Sequence[str] = ()) -> list[Source]:
        """The best passages for some words as an arm finds them, at most :data:`DEPTH`.

        Raises:
          AskError: an empty or overlong text, or a wrong `k`; an arm that reads no passages.
          SearchError: an unknown source.
        """
        asked, finder = Asked(text, arm=arm, sources=tuple(sources)), self.arm(arm)
        if not 1 <= k <= DEPTH:
            raise AskError(f"k: {k}; ask for 1 to {DEPTH} passages")
        if not finder.reads:
            raise AskError(f"arm: {arm} reads no passages; there are {', '.join(self.arms)}")
        if finder.searcher is not None:
            rows, scores = finder.searcher.search([text], DEPTH, asked.sources)
            return finder.searcher.found(text, rows[0, :k], scores[0, :k])
        return self._lexical(asked, k)[1]

    def embeddings(self, texts: Sequence[str], arm: str) -> list[np.ndarray]:
        """Token vectors of questions as an arm's retriever has them, float32 [tokens, C] each, markers included.

        Raises:
          AskError: an empty or overlong text; an arm without a retriever.
        """
        for text in texts:
            Asked(text)
        searcher = self.arm(arm).searcher
        if searcher is None:
            raise AskError(f"arm: {arm} has no retriever of its own")
        found: list[np.ndarray] = []
        for first in range(0, len(texts), AT_ONCE):
            vectors, lengths = searcher.vectors(texts[first : first + AT_ONCE])
            found += [vectors_QxC[:length] for vectors_QxC, length in zip(vectors, lengths, strict=True)]
        return found

    def _begun(self, number: int, asked: Asked) -> _Work:
        """A question in tokens, cut as `jmlr prepare` cuts."""
        if asked.k is not None and asked.k > self.most:
            raise AskError(f"k: {asked.k}; the reader was trained on at most {self.most} passages")
        allowed_rows(self.sources_N, asked.sources)
        # Which answer is right is not known; nothing below reads it.
        answer, index = (asked.options[0], 0) if asked.options else (asked.question, -1)
        question = Question("asked", asked.question, asked.options, answer, index)
        table, cut, misfits = tokenise_questions(self._tokens, self.prompts, [question], self.rows.ids.tail)
        options: list[np.ndarray] = []
        if asked.options:
            tables, more = tokenise_answers(self._tokens, self.prompts, [question], self.rows.ids.eos)
            misfits = [*misfits, *more]
            options = [tables.options.row(o) for o in range(len(asked.options))]
        if misfits:
            first = misfits[0]
            raise AskError(f"{first.piece} needs {first.needed} tokens, {first.key} is {first.limit}; shorten it")
        return _Work(number, asked, table.row(0), bool(cut.cut), options, np.full(self.most, -1, np.int32))

    def _retrieve(self, arm: Arm, work: list[_Work], results: dict[int, Answer | JmlrError]) -> None:
        """The passages of each question; those of the same sources are searched for together."""
        if arm.searcher is None:
            for one in work if arm.lexical else ():
                one.rows_K, one.sources = self._lexical(one.asked, self.most)
                one.rows_K, one.sources = one.rows_K[: one.asked.k], one.sources[: one.asked.k]
            return
        by_sources: dict[tuple[str, ...], list[_Work]] = {}
        for one in work:
            by_sources.setdefault(one.asked.sources, []).append(one)
        for sources, group in by_sources.items():
            texts, options = [one.asked.question for one in group], [one.asked.options for one in group]
            try:
                rows, scores = arm.searcher.search(texts, self.most, sources, options=options)
            except JmlrError as error:
                results.update({one.number: error for one in group})
                continue
            for one, rows_K, score_K in zip(group, rows, scores, strict=True):
                k = one.asked.k
                one.rows_K = rows_K[:k]
                one.sources = arm.searcher.found(one.asked.question, rows_K[:k], score_K[:k], one.asked.options)

    def _lexical(self, asked: Asked, k: int) -> tuple[np.ndarray, list[Source]]:
        """BM25's passages, the words in common marked."""
        allowed, lexical = allowed_rows(self.sources_N, asked.sources), self.corpus.lexical
        rows, scores = lexical_search(lexical, [asked.question], k, allowed)
        found = []
        for rank, (row, score) in enumerate(zip(rows[0].tolist(), scores[0].tolist(), strict=True), 1):
            if row >= 0:
                source = plain_source(self.corpus.prepared, self.prompts, rank, row, score)
                shared = lexical.shared(asked.question, source.text)
                found.append(replace(source, spans=tuple(Span(start, end, 1.0) for start, end in shared)))
        return rows[0], found

    def _read(self, arm: Arm, work: Sequence[_Work], told: Told, gone: Callable[[int], bool]) -> None:
        """Reads each question with its passages and without."""
        lengths, pad = self.corpus.prepared.card["lengths"], self.rows.ids.pad
        for one in work:
            rows_K = np.full(self.most, -1, np.int32)
            rows_K[: len(one.rows_K)] = one.rows_K
            passages = self.corpus.prepared.tokens("references").padded(rows_K, lengths["reference"], pad)
            read = tuple(np.flatnonzero(rows_K >= 0).tolist())
            full = Row(passages, read, one.question, one.options, True, wanted=lambda n=one.number: not gone(n))  # type: ignore[misc]
            full.scored = lambda one=one: self._tell_said(arm, one, told)  # type: ignore[misc]
            full.wrote = lambda one=one: told(one.number, "written", self._text(arm, one.full))  # type: ignore[misc]
            one.full = full
            one.none = full if not read else Row(passages, (), one.question, one.options, not one.options)
        rows = [row for one in work for row in {id(r): r for r in (one.full, one.none)}.values() if row is not None]
        self.rows.read(arm.reader, rows)
        for one in work:
            told(one.number, "closed_book", asdict(self._said(arm, one, one.none)))

    def _tell_said(self, arm: Arm, one: _Work, told: Told) -> None:
        if one.options:
            said = self._said(arm, one, one.full)
            why = arm.trust.abstains(said.probability)
            reasons = {"abstains": bool(why), "why": why or arm.trust.uncalibrated}
            told(one.number, "said", {"said": asdict(said), **reasons})

    def _text(self, arm: Arm, row: Row | None) -> str:
        assert row is not None
        return arm.reader.decode([token for token in row.tokens if token not in self.rows.ids.ends]).strip()

    def _said(self, arm: Arm, one: _Work, row: Row | None) -> Said:
        """What a row that was read says."""
        assert row is not None
        if not one.options:
            nll = -float(np.mean(row.logp))
            return Said(self._text(arm, row), "", nll, float(np.exp(-nll)))
        p_O = option_probabilities(one.asked.options, row.nll, arm.trust.temperature)
        best = int(np.argmin(row.nll))
        choices = probabilities_of(one.asked.options, p_O.tolist(), row.nll)
        return Said(one.asked.options[best], LETTERS[best], row.nll[best], float(p_O[best]), choices)

    def _effects(self, arm: Arm, work: Sequence[_Work]) -> None:
        """Reads each answer without every one of its passages, and after each alone; all in one go."""
        for one in work:
            assert one.full is not None
            kept = one.full.read[: len(one.full.read) - one.full.dropped]
            answer = one.options[int(np.argmin(one.full.nll))] if one.options else np.array(one.full.tokens, np.int32)
            reads = [tuple(k for k in kept if k != left_out) for left_out in kept] + [(k,) for k in kept] + [()]
            one.effects = [Row(one.full.passages, read, one.question, [answer]) for read in reads] if kept else []
        self.rows.read(arm.reader, [row for one in work for row in one.effects])

    def _answer(self, arm: Arm, one: _Work) -> Answer:
        full, none = one.full, one.none
        assert full is not None and none is not None
        said = self._said(arm, one, full)
        none_nll = one.effects[-1].nll[0] if one.effects else said.nll
        kept, sources = (len(one.effects) - 1) // 2, []
        for place, source in enumerate(one.sources):
            if one.effects and place < kept:
                without, alone = one.effects[place].nll[0], one.effects[kept + place].nll[0]
                sources.append(replace(source, without=without - said.nll, alone=none_nll - alone))
            else:
                sources.append(replace(source, read=False))
        why = arm.trust.abstains(said.probability) if one.options else ""
        open_words = "probabilities of words are not calibrated; give options for calibrated ones"
        return Answer(
            asked=one.asked,
            said=said,
            closed_book=self._said(arm, one, none),
            written=self._text(arm, full),
            nll_none=none_nll,
            passages=tuple(sources),
            calibrated=bool(one.options) and not arm.trust.uncalibrated,
            threshold=arm.trust.least if one.options else None,
            abstains=bool(why),
            why=why or (arm.trust.uncalibrated if one.options else open_words),
            shortened=one.shortened,
        )
