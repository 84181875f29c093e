"""Indexes of a run: made by its retrievers, kept under ``index/NAME``, and asked for its questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmlr_jax.method.scoring import maxsim
from jmlr_jax.nn.functional import encode_passages, encode_queries
from jmlr_jax.parallel.placement import local_mesh
from jmlr_jax.retrieval.build import build_index, changed_fraction, update_index
from jmlr_jax.retrieval.candidates import build_table
from jmlr_jax.retrieval.encode import encode_passages_batched, encode_queries_batched
from jmlr_jax.retrieval.shards import Shards, best_of_all, shard_fingerprint, shard_folder, shard_rows
from jmlr_jax.retrieval.store import Index, IndexUnusable, open_index, params_fingerprint, passage_digests
from jmlr_jax.retrieval.vectors import TokenVectors, drawn_rows
from jmlr_jax.run.artifact import RECORD, Recipe, making
from jmlr_jax.run.open import DataError, Run
from jmlr_jax.run.recipes import index_recipe

UPDATE_BELOW = 0.3  # an index is built anew where more of its entries would be new or dead, outside code and tuning
DIGEST_CHUNK = 8192  # passages read at once
PAIR_CHUNK = 64  # questions whose passages' token vectors are held at once
_maxsim = jax.jit(maxsim)


def index_home(run: Run, name: str) -> Path:
    """Where the index of that name is kept, whole or in shards."""
    return run.directory / "index" / name


def index_folder(run: Run, name: str) -> Path:
    """Where this process keeps its index of that name: the whole corpus, or its own shard of it."""
    return shard_folder(index_home(run, name), jax.process_index(), jax.process_count())


def retriever_index(run: Run, retriever: Any, keep: bool = False) -> Shards:
    """An index of the corpus as this retriever encodes it; one that was saved by an equal recipe is opened.

    One of an equal recipe but for the corpus is brought up to date where not too much has changed: only passages that
    it does not hold are encoded. Nothing else can be kept: other weights give other vectors for every passage.

    Of several processes each encodes and indexes its own shard of the passages, on its own devices and without a word
    to the others, so that this may run in a thread beside training.

    Args:
      retriever: of :func:`jmlr_jax.parallel.placement.local_arrays`.
      keep: the index will be saved, so it is given what an update needs to know.
    """
    passages, corpus = _shard(run)

    def encode_rows(rows: np.ndarray) -> Iterator[TokenVectors]:
        return passage_vectors(run, retriever, passages.start + rows)

    def own(index: Index) -> Shards:
        return Shards([(passages, index)], len(run.prepared.passages))

    model = params_fingerprint(jax.device_get(retriever))
    for folder, same_corpus in _saved(run, model):
        try:
            index = open_index(folder, model, corpus if same_corpus else None)
        except IndexUnusable:
            continue  # damaged; `jmlr search` says so
        if same_corpus:
            return own(index)
        digests = _digests(run, passages)
        if changed_fraction(index, digests) <= UPDATE_BELOW:
            with _alone(run):
                return own(update_index(index, digests, encode_rows, corpus_fingerprint=corpus))
    cfg, prepared = run.cfg, run.prepared
    with _alone(run):
        # Drawn: files are often sorted by source or kind, and an index tuned on one kind finds less for the others.
        rows = drawn_rows(len(prepared.questions("train")), cfg.index.oracle_queries, run.seed("questions that tune"))
        asked = list(query_vectors(run, retriever, "train", rows))
        made = build_index(
            encode_rows,
            len(passages),
            cfg.index,
            model_fingerprint=model,
            corpus_fingerprint=corpus,
            sample_q_NxQxC=np.concatenate(asked) if asked else np.zeros((0, 1, run.retriever.dim), np.float32),
            ann_recall_at=(cfg.train.candidates,),
            seed=run.seed("index"),
            digests_Nx16=_digests(run, passages) if keep else None,
        )
    return own(made)


def _saved(run: Run, model: str) -> list[tuple[Path, bool]]:
    """Saved indexes of these weights, and whether they are of this corpus; those that are first."""
    found = []
    for record in sorted(run.directory.glob(str(index_folder(run, "*").relative_to(run.directory) / RECORD))):
        asked, made = index_recipe(run.cfg, run.fingerprints, record.parent, model), Recipe.read(record.parent)
        if made is not None and made.keys == asked.keys:
            other = {name for name, digest in asked.inputs.items() if made.inputs.get(name) != digest}
            if other <= {"passages"}:
                found.append((record.parent, not other))
    return sorted(found, key=lambda item: not item[1])


def keep_index(run: Run, name: str, retriever: Any, said: Callable[[str], object]) -> Index:
    """Makes the index ``index/NAME`` of a retriever, or finds it made by an equal recipe.

    Args:
      retriever: of :func:`jmlr_jax.parallel.placement.local_arrays`.
      said: takes a line for each difference from an index that is replaced.

    Raises:
      ArtifactError: another process is making it.
    """
    folder = index_folder(run, name)
    recipe = index_recipe(run.cfg, run.fingerprints, folder, params_fingerprint(jax.device_get(retriever)))
    made = Recipe.read(folder)
    differ = None if made is None else recipe.differences(made)
    for line in differ or ():
        said(f"{folder}: made again, {line}")
    with making(folder):
        ((_, index),) = retriever_index(run, retriever, keep=True).held
        if differ != [] or not index.card.state.name:
            (folder / RECORD).unlink(missing_ok=True)  # until the new one is whole, none is found by its recipe
            index.save(folder)
            recipe.write()
    return index


def _digests(run: Run, passages: range) -> np.ndarray:
    """What tells two passages apart for a given retriever, uint8 [N, 16]: their tokens, and which of them count."""

    def rows() -> Iterator[np.ndarray]:
        for first in range(passages.start, passages.stop, DIGEST_CHUNK):
            ids_nxP, length_n = run.prepared.passage_tokens(np.arange(first, min(first + DIGEST_CHUNK, passages.stop)))
            for ids_P, length in zip(ids_nxP, length_n, strict=True):
                yield np.concatenate([ids_P[:length], run.prepared.skip_V[ids_P[:length]]])

    return passage_digests(rows())


def _shard(run: Run) -> tuple[range, str]:
    """Passages that this process indexes, and the fingerprint of that part of the corpus."""
    count, whole = len(run.prepared.passages), run.fingerprints["passages"]
    if count < jax.process_count():
        raise DataError(f"{count} passages cannot be shared among {jax.process_count()} processes; start fewer")
    rows = shard_rows(count, jax.process_index(), jax.process_count())
    return rows, shard_fingerprint(whole, rows, count)


def _alone(run: Run) -> AbstractContextManager[Any]:
    """While this is open, arrays made on the way belong to this process, where that makes a difference."""
    own = local_mesh(run.mesh)
    return nullcontext() if own is run.mesh else jax.set_mesh(own)


def _encode_batch(run: Run) -> int:
    return -(-run.cfg.index.encode_batch // jax.process_count())


def passage_vectors(run: Run, retriever: Any, rows: np.ndarray) -> Iterator[TokenVectors]:
    """Token vectors of these passages in order, in pieces."""
    return encode_passages_batched(
        encode_passages,
        retriever,
        run.retriever,
        run.prepared.passage_tokens,
        rows,
        run.prepared.skip_V,
        batch=_encode_batch(run),
        mesh=local_mesh(run.mesh),
    )


def query_vectors(run: Run, retriever: Any, split: str, rows: np.ndarray) -> Any:
    """Token vectors of these questions in order, in pieces [n, Q, C]."""

    def read(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return run.prepared.query_tokens(split, rows[places])

    return encode_queries_batched(
        encode_queries,
        retriever,
        run.retriever,
        read,
        len(rows),
        batch=_encode_batch(run),
        mesh=local_mesh(run.mesh),
    )


def search(
    run: Run, index: Shards, retriever: Any, split: str, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages of these questions in the shards of this process: corpus rows int32 [n, k], and scores."""
    with _alone(run):
        return build_table(index.held_best, query_vectors(run, retriever, split, rows), len(rows), k)


def pair_scores(run: Run, retriever: Any, split: str, rows_n: np.ndarray, table_nxK: np.ndarray) -> np.ndarray:
    """Exact MaxSim of these questions and their passages, float32 [n, K], NaN where the table has -1.

    Args:
      retriever: of :func:`jmlr_jax.parallel.placement.local_arrays`; every process computes all scores on its own.
    """
    score_nxK = np.full(table_nxK.shape, np.nan, np.float32)
    with _alone(run):
        for first in range(0, len(rows_n), PAIR_CHUNK):
            # The last chunk keeps the shape: it is filled up with questions that have no passages.
            at = np.arange(first, first + PAIR_CHUNK)
            inside = at < len(rows_n)
            table = np.where(inside[:, None], table_nxK[at % len(rows_n)], -1)
            if not (table >= 0).any():
                continue
            q_BxQxC = np.concatenate(list(query_vectors(run, retriever, split, rows_n[at % len(rows_n)])))
            passages, place = np.unique(np.maximum(table, 0), return_inverse=True)
            pieces = list(passage_vectors(run, retriever, passages))
            p_NxPxC, keep_NxP = (
                np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("vectors_NxPxC", "keep_NxP")
            )
            place = place.reshape(table.shape)
            found = np.asarray(_maxsim(q_BxQxC, p_NxPxC[place].astype(np.float32), keep_NxP[place]))
            score_nxK[at[inside]] = np.where(table >= 0, found, np.nan)[inside]
    return score_nxK


def merged(row_nxK: np.ndarray, score_nxK: np.ndarray) -> np.ndarray:
    """The best of what all processes found, int32 [n, k]; a collective: the main thread of each calls it."""
    return best_of_all(row_nxK, score_nxK, row_nxK.shape[1])[0]


def retrieve(run: Run, index: Shards, retriever: Any, split: str, rows: np.ndarray, k: int) -> np.ndarray:
    """The k best passages of the corpus for these questions, int32 [n, k], best first; a collective."""
    return merged(*search(run, index, retriever, split, rows, k))
