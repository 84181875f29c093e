"""Weights of Hugging Face directories, read tensor by tensor straight into the layout of the mesh.

Peak host memory is near the largest single tensor: each is copied to the devices as it lies on disk, and turned, cast
and written into its place in the layer stack there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jmlr_jax.config_models import LlamaConfig, RetrieverConfig, unattended
from jmlr_jax.files import any_path
from jmlr_jax.hf import bert, config, encoder_config, llama
from jmlr_jax.hf.io import Entry, HFError, read_directory, read_json
from jmlr_jax.hf.layouts import Source, check_conventions, check_source, open_retriever
from jmlr_jax.hf.table import Axes, Row, Shape, assign, gather, leaves, nest
from jmlr_jax.nn.functional import abstract_params, logical_axes
from jmlr_jax.nn.layers import Params, fan_in
from jmlr_jax.parallel.distributed import console
from jmlr_jax.parallel.progress import track
from jmlr_jax.parallel.sharding import shardings


def load_generator(
    source: str, asked: LlamaConfig, mesh: Mesh | None = None, *, tokens: int = 0
) -> tuple[LlamaConfig, Params]:
    """A causal decoder from a Hugging Face directory.

    Args:
        source: the directory, of a class in :data:`jmlr_jax.hf.config.DECODERS` or around one, in safetensors of
            float32, bfloat16 or float16.
        asked: the user's ``generator.llama``: dtype, param_dtype, remat, and a vocabulary size if it is to be padded. A
            shape that is set must agree with the checkpoint.
        mesh: where the weights go; the first device if None.
        tokens: size of the tokenizer used with it. Rows of the embedding and the head beyond the checkpoint's are the
            mean of its rows.

    Returns:
        The full configuration and the parameters, in asked.param_dtype.

    Raises:
        HFError: names every field, tensor or file that does not fit.
        ShardingError: the mesh does not divide the weights.
    """
    check_source(source)
    raw, file = read_json(any_path(source) / "config.json"), f"{source}/config.json"
    found = config.llama_from_hf(raw, file)
    cfg = config.resolve(found, asked, tokens, "generator.llama", source)
    entries = decoder_entries(read_directory(source), cfg, source)
    rows = llama.llama_rows(cfg)
    assigned = assign(rows, leaves(abstract_params(found)), entries, llama.canonical, source)
    return cfg, nest(_place_all(rows, assigned, abstract_params(cfg), logical_axes(cfg), mesh))


def load_retriever(
    source: str, cfg: RetrieverConfig, key: jax.Array, mesh: Mesh | None = None, *, tokens: int = 0
) -> tuple[RetrieverConfig, Params]:
    """A late-interaction encoder from a Hugging Face directory (layouts: :mod:`jmlr_jax.hf.layouts`).

    Args:
        source: the directory.
        cfg: the user's ``retriever``; its ``bert`` as `asked` in :func:`load_generator`.
        key: draws the projection of a directory that has none (a plain BertModel).
        mesh, tokens: as in :func:`load_generator`.

    Returns:
        `cfg` with ``bert`` and ``dim`` resolved, and the parameters.

    Raises:
        HFError: names every field, tensor or file that does not fit; also a convention of the checkpoint (markers,
            attention to the augmentation, punctuation) that `cfg` departs from.
        ShardingError: the mesh does not divide the weights.
    """
    opened = open_retriever(source)
    check_conventions(opened, cfg)
    found = encoder_config.bert_from_hf(opened.config, f"{source}/config.json")
    resolved = config.resolve(found, cfg.bert, tokens, "retriever.bert", source)
    if opened.dim is not None and "dim" in cfg.model_fields_set and cfg.dim != opened.dim:
        raise HFError(f"retriever.dim={cfg.dim}, the projection of {source} has {opened.dim}; leave it out")
    cfg = cfg.model_copy(update={"bert": resolved, "dim": opened.dim or cfg.dim})
    if fault := unattended(cfg):
        raise HFError(f"{source}: {fault}")
    check_position_ids(opened)

    abstract, axes = abstract_params(cfg), logical_axes(cfg)
    smaller = cfg.model_copy(update={"bert": found})
    # What is not in the files is not in their table either.
    rows = bert.colbert_rows(resolved, **opened.head)
    wanted = {path: leaf for path, leaf in leaves(abstract_params(smaller)).items() if opened.head.get(path, True)}
    placed = _place_all(rows, assign(rows, wanted, opened.entries, bert.canonical, source), abstract, axes, mesh)
    if opened.dim is None:
        target = abstract["projection"]
        where = _shardings(abstract, axes, mesh)["projection"]
        draw = jax.jit(lambda k: fan_in(1)(k, target.shape, jnp.float32).astype(target.dtype), out_shardings=where)
        placed["projection"] = draw(key)
    if cfg.importance and not opened.head["importance"]:
        placed["importance"] = _zeros((cfg.dim,), np.dtype("float32"), _shardings(abstract, axes, mesh)["importance"])()
    return cfg, nest(placed)


def _place_all(
    rows: Sequence[Row], assigned: Mapping[str, list[Entry]], abstract: Params, axes: Params, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Every weight on its devices, by dotted path; raises HFError naming those with values that are not finite."""
    targets, places = leaves(abstract), _shardings(abstract, axes, mesh)
    placed, faults = {}, []
    folder = next(iter(assigned.values()))[0].file.parent
    for row in track(rows, len(rows), f"loading {folder}", "weights"):
        entries = assigned[row.path]
        placed[row.path] = _place(row, entries, targets[row.path], places[row.path])
        if not _all_finite(placed[row.path]):
            faults.append(f"{row.key.format('*')} of {entries[0].dtype} as {targets[row.path].dtype}")
    if faults:
        raise HFError(
            f"{folder}: not all values are finite in {', '.join(gather(faults))}; is a wider param_dtype needed?"
        )
    return placed


def _shardings(abstract: Params, axes: Params, mesh: Mesh | None) -> dict[str, Sharding]:
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(leaves(abstract), here)
    return leaves(shardings(mesh, axes, abstract))


def _place(row: Row, entries: Sequence[Entry], target: jax.ShapeDtypeStruct, place: Sharding) -> jax.Array:
    """One weight: the tensors of its layers, or the one there is, with rows added to a vocabulary that is short."""
    dtype = np.dtype(target.dtype)
    if not row.layered:
        return _converter(row.axes, target.shape, dtype, place)(_raw(entries[0], row, place))
    stack, write = _zeros(target.shape, dtype, place)(), _writer(row.axes, target.shape[1:], dtype, place)
    for layer, entry in enumerate(entries):
        # Waiting keeps one tensor at a time in the host's memory.
        stack = jax.block_until_ready(write(stack, _raw(entry, row, place), jnp.asarray(layer)))
    return stack


# Compiled functions are kept: many weights, and models loaded one after the other, share shapes.


@lru_cache(maxsize=256)
def _zeros(shape: Shape, dtype: np.dtype[Any], place: Sharding) -> Any:
    """Compiled: () -> zeros."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=place)


@lru_cache(maxsize=256)
def _converter(axes: Axes, shape: Shape, dtype: np.dtype[Any], place: Sharding) -> Any:
    """Compiled: their tensor on the devices -> ours of `shape`."""

    def convert(raw: jax.Array) -> jax.Array:
        more = axes.their_shape(shape)[0] - raw.shape[0]
        if more:  # a short vocabulary: assign() let nothing else through
            mean = jnp.mean(raw.astype(jnp.float32), axis=0, keepdims=True).astype(dtype)
            raw = jnp.concatenate([raw.astype(dtype), jnp.broadcast_to(mean, (more, *raw.shape[1:]))])
        return axes.to_ours(raw, shape).astype(dtype)

    return jax.jit(convert, out_shardings=place)


@lru_cache(maxsize=256)
def _writer(axes: Axes, shape: Shape, dtype: np.dtype[Any], place: Sharding) -> Any:
    """Compiled: (stack, their tensor of a layer, layer) -> the stack, in place, with it."""

    def write(stack: jax.Array, raw: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, axes.to_ours(raw, shape).astype(dtype), layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=place)


def _raw(entry: Entry, row: Row, place: Sharding) -> jax.Array:
    """A tensor on the devices as it lies on disk, on each device about the part that it will keep.

    Each host reads what its own devices hold.
    """
    array, where = entry.read(), place
    if isinstance(place, NamedSharding):
        spec = (*place.spec, *(None,) * (len(row.axes.ours) + row.layered - len(place.spec)))[row.layered :]
        of = dict(zip(row.axes.ours, spec, strict=True))
        entries = []
        for group, size in zip(row.axes.theirs, entry.shape, strict=True):
            names = of[group[0]]  # the slowest axis of a merged one splits it into whole blocks
            ways = math.prod(place.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
            entries.append(names if size % ways == 0 else None)
        where = NamedSharding(place.mesh, PartitionSpec(*entries))
    return jax.make_array_from_callback(entry.shape, where, lambda index: np.asarray(array[index]))


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def decoder_entries(entries: Mapping[str, Entry], cfg: LlamaConfig, source: str) -> dict[str, Entry]:
    """The tensors of a decoder: what sees images is left out, and said to be; so is a head that is tied.

    Raises:
        HFError: a tied head that is stored and is not the embedding.
    """
    if vision := [key for key in entries if llama.is_vision(key)]:
        console().print(f"{source}: left out {len(vision)} tensors that see images ({', '.join(_parts(vision))})")
    entries = {key: entry for key, entry in entries.items() if key not in vision}
    if not cfg.tie_embeddings:
        return entries
    by_name = {llama.canonical(key): entry for key, entry in entries.items()}
    head, embed = by_name.get(llama.HEAD), by_name.get(llama.EMBED)
    if head and embed and (head.shape != embed.shape or not np.array_equal(head.read(), embed.read())):
        raise HFError(
            f"{source}: {llama.HEAD} differs from {llama.EMBED}, but config.json says tie_word_embeddings: true; "
            "if the model has a head of its own, set it to false"
        )
    return {key: entry for key, entry in entries.items() if llama.canonical(key) != llama.HEAD}


def _parts(keys: Sequence[str]) -> list[str]:
    return sorted({key.removeprefix("model.").partition(".")[0] + ".*" for key in keys})


def check_position_ids(source: Source) -> None:
    """Old encoders store the positions 0, 1, 2, ...; raises HFError if these are others."""
    for key in (bert.POSITION_IDS, f"bert.{bert.POSITION_IDS}"):
        if key in source.entries:
            ids = source.entries[key].read().reshape(-1)
            if not np.array_equal(ids, np.arange(len(ids))):
                raise HFError(f"{source.directory}: {key} is not 0, 1, 2, ...; other positions are not computed here")
