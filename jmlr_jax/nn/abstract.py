"""The weights of a run as shapes with their places: what restores them from disk, lays out a step and makes a plan."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from jmlr_jax.config_models import AdapterConfig, LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.nn import lora
from jmlr_jax.nn.functional import abstract_params, logical_axes
from jmlr_jax.nn.layers import Params
from jmlr_jax.parallel.sharding import shardings


def abstract_weights(
    retriever: RetrieverConfig, llama: LlamaConfig, adapters: LoraConfig | None, mesh: Mesh
) -> dict[str, Params]:
    """``retriever``, ``generator`` and, under adapters, ``base``, each array a ``ShapeDtypeStruct`` on the mesh.

    Raises:
        ShardingError: a weight does not divide over the devices.
        LoraError: the adapters do not fit the model.
    """
    weights = {
        "retriever": place(abstract_params(retriever), logical_axes(retriever), mesh),
        "generator": place(abstract_params(llama), logical_axes(llama), mesh),
    }
    if adapters is not None:
        weights["base"], weights["generator"] = weights["generator"], abstract_adapters(adapters, llama, mesh)
    return weights


def abstract_adapters(cfg: AdapterConfig, model: LlamaConfig | RetrieverConfig, mesh: Mesh) -> Params:
    """The tree of :func:`jmlr_jax.nn.lora.init_lora` as shapes on the mesh; errors as :func:`abstract_weights`."""
    return place(lora.abstract_lora(cfg, model), lora.lora_axes(cfg, model), mesh)


def place(shapes: Params, axes: Params, mesh: Mesh) -> Params:
    """Shapes with the places that the rules of :mod:`jmlr_jax.parallel.sharding` give their logical axes."""
    return put(shapes, shardings(mesh, axes, shapes))


def put(shapes: Any, places: Any) -> Any:
    """Shapes with these shardings, a tree like theirs."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
