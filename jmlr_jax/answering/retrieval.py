"""Asking the index of a corpus in words: the best passages, filtered, fused with BM25, their best matches marked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jmlr_jax.answering.asked import Source, Span
from jmlr_jax.config import Config
from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.tokenise import tokenise
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.errors import JmlrError
from jmlr_jax.nn.functional import encode_passages, encode_queries
from jmlr_jax.parallel.placement import local_mesh
from jmlr_jax.parallel.progress import track
from jmlr_jax.retrieval.bm25 import BM25
from jmlr_jax.retrieval.candidates import SEARCH_CHUNK
from jmlr_jax.retrieval.encode import encode_passages_batched, encode_queries_batched
from jmlr_jax.retrieval.fusion import reciprocal_rank
from jmlr_jax.retrieval.scann import ScannIndex
from jmlr_jax.retrieval.shards import Shards
from jmlr_jax.retrieval.store import params_fingerprint
from jmlr_jax.retrieval.tokens import QUERY_STEP
from jmlr_jax.run.index import index_home
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import INITIAL, retriever_of

HYBRID_DEPTH = 100  # passages of each ranking that are fused
SHOWN_MATCHES = 6  # passage tokens marked
AT_ONCE = 8  # questions, or passages, encoded at once; always so many, so that one compilation serves


class SearchError(JmlrError):
    """A search that cannot be done as asked."""


class Corpus(Protocol):
    """What a search needs of the place it is done in: a run, or a folder that `jmlr export --with-index` wrote."""

    @property
    def cfg(self) -> Config:
        """The configuration."""

    @property
    def prepared(self) -> Prepared:
        """Passages and tokenizers."""

    @property
    def mesh(self) -> Mesh:
        """Devices."""

    @property
    def retriever(self) -> RetrieverConfig:
        """Shape of the retriever."""

    @property
    def lexical(self) -> BM25:
        """BM25 over the passages."""


class Searcher:
    """A retriever, a corpus and its index, ready for questions.

    Of several processes each makes one and asks it the same; each searches its shards of the index, and all get the
    passages of all.

    Args:
      corpus: where the passages are.
      params: of the retriever.
      index: of these passages by this retriever.
    """

    def __init__(self, corpus: Corpus, params: Any, index: Shards):
        self.corpus, self.params, self.index = corpus, params, index
        self.prompts = Prompts(corpus.cfg.retriever, corpus.cfg.generator)
        self._tokenizer = encoder(load_tokenizer(corpus.prepared.tokenizer_dir("retriever")))

    @cached_property
    def sources(self) -> np.ndarray:
        """Source of every passage, by row."""
        return np.array([passage.source for passage in self.corpus.prepared.passages])

    def allowed(self, sources: Sequence[str]) -> np.ndarray | None:
        """bool by row, the passages of these sources; None for all if none is named.

        Raises:
          SearchError: a source that no passage has.
        """
        return allowed_rows(self.sources, sources) if sources else None

    def vectors(
        self, texts: Sequence[str], options: Sequence[Sequence[str]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token vectors of questions float32 [n, Q, C], and how many of the tokens stand for their text, int32 [n].

        Args:
          options: of each question, for a template of queries that names them.
        """
        corpus, prepared = self.corpus, self.corpus.prepared
        before, after = prepared.retriever_ids.around("query")
        among = options or [()] * len(texts)
        asked = [self.prompts.asked(*one).strip() for one in zip(texts, among, strict=True)]
        width = prepared.card["lengths"]["query"]
        table, _ = tokenise(self._tokenizer, asked, width, "questions", before=before, after=after)
        fill = prepared.retriever_ids.mask if prepared.card["augment_queries"] else prepared.retriever_ids.pad
        pieces = encode_queries_batched(
            encode_queries,
            self.params,
            corpus.retriever,
            lambda rows: table.padded(rows, width, fill),
            len(texts),
            batch=min(corpus.cfg.index.encode_batch, max(AT_ONCE, len(texts))),
            mesh=local_mesh(corpus.mesh),
        )
        return np.concatenate(list(pieces)), np.diff(table.offsets).astype(np.int32)

    def passage_vectors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token vectors of passages float32 [n, P, C] and which of them count, bool [n, P]; n is at least 1."""
        prepared = self.corpus.prepared
        pieces = list(
            encode_passages_batched(
                encode_passages,
                self.params,
                self.corpus.retriever,
                prepared.passage_tokens,
                rows,
                prepared.skip_V,
                batch=AT_ONCE,
                mesh=local_mesh(self.corpus.mesh),
            )
        )
        vectors = np.concatenate([piece.vectors_NxPxC for piece in pieces]).astype(np.float32)
        return vectors, np.concatenate([piece.keep_NxP for piece in pieces])

    def compile(self, depths: Sequence[int]) -> None:
        """Runs every shape of a search for so many passages once, so that later ones find it compiled.

        Without augmentation an index leaves columns of queries out in which no question has a token: each number of
        columns is then a shape.
        """
        q_1xQxC, _ = self.vectors(["?"])
        width = q_1xQxC.shape[1]
        steps = {min(QUERY_STEP * n, width) for n in range(1, -(-width // QUERY_STEP) + 1)}
        self.passage_vectors(np.zeros(1, np.int32))
        for columns in steps:
            some = np.zeros_like(q_1xQxC)
            some[:, :columns] = 1 / np.sqrt(some.shape[-1])
            for depth in depths:
                for batch in (1, AT_ONCE):
                    self.index.search(np.repeat(some, batch, axis=0), depth)
                for _, index in self.index.held:
                    if isinstance(index.searcher, ScannIndex):
                        index.searcher.compile(depth, columns)

    def search(
        self,
        texts: Sequence[str],
        k: int,
        sources: Sequence[str] = (),
        hybrid: bool = False,
        options: Sequence[Sequence[str]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each question.

        Args:
          texts: n questions, at least one.
          k: at least 1.
          sources: passages from elsewhere are left out; none named: all.
          hybrid: fuse with BM25 by reciprocal rank.
          options: of each question, see :meth:`vectors`.

        Returns:
          rows int32 [n, k], best first, -1 padding, and scores float32 [n, k], -inf there.

        Raises:
          SearchError: an unknown source, or an empty question.
        """
        if not texts or any(not text.strip() for text in texts):
            raise SearchError("an empty question finds nothing; say what is looked for")
        allowed = self.allowed(sources)
        depth = max(k, HYBRID_DEPTH) if hybrid else k
        q_NxQxC, _ = self.vectors(texts, options)
        starts = range(0, len(texts), SEARCH_CHUNK)
        found = [
            self.index.search(q_NxQxC[first : first + SEARCH_CHUNK], depth, allowed)
            for first in track(starts, len(texts), "searching", "questions", each=SEARCH_CHUNK)
        ]
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if not hybrid:
            return rows, scores
        words, _ = lexical_search(self.corpus.lexical, texts, depth, allowed)
        return reciprocal_rank({"maxsim": rows, "bm25": words}, k)

    def found(self, text: str, rows_K: np.ndarray, score_K: np.ndarray, options: Sequence[str] = ()) -> list[Source]:
        """The passages of one question's ranking with their best-matching pieces."""
        rows = rows_K[rows_K >= 0]
        if not len(rows):
            return []
        q_1xQxC, length_1 = self.vectors([text], [options])
        before = len(self.corpus.prepared.retriever_ids.around("query")[0])
        p_NxPxC, keep_NxP = self.passage_vectors(rows)
        said_QxC = q_1xQxC[0, before : length_1[0] - 1]  # the question's own words, no markers and no filling
        results = []
        for place, (row, score) in enumerate(zip(rows.tolist(), score_K.tolist(), strict=False)):
            spans = self._spans(self._text(row), matches(said_QxC, p_NxPxC[place], keep_NxP[place]))
            results.append(plain_source(self.corpus.prepared, self.prompts, place + 1, row, score, spans))
        return results

    def _text(self, row: int) -> str:
        return self.prompts.retrieved(self.corpus.prepared.passages[row])

    def _spans(self, text: str, weight_P: np.ndarray) -> tuple[Span, ...]:
        """Where the best-matched tokens stand in the text; markers around the text have no place there."""
        first = len(self.corpus.prepared.retriever_ids.around("passage")[0])
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        weight = weight_P[first : first + len(offsets)]
        best = [at for at in np.argsort(-weight, kind="stable")[:SHOWN_MATCHES].tolist() if weight[at] > 0]
        return tuple(Span(offsets[at][0], offsets[at][1], round(float(weight[at]), 3)) for at in sorted(best))


def run_searcher(run: Run, name: str = INITIAL) -> Searcher:
    """Of a run: ``initial``, or the phase whose retriever and index are asked.

    Raises:
      IndexUnusable: no index of this retriever and corpus; `jmlr index` makes it.
    """
    params = retriever_of(run, None if name == INITIAL else name)
    fingerprint = params_fingerprint(jax.device_get(params))
    corpus = run.fingerprints["passages"]
    return Searcher(run, params, Shards.open(index_home(run, name), fingerprint, corpus, len(run.prepared.passages)))


def allowed_rows(source_N: np.ndarray, sources: Sequence[str]) -> np.ndarray | None:
    """See :meth:`Searcher.allowed`; None if no source is named."""
    if not sources:
        return None
    known = sorted(set(source_N.tolist()))
    if unknown := [source for source in sources if source not in known]:
        raise SearchError(f"--source {unknown[0]}: no passage is from there; there are {', '.join(known) or 'none'}")
    return np.isin(source_N, list(sources))


def lexical_search(
    lexical: BM25, texts: Sequence[str], depth: int, allowed_N: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """BM25's best passages among those that are allowed (None: all); rows int32 [n, depth] and scores, -1 padding."""
    words, scores = lexical.search(texts, depth if allowed_N is None else len(allowed_N))
    if allowed_N is None:
        return words, scores
    keep = (words >= 0) & allowed_N[np.maximum(words, 0)]
    order = np.argsort(~keep, axis=1, kind="stable")
    words, scores = np.where(keep, words, -1), np.where(keep, scores, -np.inf)
    return np.take_along_axis(words, order, 1)[:, :depth], np.take_along_axis(scores, order, 1)[:, :depth]


def plain_source(
    prepared: Prepared, prompts: Prompts, rank: int, row: int, score: float, spans: tuple[Span, ...] = ()
) -> Source:
    """A passage of the corpus as it is shown."""
    passage = prepared.passages[row]
    return Source(rank, passage.id, passage.source, passage.url, prompts.retrieved(passage), float(score), spans)


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
