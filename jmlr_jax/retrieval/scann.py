"""ScaNN over fixed-dimensional encodings, re-ranked on the device by MaxSim of the stored token vectors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scann.scann_ops.py import scann_ops_pybind
from scann.scann_ops.py.scann_builder import ReorderType

from jmlr_jax.chatter import hush_abseil
from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.code import TokenCode, fit_code
from jmlr_jax.retrieval.encoding import (
    BATCH,
    SAMPLE,
    Encoding,
    passage_vectors,
    plain_encoding,
    query_vectors,
    reduced,
)
from jmlr_jax.retrieval.fde import fit_fde
from jmlr_jax.retrieval.tokens import (
    BATCHES,
    TILE,
    Tiles,
    TokenStore,
    best_of,
    gather,
    padded,
    rounded,
    score_tokens,
    trimmed,
)
from jmlr_jax.retrieval.vectors import TokenVectors, check_allowed, check_queries, drawn_rows

SAMPLE_TOKENS = 1_000_000  # from which token code and partitions are learned
SAMPLE_PASSAGES = 20_000  # of which no more are taken
SPARE = 4  # where nothing is tuned, centroids choose one hit in so many to score in full
SOAR_LAMBDA = 1.5  # ScaNN's own choice where spilling is on


@dataclass(frozen=True)
class ScannSettings:
    """How ScaNN searches; leaves None: no tree."""

    leaves: int | None
    leaves_searched: int | None
    quantised: bool  # asymmetric hashing, or brute force over bfloat16 encodings


def settings(passages: int) -> ScannSettings:
    """Settings by corpus size, as ScaNN's authors advise.

    Brute force below 20,000 passages, asymmetric hashing below 100,000, above that a tree of about sqrt(n) leaves in
    front of it, with every encoding in two leaves (SOAR, arXiv 2404.00774). ScaNN's own reordering is left out:
    re-ranking by MaxSim takes its place, and its copy of the encodings would be most of the index.

    >>> settings(5_000)
    ScannSettings(leaves=None, leaves_searched=None, quantised=False)
    >>> settings(50_000)
    ScannSettings(leaves=None, leaves_searched=None, quantised=True)
    >>> settings(1_000_000)
    ScannSettings(leaves=1000, leaves_searched=250, quantised=True)
    """
    if passages < 20_000:
        return ScannSettings(None, None, False)
    if passages < 100_000:
        return ScannSettings(None, None, True)
    leaves = round(math.sqrt(passages))
    return ScannSettings(leaves, -(-leaves // 4), True)  # where nothing is tuned; scanning costs little


def build_searcher(fde_NxF: np.ndarray, how: ScannSettings) -> Any:
    """Trains a ScaNN searcher by inner product. Training is not deterministic: save the result."""
    hush_abseil(scann_ops_pybind.scann_pybind)
    builder = scann_ops_pybind.builder(fde_NxF, min(100, len(fde_NxF)), "dot_product")
    builder = builder.set_n_training_threads(os.cpu_count() or 1)
    if how.leaves is not None:
        sample = min(len(fde_NxF), 100 * how.leaves)
        builder = builder.tree(how.leaves, how.leaves_searched, training_sample_size=sample, soar_lambda=SOAR_LAMBDA)
    if how.quantised:
        return builder.score_ah(1, anisotropic_quantization_threshold=0.2).build()
    return builder.score_brute_force(ReorderType.BFLOAT16).build()


@dataclass(frozen=True)
class Part:
    """Passages that were indexed together: the whole corpus, or what an update brought."""

    tokens: TokenStore
    searcher: Any
    how: ScannSettings

    def save(self, directory: Path) -> None:
        """Writes the token files and ``scann/`` into an existing directory."""
        self.tokens.save(directory)
        (directory / "settings.json").write_text(json.dumps(asdict(self.how)) + "\n")
        (directory / "scann").mkdir()
        # Relative asset paths: the directory may be moved as a whole.
        self.searcher.serialize(str((directory / "scann").absolute()), relative_path=True)

    @classmethod
    def load(cls, directory: Path, code: TokenCode | None) -> Part:
        """Reads what :meth:`save` wrote."""
        # ScaNN resolves its assets against the path as given: only an absolute one survives a change of directory.
        searcher = scann_ops_pybind.load_searcher(str((directory / "scann").absolute()), assets_backcompat_shim=False)
        how = ScannSettings(**json.loads((directory / "settings.json").read_text()))
        return cls(TokenStore.load(directory, code), searcher, how)

    def nearest(self, fde_NxF: np.ndarray, hits: int, leaves: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Passages int32 [N, hits] (-1 padding) by product of encodings float32 [N, hits] (-inf there)."""
        hits = min(hits, len(self.tokens))
        batch = -(-len(fde_NxF) // (os.cpu_count() or 1))
        at, product = self.searcher.search_batched_parallel(
            fde_NxF, final_num_neighbors=hits, leaves_to_search=leaves, batch_size=max(1, batch)
        )
        # A tree search that finds too few pads with row 0 and NaN; with SOAR a passage may come from both its leaves.
        at = np.where(np.isnan(product), -1, at.astype(np.int64)).astype(np.int32)
        if self.how.leaves is not None:
            at = _without_repeats(at)
        return at, np.where(at >= 0, product, -np.inf).astype(np.float32)


class ScannIndex:
    """ScaNN's hits on the encodings, re-ranked by MaxSim over the stored token vectors.

    Use :meth:`build` or the store.

    Attributes:
      encoding: makes the single vectors.
      code: of the token vectors, None for float16.
      parts: what was indexed together; entries are numbered through them.
      entry_N: int64, the entry that holds each row of the corpus.
      hits: how many of ScaNN's hits are scored.
      leaves: how many leaves the first part's search visits; None without a tree.
      spare: one hit in so many is scored in full, chosen by their centroids; without a code all are.
    """

    kind = "scann"

    def __init__(
        self,
        encoding: Encoding,
        code: TokenCode | None,
        parts: Sequence[Part],
        entry_N: np.ndarray,
        hits: int,
        leaves: int | None,
        spare: int = SPARE,
    ):
        self.encoding, self.code, self.parts, self.entry_N = encoding, code, tuple(parts), np.asarray(entry_N)
        # Held by the device: they would cross with every question.
        self._encoding, self._code = jax.device_put(encoding), jax.device_put(code)
        self.hits, self.leaves, self.spare = hits, leaves, spare
        self.starts = np.cumsum([0, *(len(part.tokens) for part in self.parts)])
        self.row_E = np.full(self.starts[-1], -1, np.int32)  # the row that each entry holds, -1: none any more
        self.row_E[self.entry_N] = np.arange(len(self.entry_N), dtype=np.int32)
        alive = [self.row_E[a:b] >= 0 for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        self._alive = [None if part.all() else part for part in alive]

    @classmethod
    def build(
        cls,
        pieces: Iterable[TokenVectors],
        sample: TokenVectors,
        passages: int,
        cfg: IndexConfig,
        seed: int,
        how: ScannSettings | None = None,
    ) -> ScannIndex:
        """An index of ``passages`` passages that come in pieces; ``sample`` are passages drawn from all of them.

        ``how`` None chooses ScaNN's settings by corpus size. ``hits`` is ``cfg.rerank``: :mod:`.tune` finds less.
        """
        tokens_TxC = sample.vectors_NxPxC[sample.keep_NxP]
        if len(tokens_TxC) > SAMPLE_TOKENS:
            tokens_TxC = tokens_TxC[drawn_rows(len(tokens_TxC), SAMPLE_TOKENS, seed)]
        code = None
        if cfg.bits != 16:
            code = fit_code(tokens_TxC, cfg.bits, int(sample.keep_NxP.sum(1).mean() * passages), seed)
        encoding = plain_encoding(fit_fde(tokens_TxC, cfg.fde_partitions, seed))
        some = sample.rows(drawn_rows(len(sample), SAMPLE, seed))
        encoding = reduced(encoding, passage_vectors(encoding, some), cfg.pca_components)
        part = build_part(encoding, code, pieces, passages, how)
        return cls(encoding, code, (part,), np.arange(passages), cfg.rerank, part.how.leaves_searched)

    def tuned(self, hits: int, leaves: int | None, spare: int = SPARE) -> ScannIndex:
        """The same index with other settings of its search."""
        return ScannIndex(self.encoding, self.code, self.parts, self.entry_N, hits, leaves, spare)

    def __len__(self) -> int:
        return len(self.entry_N)

    @property
    def dim(self) -> int:
        """C, width of a token vector."""
        return len(self.encoding.fde.mean_C)

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; max(hits, k) passages are scored for each question.

        Raises:
          ValueError: width of the queries or length of the mask differ from the index, or k is below 1.
        """
        check_queries(q_NxQxC, self.dim, k)
        check_allowed(allowed_N, len(self))
        rows_NxK = np.full((len(q_NxQxC), k), -1, np.int32)
        score_NxK = np.full((len(q_NxQxC), k), -np.inf, np.float32)
        for first in range(0, len(q_NxQxC), BATCHES[-1]):
            q = q_NxQxC[first : first + BATCHES[-1]]
            row_NxH, _ = self.nearest(q, max(self.hits, k), allowed_N)
            kept = self.kept(row_NxH.shape[1], k)
            if kept < row_NxH.shape[1]:
                row_NxH, _ = best_of(row_NxH, self.rough_score(q, row_NxH), kept)
            rows_NxK[first : first + len(q)], score_NxK[first : first + len(q)] = best_of(
                row_NxH, self.score(q, row_NxH), k
            )
        return rows_NxK, score_NxK

    def compile(self, k: int, columns: int) -> None:
        """Compiles the scoring of every number of tiles that a search for `k` passages can come to.

        Args:
          columns: tokens of a question, as :func:`jmlr_jax.retrieval.tokens.trimmed` leaves them.
        """
        stores = [part.tokens for part in self.parts]
        longest = max((-(-int(np.diff(store.offsets).max(initial=0)) // TILE) for store in stores), default=0)
        hits = min(max(self.hits, k), len(self))
        whole, rough = tuple(stores[0].arrays), ("centroid",)
        for names, count in [(whole, self.kept(hits, k))] + [(rough, hits)] * (self.code is not None):
            tiles, most = rounded(1), rounded(count * longest)
            while tiles <= most:
                like = {name: stores[0].arrays[name] for name in names}
                arrays = {name: np.zeros((tiles, TILE, *x.shape[1:]), x.dtype) for name, x in like.items()}
                none = np.zeros(tiles, np.int32)
                score_tokens(
                    self._code, np.zeros((columns, self.dim), np.float32), Tiles(arrays, none, none), hits=count
                ).block_until_ready()
                tiles = rounded(tiles + 1)

    def kept(self, hits: int, k: int) -> int:
        """How many of so many hits are scored in full for the best k, after all have been by their centroids."""
        return hits if self.code is None else min(hits, max(2 * k, -(-hits // self.spare)))

    def nearest(
        self, q_NxQxC: np.ndarray, hits: int, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """ScaNN's best rows that are allowed, for at most 64 questions.

        Returns:
          rows int32 [N, hits], best first, -1 where there is no further one, and products of encodings float32
          [N, hits], -inf there.
        """
        hits = min(hits, len(self))
        fde_NxF = np.asarray(query_vectors(self._encoding, padded(trimmed(q_NxQxC))))[: len(q_NxQxC)]
        rows, products = [], []
        for number, (part, start) in enumerate(zip(self.parts, self.starts, strict=False)):
            row_e = self.row_E[start : start + len(part.tokens)]
            alive = self._alive[number]
            if allowed_N is not None:
                alive = (row_e >= 0) & allowed_N[row_e]
            leaves = part.how.leaves_searched if number else self.leaves
            row, product = _living(part, fde_NxF, hits, alive, leaves)
            rows.append(np.where(row >= 0, row_e[row], -1))
            products.append(product)
        return best_of(np.concatenate(rows, 1), np.concatenate(products, 1), hits)

    def score(self, q_NxQxC: np.ndarray, row_NxH: np.ndarray) -> np.ndarray:
        """MaxSim of the stored vectors of these rows, float32 [N, H], -inf where the row is -1."""
        return self._scored(q_NxQxC, row_NxH, tuple(self.parts[0].tokens.arrays))

    def rough_score(self, q_NxQxC: np.ndarray, row_NxH: np.ndarray) -> np.ndarray:
        """The same with every token taken to be its centroid; needs a code."""
        return self._scored(q_NxQxC, row_NxH, ("centroid",))

    def _scored(self, q_NxQxC: np.ndarray, row_NxH: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
        """The host gathers the tokens for the next question while the device scores those of the last."""
        stores = [part.tokens for part in self.parts]
        score_NxH = np.empty(row_NxH.shape, np.float32)
        waiting: Any = None
        for number, row_H in enumerate(row_NxH):
            tiles = gather(stores, names, np.where(row_H >= 0, self.entry_N[np.maximum(row_H, 0)], -1))
            started = score_tokens(self._code, trimmed(q_NxQxC[number : number + 1])[0], tiles, hits=len(row_H))
            if waiting is not None:
                score_NxH[number - 1] = waiting
            waiting = started
        if waiting is not None:
            score_NxH[-1] = waiting
        return np.where(row_NxH >= 0, score_NxH, -np.inf)


def build_part(
    encoding: Encoding,
    code: TokenCode | None,
    pieces: Iterable[TokenVectors],
    passages: int,
    how: ScannSettings | None = None,
) -> Part:
    """Codes and encodes passages, a piece at a time, and trains ScaNN on the encodings."""
    how = settings(passages) if how is None else how
    encoding, device_code = jax.device_put(encoding), jax.device_put(code)
    fde_NxF = np.empty((passages, encoding.width), np.float32)
    done = 0

    def passing() -> Iterable[TokenVectors]:
        nonlocal done
        for piece in pieces:
            if done + len(piece) > passages:
                raise ValueError(f"more passages came than the {passages} that the index is for")
            for first in range(0, len(piece), BATCH):
                block = piece.rows(slice(first, first + BATCH))
                fde_NxF[done : done + len(block)] = passage_vectors(encoding, block, passages)
                done += len(block)
                yield block

    tokens = TokenStore.of(passing(), code, device_code)
    if done != passages:
        raise ValueError(f"only {done} passages came for an index of {passages}")
    return Part(tokens, build_searcher(fde_NxF, how), how)


def _living(
    part: Part, fde_NxF: np.ndarray, hits: int, alive: np.ndarray | None, leaves: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A part's hits among its living passages (None: all live): more are asked for until there are enough, or no more.

    Returns:
      passages int32 [N, any], -1 where dead or padding, and products float32.
    """
    if alive is None:
        return part.nearest(fde_NxF, hits, leaves)
    living, total, all_leaves = int(alive.sum()), len(alive), part.how.leaves
    wanted, crowd = min(hits, living), total / max(1, living)
    ask = math.ceil(hits * crowd)  # as many as suffice if the living are spread evenly
    leaves = None if leaves is None else math.ceil(leaves * crowd)
    while True:
        ask = min(ask, total)
        leaves = None if leaves is None or all_leaves is None else min(leaves, all_leaves)
        at, product = part.nearest(fde_NxF, ask, leaves)
        at = np.where((at >= 0) & alive[np.maximum(at, 0)], at, -1)
        everything = ask == total and leaves == all_leaves
        if everything or np.all((at >= 0).sum(1) >= wanted):
            return at, np.where(at >= 0, product, -np.inf).astype(np.float32)
        ask, leaves = 2 * ask, None if leaves is None else 2 * leaves


def _without_repeats(at_NxH: np.ndarray) -> np.ndarray:
    """Later occurrences of a passage in a row become -1."""
    order = np.argsort(at_NxH, axis=1, kind="stable")
    ordered = np.take_along_axis(at_NxH, order, 1)
    repeat = np.zeros(at_NxH.shape, bool)
    np.put_along_axis(repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    return np.where(repeat, -1, at_NxH)
