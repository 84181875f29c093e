"""Building an index, tuning it, measuring it, and bringing it up to date when the corpus changes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.encoding import BATCH
from jmlr_jax.retrieval.exact import ExactIndex, ExactSearch
from jmlr_jax.retrieval.scann import SAMPLE_PASSAGES, ScannIndex, build_part
from jmlr_jax.retrieval.store import DIGEST_BYTES, Card, Index, IndexUnusable
from jmlr_jax.retrieval.tune import Curve, share_found, tune
from jmlr_jax.retrieval.vectors import TokenVectors, drawn_rows


def build_index(
    vectors: TokenVectors,
    cfg: IndexConfig,
    *,
    model_fingerprint: str,
    corpus_fingerprint: str,
    sample_q_NxQxC: np.ndarray,
    recall_at: tuple[int, ...],
    seed: int = 0,
    digests_Nx16: np.ndarray | None = None,
) -> Index:
    """An index of a corpus that is held in memory; see :func:`build_index_of_pieces`."""
    return build_index_of_pieces(
        (vectors.rows(slice(first, first + BATCH)) for first in range(0, len(vectors), BATCH)),
        vectors.rows(sample_rows(len(vectors), seed)),
        len(vectors),
        cfg,
        model_fingerprint=model_fingerprint,
        corpus_fingerprint=corpus_fingerprint,
        sample_q_NxQxC=sample_q_NxQxC,
        recall_at=recall_at,
        seed=seed,
        digests_Nx16=digests_Nx16,
    )


def sample_rows(passages: int, seed: int) -> np.ndarray:
    """Rows of the passages from which the token code is learned, in order, int64."""
    return drawn_rows(passages, SAMPLE_PASSAGES, seed)


def build_index_of_pieces(
    pieces: Iterable[TokenVectors],
    sample: TokenVectors,
    passages: int,
    cfg: IndexConfig,
    *,
    model_fingerprint: str,
    corpus_fingerprint: str,
    sample_q_NxQxC: np.ndarray,
    recall_at: tuple[int, ...],
    seed: int = 0,
    digests_Nx16: np.ndarray | None = None,
) -> Index:
    """Builds the index that ``cfg.kind`` names ("auto": exact below ``cfg.exact_below`` passages); tunes, measures it.

    Only one piece at a time is held uncoded, unless the index is an exact one. The exact oracle sees each piece as it
    passes.

    Args:
      pieces: encoded passages in corpus order.
      sample: passages drawn from the whole corpus (:func:`sample_rows`).
      passages: how many the pieces hold in all.
      cfg: kind, encoding, code, target.
      model_fingerprint: of the retriever that made the vectors (:func:`jmlr_jax.retrieval.store.params_fingerprint`).
      corpus_fingerprint: of the tokenised corpus.
      sample_q_NxQxC: questions for recall against the exact oracle; at most ``cfg.oracle_queries`` are used.
      recall_at: the K at which recall is measured, such as ``train.candidates``; the index is tuned at the largest.
      seed: of all random draws.
      digests_Nx16: uint8 :func:`jmlr_jax.retrieval.store.passage_digests` of every passage, without which the index
        cannot be updated.

    Raises:
      ValueError: the pieces hold another number of passages.
    """
    start = time.perf_counter()
    curve: Curve | None = None
    kind = cfg.kind if cfg.kind != "auto" else ("exact" if passages < cfg.exact_below else "scann")
    recall: dict[str, float] = {}
    sample_q_NxQxC = sample_q_NxQxC[: cfg.oracle_queries]
    oracle_seconds = 0.0
    if kind == "exact":
        searcher: ExactIndex | ScannIndex = ExactIndex(_joined(pieces))
        seconds = time.perf_counter() - start
    else:
        asked = len(sample_q_NxQxC) > 0 and len(recall_at) > 0
        oracle = ExactSearch(sample_q_NxQxC, min(max(recall_at), passages)) if asked else None

        def watched() -> Iterator[TokenVectors]:
            nonlocal oracle_seconds
            first = 0
            for piece in pieces:
                if oracle is not None:
                    began = time.perf_counter()
                    oracle.add(piece, first)
                    oracle_seconds += time.perf_counter() - began
                first += len(piece)
                yield piece

        index = ScannIndex.build(watched(), sample, passages, cfg, seed)
        seconds = time.perf_counter() - start - oracle_seconds
        if oracle is not None:
            exact_NxK, _ = oracle.result()
            index, curve = tune(index, sample_q_NxQxC, exact_NxK, cfg.rerank, cfg.recall)
            got_NxK, _ = index.search(sample_q_NxQxC, exact_NxK.shape[1])
            recall = {str(k): share_found(exact_NxK[:, :k], got_NxK[:, :k]) for k in recall_at}
        searcher = index
    if len(searcher) != passages:
        raise ValueError(f"{len(searcher)} passages came for an index of {passages}")
    card = Card(
        kind=searcher.kind,
        model_fingerprint=model_fingerprint,
        corpus_fingerprint=corpus_fingerprint,
        passages=passages,
        entries=passages,
        dim=sample.vectors_NxPxC.shape[-1],
        bits=16 if isinstance(searcher, ExactIndex) else cfg.bits,
        hits=searcher.hits if isinstance(searcher, ScannIndex) else passages,
        leaves=searcher.leaves if isinstance(searcher, ScannIndex) else None,
        spare=searcher.spare if isinstance(searcher, ScannIndex) else 1,
        build_seconds=round(seconds, 3),
        oracle_queries=len(sample_q_NxQxC) if recall else 0,
        recall=recall,
        recall_target=cfg.recall if recall else None,
    )
    return Index(searcher, card, digests_Nx16, curve)


def update_index(
    index: Index,
    digests_Nx16: np.ndarray,
    encode_rows: Callable[[np.ndarray], Iterable[TokenVectors]],
    *,
    corpus_fingerprint: str,
) -> Index:
    """The index of a changed corpus: passages that are stored already keep their place, only new ones are encoded.

    Passages may have been added, replaced, deleted and moved. What is no longer in the corpus stays in the files until
    the next full build, but belongs to no row and cannot be returned. ScaNN's partitions, the token code and the tuning
    stay those of the build.

    Args:
      index: of the same retriever over an earlier corpus.
      digests_Nx16: uint8, of every passage of the new corpus, in its order.
      encode_rows: rows of the new corpus, int64 [n] -> their vectors in order, in pieces; not called for none.
      corpus_fingerprint: of the new corpus.

    Raises:
      IndexUnusable: the index was built without digests.
      ValueError: an empty corpus, or digests of another form.
    """
    if index.digests_Ex16 is None:
        raise IndexUnusable("this index was built without digests of its passages; build the index again")
    if digests_Nx16.dtype != np.uint8 or digests_Nx16.ndim != 2 or digests_Nx16.shape[1] != DIGEST_BYTES:
        raise ValueError(f"digests must be uint8 [N, {DIGEST_BYTES}]; got {digests_Nx16.dtype} {digests_Nx16.shape}")
    if not len(digests_Nx16):
        raise ValueError("no passages: an index of an empty corpus finds nothing")
    entry_N, rows = match_entries(index.digests_Ex16, digests_Nx16)
    stored = len(index.digests_Ex16)
    digests_Ex16 = np.concatenate([index.digests_Ex16, digests_Nx16[rows]])
    old = index.searcher
    if isinstance(old, ExactIndex):
        fresh = [_joined(encode_rows(rows))] if len(rows) else []
        everything = _joined([old.vectors, *fresh])
        new: ExactIndex | ScannIndex = ExactIndex(everything.rows(entry_N))
        digests_Ex16, entries, index = digests_Nx16, len(entry_N), Index(new, index.card)
    else:
        parts = old.parts
        if len(rows):
            parts = (*parts, build_part(old.encoding, old.code, encode_rows(rows), len(rows)))
        new = ScannIndex(old.encoding, old.code, parts, entry_N, old.hits, old.leaves, old.spare)
        entries = stored + len(rows)
    changes = {
        "corpus_fingerprint": corpus_fingerprint,
        "passages": len(entry_N),
        "entries": entries,
        "updates": index.card.updates + 1,
    }
    return index.replaced(new, index.card.model_copy(update=changes), digests_Ex16)


def changed_share(index: Index, digests_Nx16: np.ndarray) -> float:
    """Share of the entries that an update would leave new or dead, outside the tuning; 1 without digests."""
    if index.digests_Ex16 is None:
        return 1.0
    entry_N, rows = match_entries(index.digests_Ex16, digests_Nx16)
    entries = len(index.digests_Ex16) + len(rows)
    built = index.searcher.parts[0].tokens if isinstance(index.searcher, ScannIndex) else index.searcher.vectors
    return 1 - int((entry_N < len(built)).sum()) / entries


def match_entries(stored_Ex16: np.ndarray, wanted_Nx16: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which entry serves each row of a new corpus.

    Returns:
      entry int64 [N], those from E on still to be made, and the rows int64 that they are for, in order.

    >>> stored, wanted = (np.repeat(np.array(x, np.uint8)[:, None], 16, 1) for x in ([5, 7, 7, 9], [9, 7, 4, 7, 7]))
    >>> match_entries(stored, wanted)
    (array([3, 1, 4, 2, 5]), array([2, 4]))
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    for entry in range(len(stored_Ex16) - 1, -1, -1):
        places[stored_Ex16[entry].tobytes()].append(entry)
    entry_N = np.empty(len(wanted_Nx16), np.int64)
    rows: list[int] = []
    for row, digest in enumerate(wanted_Nx16):
        have = places.get(digest.tobytes())
        if have:
            entry_N[row] = have.pop()
        else:
            entry_N[row] = len(stored_Ex16) + len(rows)
            rows.append(row)
    return entry_N, np.array(rows, np.int64)


def _joined(pieces: Iterable[TokenVectors]) -> TokenVectors:
    """All pieces as one, widened to the longest."""
    found = list(pieces)
    if len(found) == 1:
        return found[0]
    width = max(piece.keep_NxP.shape[1] for piece in found)
    pads = [(0, width - piece.keep_NxP.shape[1]) for piece in found]
    vectors = [np.pad(x.vectors_NxPxC, ((0, 0), pad, (0, 0))) for x, pad in zip(found, pads, strict=True)]
    keep = [np.pad(x.keep_NxP, ((0, 0), pad)) for x, pad in zip(found, pads, strict=True)]
    return TokenVectors(np.concatenate(vectors), np.concatenate(keep))
