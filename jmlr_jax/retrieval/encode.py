"""Encoding a corpus or all questions: large batches of one compiled shape, over all devices of a mesh.

The encoders are arguments (``nn.functional.encode_passages`` and ``encode_queries`` in the program), as is the way
token rows are read, so nothing here knows a model or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.parallel.progress import track
from jmlr_jax.parallel.sharding import partition_spec
from jmlr_jax.retrieval.vectors import TokenVectors

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
      rows: int [n], numbers of the passages.
      skip_V: bool, vocabulary entries that take no part in MaxSim.
      batch: passages at once over all devices; rounded up to a multiple of the mesh's devices.
      mesh: every batch is split over all its devices; None runs where ``params`` are.
    """
    run = partial(encode_batch, params, encode=encode, cfg=cfg, replicated=_replicated(mesh))

    def one(ids: Array, length: Array) -> tuple[Array, Array]:
        return run(ids, length, skip_V)

    for n, (p, keep) in _pipelined(one, lambda places: read(rows[places]), len(rows), batch, mesh, "passages"):
        yield TokenVectors(np.asarray(p)[:n], np.asarray(keep)[:n])


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
    for n, q_bxQxC in _pipelined(run, read, questions, batch, mesh, "questions"):
        yield np.asarray(q_bxQxC)[:n]


def _replicated(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _pipelined(
    run: Callable[[Any, Any], Any], read: ReadRows, rows: int, batch: int, mesh: Mesh | None, unit: str
) -> Iterator[tuple[int, Any]]:
    """Runs every batch, yielding (rows that count, result); the device makes the next while the host reads one."""
    if mesh is not None:
        batch = -(-batch // mesh.size) * mesh.size
    waiting: tuple[int, Any] | None = None
    for first in track(range(0, rows, batch), rows, f"encoding {unit}", unit, each=batch):
        # The last batch keeps the shape: it is filled up with rows from the start, whose results are dropped.
        ids, length = read(np.arange(first, first + batch) % rows)
        # Set here, for as long as this call takes: a mesh is set per thread, and a refresh runs in its own.
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            result = run(_place(ids, mesh), _place(length, mesh))
        if waiting is not None:
            yield waiting
        waiting = min(batch, rows - first), result
    if waiting is not None:
        yield waiting


def _place(array: np.ndarray, mesh: Mesh | None) -> Any:
    """A batch split over all devices of the mesh; every host has all rows and places its own."""
    if mesh is None:
        return array
    sharding = NamedSharding(mesh, partition_spec(("encoder_batch",), "encoded rows"))
    return jax.make_array_from_callback(array.shape, sharding, lambda where: array[where])
