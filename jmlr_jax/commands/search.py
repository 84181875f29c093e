"""Asking a run's index: `jmlr search`. One question or a file, filters, fusion with BM25, highlighted matches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from rich.text import Text

from jmlr_jax.config import Config
from jmlr_jax.data.fields import check_text
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.rows import read_lines
from jmlr_jax.data.schema import FieldError
from jmlr_jax.data.tokenise import tokenise
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import any_path
from jmlr_jax.nn.functional import encode_passages, encode_queries
from jmlr_jax.parallel.distributed import check_same, console, from_first, on_first
from jmlr_jax.parallel.placement import local_mesh
from jmlr_jax.parallel.progress import track
from jmlr_jax.retrieval.candidates import SEARCH_CHUNK
from jmlr_jax.retrieval.encode import encode_passages_batched, encode_queries_batched
from jmlr_jax.retrieval.fusion import reciprocal_rank, write_trec
from jmlr_jax.retrieval.shards import Shards
from jmlr_jax.retrieval.store import params_fingerprint
from jmlr_jax.run.index import index_home
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import INITIAL, retriever_of

HYBRID_DEPTH = 100  # passages of each ranking that are fused
SHOWN_MATCHES = 6  # passage tokens highlighted


class SearchError(JmlrError):
    """A search that cannot be done as asked."""


@dataclass(frozen=True)
class Span:
    """A piece of a passage's text that a question's token matches best: ``text[start:end]``, and by how much."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Found:
    """One passage found: its row in the corpus, its score (MaxSim, or reciprocal ranks), its text and best matches."""

    row: int
    score: float
    id: str
    source: str
    url: str
    text: str
    spans: list[Span] = field(default_factory=list)


class Engine:
    """A run's retriever, corpus and index, ready for questions.

    Of several processes each makes one and asks it the same; each searches its shards of the index, and all get the
    passages of all.

    Args:
      run: an opened run directory.
      name: ``initial``, or the phase whose retriever and index are asked.

    Raises:
      IndexUnusable: no index of this retriever and corpus; `jmlr index` makes it.
    """

    def __init__(self, run: Run, name: str = INITIAL):
        self.run = run
        self.retriever: Any = retriever_of(run, None if name == INITIAL else name)
        fingerprint = params_fingerprint(jax.device_get(self.retriever))
        corpus = run.fingerprints["passages"]
        self.index = Shards.open(index_home(run, name), fingerprint, corpus, len(run.prepared.passages))
        self.prompts = Prompts(run.cfg.retriever, run.cfg.generator)
        self._tokenizer = encoder(load_tokenizer(run.prepared.tokenizer_dir("retriever")))

    @cached_property
    def sources(self) -> np.ndarray:
        """Source of every passage, by row."""
        return np.array([passage.source for passage in self.run.prepared.passages])

    def allowed(self, sources: Sequence[str]) -> np.ndarray | None:
        """bool by row, the passages of these sources; None for all if none is named.

        Raises:
          SearchError: a source that no passage has.
        """
        if not sources:
            return None
        known = sorted(set(self.sources.tolist()))
        if unknown := [source for source in sources if source not in known]:
            raise SearchError(
                f"--source {unknown[0]}: no passage is from there; there are {', '.join(known) or 'none'}"
            )
        return np.isin(self.sources, list(sources))

    def vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token vectors of questions float32 [n, Q, C], and how many of the tokens stand for their text, int32 [n]."""
        run, ids = self.run, self.run.prepared.retriever_ids
        before, after = ids.around("query")
        asked = [run.cfg.retriever.query_template.format(question=text, options="").strip() for text in texts]
        width = run.prepared.card["lengths"]["query"]
        table, _ = tokenise(self._tokenizer, asked, width, "questions", before=before, after=after)
        fill = ids.mask if run.prepared.card["augment_queries"] else ids.pad
        pieces = encode_queries_batched(
            encode_queries,
            self.retriever,
            run.retriever,
            lambda rows: table.padded(rows, width, fill),
            len(texts),
            batch=min(run.cfg.index.encode_batch, len(texts)),
            mesh=local_mesh(run.mesh),
        )
        return np.concatenate(list(pieces)), np.diff(table.offsets).astype(np.int32)

    def search(
        self, texts: Sequence[str], k: int, sources: Sequence[str] = (), hybrid: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each question.

        Args:
          texts: n questions, at least one.
          k: at least 1.
          sources: passages from elsewhere are left out; none named: all.
          hybrid: fuse with BM25 by reciprocal rank.

        Returns:
          rows int32 [n, k], best first, -1 padding, and scores float32 [n, k], -inf there.

        Raises:
          SearchError: an unknown source, or an empty question.
        """
        if not texts or any(not text.strip() for text in texts):
            raise SearchError("an empty question finds nothing; say what is looked for")
        allowed = self.allowed(sources)
        depth = max(k, HYBRID_DEPTH) if hybrid else k
        q_NxQxC, _ = self.vectors(texts)
        starts = range(0, len(texts), SEARCH_CHUNK)
        found = [
            self.index.search(q_NxQxC[first : first + SEARCH_CHUNK], depth, allowed)
            for first in track(starts, len(texts), "searching", "questions", each=SEARCH_CHUNK)
        ]
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if not hybrid:
            return rows, scores
        everything = len(self.sources) if allowed is not None else depth
        words, _ = self.run.lexical.search(texts, everything)
        if allowed is not None:
            words = np.where((words >= 0) & allowed[np.maximum(words, 0)], words, -1)
            words = np.take_along_axis(words, np.argsort(words < 0, axis=1, kind="stable"), 1)[:, :depth]
        return reciprocal_rank({"maxsim": rows, "bm25": words}, k)

    def found(self, text: str, rows_K: np.ndarray, score_K: np.ndarray) -> list[Found]:
        """The passages of one question's ranking with their best-matching pieces."""
        rows = rows_K[rows_K >= 0]
        if not len(rows):
            return []
        q_1xQxC, length_1 = self.vectors([text])
        prepared, before = self.run.prepared, len(self.run.prepared.retriever_ids.around("query")[0])
        (made,) = encode_passages_batched(
            encode_passages,
            self.retriever,
            self.run.retriever,
            prepared.passage_tokens,
            rows,
            prepared.skip_V,
            batch=len(rows),
            mesh=local_mesh(self.run.mesh),
        )
        said_QxC = q_1xQxC[0, before : length_1[0] - 1]  # the question's own words, no markers and no filling
        results = []
        for place, (row, score) in enumerate(zip(rows.tolist(), score_K.tolist(), strict=False)):
            passage = prepared.passages[row]
            shown = self.prompts.retrieved(passage)
            weight_P = matches(said_QxC, made.vectors_NxPxC[place].astype(np.float32), made.keep_NxP[place])
            spans = self._spans(shown, weight_P)
            results.append(Found(row, score, passage.id, passage.source, passage.url, shown, spans))
        return results

    def _spans(self, text: str, weight_P: np.ndarray) -> list[Span]:
        """Where the best-matched tokens stand in the text; markers around the text have no place there."""
        first = len(self.run.prepared.retriever_ids.around("passage")[0])
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        weight = weight_P[first : first + len(offsets)]
        best = [at for at in np.argsort(-weight, kind="stable")[:SHOWN_MATCHES].tolist() if weight[at] > 0]
        return [Span(offsets[at][0], offsets[at][1], round(float(weight[at]), 3)) for at in sorted(best)]


def matches(q_QxC: np.ndarray, p_PxC: np.ndarray, keep_P: np.ndarray) -> np.ndarray:
    """What each passage token adds to MaxSim: the similarities of the question tokens that match it best, float [P].

    >>> q, p = np.eye(3)[:2], np.array([[0.6, 0.8, 0], [0.9, 0, 0.1], [0, 1.0, 0]])
    >>> print(matches(q, p, np.array([True, True, False])))
    [0.8 0.9 0. ]
    """
    weight_P = np.zeros(len(p_PxC))
    if keep_P.any():
        similarity_QxP = np.where(keep_P, q_QxC @ p_PxC.T, -np.inf)
        np.add.at(weight_P, similarity_QxP.argmax(1), similarity_QxP.max(1))
    return weight_P


def read_questions(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Ids and texts of a file of questions: a line for each, ``id<TAB>text``.

    Raises:
      SearchError: no file, no question, or an id that an earlier line has.
      RecordError: a line of another form, or that is not UTF-8 text.
    """
    file = os.fspath(path)
    if not any_path(file).is_file():
        raise SearchError(f"{file}: no such file")
    texts: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for number, line in read_lines(file):
        try:
            check_text(line)
        except FieldError as error:
            raise error.at(file, number) from None
        name, _, text = (part.strip() for part in line.partition("\t"))
        if not name or not text:
            raise SearchError(f"{file}:{number}: expected an id, a tab and a question, got {line.strip()[:80]!r}")
        if name in texts:
            raise SearchError(f"{file}:{number}: the id {name} stands in line {line_of[name]} already")
        texts[name], line_of[name] = text, number
    if not texts:
        raise SearchError(f"{file}: no questions; write a line `id<TAB>question` for each")
    return list(texts), list(texts.values())


def shown(found: Sequence[Found]) -> Text:
    """Passages as the terminal shows them: rank, score, id, source, and the text with its best matches marked."""
    whole = Text()
    for rank, one in enumerate(found, 1):
        whole.append(f"{rank}. {one.score:.3f}  ", style="bold")
        whole.append(f"{one.id}  {one.source}  {one.url}".rstrip() + "\n", style="dim")
        text = Text(one.text)
        for span in one.spans:
            text.stylize("bold reverse", span.start, span.end)
        whole.append_text(text)
        whole.append("\n\n")
    return whole


def run_search(
    cfg: Config,
    asked: str,
    *,
    name: str = INITIAL,
    k: int = 5,
    sources: Sequence[str] = (),
    hybrid: bool = False,
    trec: str | None = None,
) -> None:
    """`jmlr search`: one question, whose passages are printed, or ``@FILE`` with many, for a TREC run file.

    Args:
      cfg: of the run directory.
      asked: the question, or ``@`` and a file for :func:`read_questions`.
      name: whose retriever and index, ``initial`` or a phase.
      k, sources, hybrid: see :meth:`Engine.search`.
      trec: file to write the ranking to.

    Raises:
      SearchError: see :meth:`Engine.search`; also a file of questions without ``trec``, and ids that a run file cannot
        hold.
      DistributedError: the processes were asked different things.
      IndexUnusable: there is no index to ask.
    """
    if asked.startswith("@") and trec is None:
        raise SearchError(f"{asked}: a file of questions gives a run file; say where with --trec FILE")
    check_same("what is asked", [asked, name, k, list(sources), hybrid], "start the same command in every process")
    ids, texts = from_first(lambda: read_questions(asked[1:])) if asked.startswith("@") else (["1"], [asked])
    engine = Engine(Run.open(cfg), name)
    rows, scores = engine.search(texts, k, sources, hybrid)

    def tell() -> None:
        if trec is not None:
            _write_run(engine.run, trec, ids, rows, scores, "hybrid" if hybrid else "maxsim")
        if not asked.startswith("@"):
            console(out=True).print(shown(engine.found(texts[0], rows[0], scores[0])))

    on_first(tell)


def _write_run(run: Run, trec: str, ids: list[str], rows_NxK: np.ndarray, score_NxK: np.ndarray, tag: str) -> None:
    """The TREC run file; of the passages only those that were found are read."""
    passage_ids = {row: run.prepared.passages[row].id for row in np.unique(rows_NxK[rows_NxK >= 0]).tolist()}
    try:
        write_trec(trec, ids, passage_ids, rows_NxK, score_NxK, tag)
    except ValueError as error:
        raise SearchError(f"--trec {trec}: {error}") from None
    console().print(f"{trec}: {len(ids)} questions, {int((rows_NxK >= 0).sum())} passages")
