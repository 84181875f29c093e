"""Encoding a corpus or all questions: large batches of one compiled shape, over all devices of a mesh.

The encoders are arguments (``nn.functional.encode_passages`` and ``encode_queries`` in the program), as is the way
token rows are read, so nothing here knows a model or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.parallel.progress import Stage
from jmlr_jax.parallel.sharding import partition_spec
from jmlr_jax.retrieval.vectors import TokenVectors

# Passages are sorted by width where there are this many batches of them: fewer are not worth further compilations.
MANY, WIDTHS = 64, 6

Params = Any
ReadRows = Callable[
    [np.ndarray], tuple[np.ndarray, np.ndarray]
]  # row numbers [b] -> ids int32 [b, T], lengths int32 [b]
EncodePassages = Callable[..., tuple[Array, Array]]  # (params, cfg, ids_bxP, length_b, skip_V) -> (p_bxPxC, keep_bxP)
EncodeQueries = Callable[..., Array]  # (params, cfg, ids_bxQ, length_b) -> q_bxQxC


# The encoder and its configuration are static: every refresh of a run finds the first one's compilation.
@partial(jax.jit, static_argnames=("encode", "cfg", "replicated"))
def encode_batch(
    params: Params,
    ids: Array,
    length: Array,
    skip_V: Array,
    *,
    encode: EncodePassages,
    cfg: RetrieverConfig,
    replicated: NamedSharding | None,
) -> tuple[Array, Array]:
    """Token vectors of one batch of passages, p_bxPxC float16 and keep_bxP bool: the program that encodes a corpus."""
    p_bxPxC, keep_bxP = encode(params, cfg, ids, length, skip_V)
    return _replicate((p_bxPxC.astype(jnp.float16), keep_bxP), replicated)


@partial(jax.jit, static_argnames=("encode", "cfg", "replicated"))
def _queries(
    params: Params,
    ids: Array,
    length: Array,
    *,
    encode: EncodeQueries,
    cfg: RetrieverConfig,
    replicated: NamedSharding | None,
) -> Array:
    return _replicate(encode(params, cfg, ids, length).astype(jnp.float32), replicated)


def _replicate(tree: Any, replicated: NamedSharding | None) -> Any:
    """Results on every device, so that each host of a pod can read all of them."""
    return tree if replicated is None else jax.lax.with_sharding_constraint(tree, replicated)


def encode_passages_batched(
    encode: EncodePassages,
    params: Params,
    cfg: RetrieverConfig,
    read: ReadRows,
    rows: np.ndarray,
    skip_V: np.ndarray,
    *,
    batch: int,
    mesh: Mesh | None = None,
) -> Iterator[TokenVectors]:
    """Token vectors of passages in the order asked for, in pieces of at most ``batch``; no rows, no pieces.

    Args:
      encode: ``nn.functional.encode_passages`` or its like; the same object on every call, or it compiles again.
      params: of the retriever, on the device (sharded, where there is a mesh).
      cfg: shape of the retriever.
      read: token rows by number, such as ``partial(table.padded, length=..., pad_id=...)``.
      rows: int [n], numbers of the passages. Of many, those of like length are encoded together and padded no further
        than they need: each of at most ``WIDTHS`` widths is compiled once.
      skip_V: bool, vocabulary entries that take no part in MaxSim.
      batch: passages at once over all devices; rounded up to a multiple of the mesh's devices.
      mesh: every batch is split over all its devices; None runs where ``params`` are.
    """
    run = partial(encode_batch, params, encode=encode, cfg=cfg, replicated=_replicated(mesh))
    batch = _over(mesh, batch)
    many = len(rows) >= MANY * batch
    pool = MANY * batch if many else batch

    def batches() -> Iterator[_Batch]:
        for first in range(0, len(rows), pool):
            yield from _by_width(*read(rows[first : first + pool]), batch, WIDTHS if many else 1)

    def one(ids: Array, length: Array) -> tuple[Array, Array]:
        return run(ids, length, skip_V)

    made: TokenVectors | None = None  # of the pool whose batches are being encoded
    for part, (p, keep) in _pipelined(one, batches(), len(rows), "passages", mesh):
        made = made or TokenVectors(np.zeros((*part.pool, cfg.dim), np.float16), np.zeros(part.pool, np.bool_))
        n, width = len(part.places), part.ids.shape[1]
        made.vectors_NxPxC[part.places, :width], made.keep_NxP[part.places, :width] = (
            np.asarray(p)[:n],
            np.asarray(keep)[:n],
        )
        if part.last:
            yield from (made.rows(slice(first, first + batch)) for first in range(0, len(made), batch))
            made = None


def encode_queries_batched(
    encode: EncodeQueries,
    params: Params,
    cfg: RetrieverConfig,
    read: ReadRows,
    questions: int,
    *,
    batch: int,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Token vectors of every question in order, float32 [n, Q, C] pieces of at most ``batch``.

    Arguments as :func:`encode_passages_batched`; no questions, no pieces.
    """
    run = partial(_queries, params, encode=encode, cfg=cfg, replicated=_replicated(mesh))
    batch = _over(mesh, batch)

    def batches() -> Iterator[_Batch]:
        for first in range(0, questions, batch):
            yield from _by_width(*read(np.arange(first, min(first + batch, questions))), batch, 1)

    for part, q_bxQxC in _pipelined(run, batches(), questions, "questions", mesh):
        yield np.asarray(q_bxQxC)[: len(part.places)]


def _replicated(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _over(mesh: Mesh | None, batch: int) -> int:
    """A batch that every device of the mesh has equally many rows of."""
    return batch if mesh is None else -(-batch // mesh.size) * mesh.size


@dataclass(frozen=True)
class _Batch:
    """Rows that are encoded together.

    Attributes:
      ids, length: int32 [b, T] and [b]; beyond those of ``places`` they repeat these, so that every batch has b.
      places: where they stand among those that were read at once.
      pool: shape of all that were read at once.
      last: whether they are the last of these.
    """

    ids: np.ndarray
    length: np.ndarray
    places: np.ndarray
    pool: tuple[int, ...]
    last: bool


def _by_width(ids_NxT: np.ndarray, length_N: np.ndarray, batch: int, widths: int) -> Iterator[_Batch]:
    """Batches of rows that need the same width, of so many widths; a row's width depends on its own length alone."""
    step = -(-ids_NxT.shape[1] // (8 * widths)) * 8  # tiles of a TPU hold 8 rows
    width_N = np.minimum(np.maximum(-(-length_N // step), 1) * step, ids_NxT.shape[1])
    parts = [
        (int(width), alike[first : first + batch])
        for width in np.unique(width_N)
        for alike in [np.flatnonzero(width_N == width)]
        for first in range(0, len(alike), batch)
    ]
    for number, (width, places) in enumerate(parts, 1):
        filled = np.resize(places, batch)
        yield _Batch(ids_NxT[filled, :width], length_N[filled], places, ids_NxT.shape, number == len(parts))


def _pipelined(
    run: Callable[[Any, Any], Any], batches: Iterable[_Batch], rows: int, unit: str, mesh: Mesh | None
) -> Iterator[tuple[_Batch, Any]]:
    """Runs every batch, yielding it with its result; the device makes the next while the host reads one."""
    waiting: tuple[_Batch, Any] | None = None
    with Stage(f"encoding {unit}", rows, unit, brief=True) as stage:
        done = 0
        for part in batches:
            # Set here, for as long as this call takes: a mesh is set per thread, and a refresh runs in its own.
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                result = run(_place(part.ids, mesh), _place(part.length, mesh))
            if waiting is not None:
                yield waiting
            waiting, done = (part, result), done + len(part.places)
            stage.update(done)
        if waiting is not None:
            yield waiting


def _place(array: np.ndarray, mesh: Mesh | None) -> Any:
    """A batch split over all devices of the mesh; every host has all rows and places its own."""
    if mesh is None:
        return array
    sharding = NamedSharding(mesh, partition_spec(("encoder_batch",), "encoded rows"))
    return jax.make_array_from_callback(array.shape, sharding, lambda where: array[where])
