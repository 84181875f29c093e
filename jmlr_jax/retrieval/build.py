"""Building an index, tuning it, measuring it, and bringing it up to date when the corpus changes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.encoding import BATCH
from jmlr_jax.retrieval.exact import ExactIndex, ExactSearch
from jmlr_jax.retrieval.scann import SAMPLE_PASSAGES, ScannIndex, build_part
from jmlr_jax.retrieval.store import DIGEST_BYTES, Card, Index, IndexUnusable
from jmlr_jax.retrieval.tune import Curve, ann_recall, tune
from jmlr_jax.retrieval.vectors import EncodeRows, TokenVectors, drawn_rows


def sample_rows(passages: int, seed: int) -> np.ndarray:
    """Rows of the passages from which code and encoding are learned, in order, int64."""
    return drawn_rows(passages, SAMPLE_PASSAGES, seed)


def build_index(
    encode_rows: EncodeRows,
    passages: int,
    cfg: IndexConfig,
    *,
    model_fingerprint: str,
    corpus_fingerprint: str,
    sample_q_NxQxC: np.ndarray,
    ann_recall_at: tuple[int, ...],
    seed: int = 0,
    digests_Nx16: np.ndarray | None = None,
) -> Index:
    """Builds the index that ``cfg.kind`` names ("auto": exact below ``cfg.exact_below`` passages); tunes, measures it.

    Every passage is encoded once: first those that code and encoding are learned from, then the others as they pass.
    Beside the sample no more than a few blocks are held uncoded, unless the index is an exact one. The exact oracle
    sees each block as it passes.

    Args:
      encode_rows: gives the vectors of any passages.
      passages: how many there are.
      cfg: kind, encoding, code, target.
      model_fingerprint: of the retriever that made the vectors (:func:`jmlr_jax.retrieval.store.params_fingerprint`).
      corpus_fingerprint: of the tokenised corpus.
      sample_q_NxQxC: questions for ANN recall, against the exact oracle; at most ``cfg.oracle_queries`` are used.
      ann_recall_at: the K at which ANN recall is measured, such as ``train.candidates``; the largest is tuned for.
      seed: of all random draws.
      digests_Nx16: uint8 :func:`jmlr_jax.retrieval.store.passage_digests` of every passage, without which the index
        cannot be updated.

    Raises:
      ValueError: no passages, or another number of them came than was asked for.
    """
    if passages < 1:
        raise ValueError("no passages: an index of an empty corpus finds nothing")
    start = time.perf_counter()
    curve: Curve | None = None
    kind = cfg.kind if cfg.kind != "auto" else ("exact" if passages < cfg.exact_below else "scann")
    found: dict[str, float] = {}
    sample_q_NxQxC = sample_q_NxQxC[: cfg.oracle_queries]
    oracle_seconds = 0.0
    if kind == "exact":
        searcher: ExactIndex | ScannIndex = ExactIndex(_joined(encode_rows(np.arange(passages)), passages))
        seconds = time.perf_counter() - start
    else:
        asked = len(sample_q_NxQxC) > 0 and len(ann_recall_at) > 0
        oracle = ExactSearch(sample_q_NxQxC, min(max(ann_recall_at), passages)) if asked else None

        sampled = sample_rows(passages, seed)
        sample = _joined(encode_rows(sampled), len(sampled))

        def watched() -> Iterator[TokenVectors]:
            nonlocal oracle_seconds
            first = 0
            for block in _blocks(encode_rows, passages, sampled, sample):
                if oracle is not None:
                    began = time.perf_counter()
                    oracle.add(block, first)
                    oracle.wait()  # its time would count as the build's
                    oracle_seconds += time.perf_counter() - began
                first += len(block)
                yield block

        index = ScannIndex.build(watched(), sample, passages, cfg, seed)
        seconds = time.perf_counter() - start - oracle_seconds
        if oracle is not None:
            exact_NxK, _ = oracle.result()
            index, curve = tune(index, sample_q_NxQxC, exact_NxK, cfg.rerank, cfg.ann_recall)
            got_NxK, _ = index.search(sample_q_NxQxC, exact_NxK.shape[1])
            found = {str(k): ann_recall(exact_NxK[:, :k], got_NxK[:, :k]) for k in ann_recall_at}
        searcher = index
    card = Card(
        kind=searcher.kind,
        model_fingerprint=model_fingerprint,
        corpus_fingerprint=corpus_fingerprint,
        passages=passages,
        entries=passages,
        dim=searcher.dim,
        bits=16 if isinstance(searcher, ExactIndex) else cfg.bits,
        hits=searcher.hits if isinstance(searcher, ScannIndex) else passages,
        leaves=searcher.leaves if isinstance(searcher, ScannIndex) else None,
        spare=searcher.spare if isinstance(searcher, ScannIndex) else 1,
        build_seconds=round(seconds, 3),
        oracle_queries=len(sample_q_NxQxC) if found else 0,
        ann_recall=found,
        ann_recall_target=cfg.ann_recall if found else None,
    )
    return Index(searcher, card, digests_Nx16, curve)


def update_index(
    index: Index,
    digests_Nx16: np.ndarray,
    encode_rows: EncodeRows,
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
      encode_rows: gives the vectors of any rows of the new corpus; not called for none.
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
        fresh = [_joined(encode_rows(rows), len(rows))] if len(rows) else []
        everything = _joined([old.vectors, *fresh], len(old) + len(rows))
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


def changed_fraction(index: Index, digests_Nx16: np.ndarray) -> float:
    """Fraction of the entries that an update would leave new or dead, outside the tuning; 1 without digests."""
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


def _blocks(
    encode_rows: EncodeRows, passages: int, sampled: np.ndarray, sample: TokenVectors
) -> Iterator[TokenVectors]:
    """All passages in order, BATCH at a time; those of the sample are not encoded again."""
    known_N = np.zeros(passages, bool)
    known_N[sampled] = True
    parts = [known_N[first : first + BATCH] for first in range(0, passages, BATCH)]
    sizes = [size for part in parts if (size := int((~part).sum()))]
    groups, taken = _groups(encode_rows(np.flatnonzero(~known_N)) if sizes else (), sizes), 0
    for known_B in parts:
        count = int(known_B.sum())
        halves = [sample.rows(slice(taken, taken + count))] if count else []
        taken += count
        if count < len(known_B):
            halves.append(next(groups))
        order_B = np.argsort(np.concatenate([np.flatnonzero(known_B), np.flatnonzero(~known_B)]))
        yield _joined(halves, len(known_B)).rows(order_B)


def _joined(pieces: Iterable[TokenVectors], count: int) -> TokenVectors:
    """So many passages, at least one, as one."""
    return next(_groups(pieces, [count]))


def _groups(pieces: Iterable[TokenVectors], sizes: Sequence[int]) -> Iterator[TokenVectors]:
    """Passages that come in pieces of any number, in groups of these numbers, each at least 1 and as wide as need be.

    Raises:
      ValueError: fewer or more passages come than the groups take.
    """
    source, left = iter(pieces), None
    for number, size in enumerate(sizes):
        made, done = None, 0
        while done < size:
            left = next(source, None) if left is None else left
            if left is None:
                came = sum(sizes[:number]) + done
                raise ValueError(f"only {came} passages came of {sum(sizes)} that were asked for")
            part, rest = left.rows(slice(0, size - done)), len(left) - (size - done)
            left = left.rows(slice(size - done, None)) if rest > 0 else None
            made = part if len(part) == size else _put(made, part, done, size)
            done += len(part)
        if number == len(sizes) - 1 and (left is not None or next(source, None) is not None):
            raise ValueError(f"more passages came than the {sum(sizes)} that were asked for")
        assert made is not None
        yield made


def _put(made: TokenVectors | None, part: TokenVectors, at: int, size: int) -> TokenVectors:
    """A group of ``size`` passages (None: not begun) with a part in it from passage ``at`` on, written in place."""
    rows, width, dim = part.vectors_NxPxC.shape
    if made is None:
        made = TokenVectors(np.zeros((size, width, dim), np.float16), np.zeros((size, width), np.bool_))
    wider = width - made.keep_NxP.shape[1]
    if wider > 0:
        vectors = np.pad(made.vectors_NxPxC, ((0, 0), (0, wider), (0, 0)))
        made = TokenVectors(vectors, np.pad(made.keep_NxP, ((0, 0), (0, wider))))
    made.vectors_NxPxC[at : at + rows, :width] = part.vectors_NxPxC
    made.keep_NxP[at : at + rows, :width] = part.keep_NxP
    return made
