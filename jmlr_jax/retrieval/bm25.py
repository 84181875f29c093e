"""BM25 candidates: the lexical baseline every claim is held against (method.md, Around the step)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer

from jmlr_jax.unspaced import spaced

logging.getLogger("bm25s").setLevel(logging.WARNING)  # the library sets DEBUG, and says so on every index


def best_rows(score_N: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k largest scores, best first, equal scores in row order; all rows where k exceeds N.

    >>> best_rows(np.array([1.0, 3.0, 1.0, 2.0]), 3)
    array([1, 3, 0])
    """
    if k < len(score_N):
        # A partition alone would leave the choice among equal scores at the cut to chance.
        bar = np.partition(score_N, len(score_N) - k)[len(score_N) - k]
        rows = np.flatnonzero(score_N >= bar)
    else:
        rows = np.arange(len(score_N))
    return rows[np.argsort(-score_N[rows], kind="stable")][:k]


class BM25:
    """Lucene's BM25 (k1 = 1.5, b = 0.75) over English word stems, stop words removed.

    Text without spaces between words is found by its overlapping pairs of characters (``unspaced.py``).

    Deterministic: scores add up in the order of the question's words, equal scores keep the order of the passages.

    Args:
      texts: one string per passage (title and text joined by the caller), in corpus order.

    Raises:
      ValueError: no texts.
    """

    def __init__(self, texts: Sequence[str]):
        if len(texts) == 0:
            raise ValueError("BM25 needs at least one passage; the corpus is empty")
        self._stemmer = Stemmer.Stemmer("english")
        words = self._words(texts)
        self._index: bm25s.BM25 | None = None
        if any(words):  # a corpus of stop words alone has nothing to index; every search of it is empty
            self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
            self._index.index(words, show_progress=False)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            [spaced(text) for text in texts],
            stopwords="english",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query.

        Only passages that share a word with the query are returned, so a query of unknown words has none.

        Args:
          queries: n strings.
          k: at least 1; may exceed the corpus.

        Returns:
          rows int32 [n, k], best first, -1 where there is no further passage, and scores float32 [n, k], -inf there.

        Raises:
          ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one passage")
        rows = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if self._index is None:
            return rows, scores
        for i, words in enumerate(self._words(queries)):
            known = self._index.get_tokens_ids(words)
            if not known:
                continue
            score_N = self._index.get_scores_from_ids(known)
            best = best_rows(score_N, k)
            best = best[score_N[best] > 0]  # lucene's idf is positive: zero means no word in common
            rows[i, : len(best)] = best
            scores[i, : len(best)] = score_N[best]
        return rows, scores

    def shared(self, query: str, text: str) -> list[tuple[int, int]]:
        """Places ``text[start:end]`` of the words that query and text have in common, as the index compares them.

        >>> BM25(["..."]).shared("which drugs help", "A drug, drugged"), BM25(["..."]).shared("the", "the")
        ([(2, 6), (8, 15)], [])
        """
        asked = set(self._words([query])[0])
        found = list(re.finditer(r"\w+", text))
        stems = self._words([word[0] for word in found]) if found else []
        return [(word.start(), word.end()) for word, stem in zip(found, stems, strict=True) if asked & set(stem)]
