"""Low-rank adapters (LoRA, arXiv 2106.09685) on the projections of either model, in a tree of their own.

The adapter of a projection w [in, out] is a [in, rank] and b [rank, out]; it adds ``alpha / rank * x a b``. The base
stays outside the gradients: train the tree of :func:`init_lora`. The decoder takes ``bind(tree, ...)`` beside its base.
The encoder is small and has no dropout: its weights are made whole by :func:`merge` where a step begins, and gradients
reach the adapters through that.

Weights are known by name. Those of the encoder's trunk and its projection to token vectors stand in one tree here
(:func:`_named`), as the decoder's do: ``layers`` and what is beside them.

``lora.whole`` names weights that train entirely beside the adapters (norms, the embedding). Of these the tree holds the
difference from the base, in float32 and zero at the start: small updates are not lost in a bfloat16 base, and decay
draws them to the base, not to zero. :func:`complete` adds them to the base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jmlr_jax.config_models import AdapterConfig, LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.errors import JmlrError
from jmlr_jax.nn.functional import abstract_params, logical_axes
from jmlr_jax.nn.layers import TARGETS, Adapters, Params, fan_in

ModelConfig = LlamaConfig | RetrieverConfig
IN_AXES = {"o": 2}  # leading axes that a projection contracts (heads and head width here); 1 elsewhere


class LoraError(JmlrError, ValueError):
    """Adapters that do not fit the model; the message names the setting and what there is."""


@partial(jax.jit, static_argnums=(0, 1))
def init_lora(cfg: AdapterConfig, model: ModelConfig, key: jax.Array) -> Params:
    """Adapters that change nothing yet: a normal with variance 1 / in, b zero; both float32.

    Returns:
        ``{"layers": {target: {"a": [layers, in..., rank], "b": [layers, rank, out...]}}, "lm_head": {"a", "b"}}`` and,
        with ``cfg.whole``, ``"whole"``: differences from the base weights of these names, placed as in the base.

    Raises:
        LoraError: a target that this model has no projection for, a weight to train whole that it does not have, or
            a name given twice.
    """
    shapes = abstract_lora(cfg, model)

    def one(name: str, shape: dict[str, jax.ShapeDtypeStruct], layered: bool) -> Params:
        here = jax.random.fold_in(key, TARGETS.index(name))
        a = fan_in(IN_AXES.get(name, 1))
        if layered:
            keys = jax.random.split(here, shape["a"].shape[0])
            value = jax.vmap(lambda k: a(k, shape["a"].shape[1:], jnp.float32))(keys)
        else:
            value = a(here, shape["a"].shape, jnp.float32)
        return {"a": value, "b": jnp.zeros(shape["b"].shape, jnp.float32)}

    tree: Params = {"layers": {name: one(name, shape, True) for name, shape in shapes["layers"].items()}}
    if "lm_head" in shapes:
        tree["lm_head"] = one("lm_head", shapes["lm_head"], False)
    if "whole" in shapes:
        tree["whole"] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["whole"])
    return tree


def abstract_lora(cfg: AdapterConfig, model: ModelConfig) -> Params:
    """The tree of :func:`init_lora` as ``ShapeDtypeStruct``; the same errors."""

    def pair(name: str, base: jax.ShapeDtypeStruct, layered: bool) -> Params:
        lead, inner, outer = _split(name, base.shape, layered)
        shapes = {"a": (*lead, *inner, cfg.rank), "b": (*lead, cfg.rank, *outer)}
        return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}

    def difference(base: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(base.shape, jnp.float32)

    return _map_targets(cfg, abstract_params(model), pair, difference)


def lora_axes(cfg: AdapterConfig, model: ModelConfig) -> Params:
    """The tree of :func:`init_lora` with logical axis names, those of the base weight around "rank"."""

    def pair(name: str, base: tuple[str, ...], layered: bool) -> Params:
        lead, inner, outer = _split(name, base, layered)
        return {"a": (*lead, *inner, "rank"), "b": (*lead, "rank", *outer)}

    return _map_targets(cfg, logical_axes(model), pair, lambda base: base)


def bind(tree: Params, cfg: LoraConfig, key: jax.Array | None = None) -> Adapters:
    """Adapters as the model takes them; with a key their inputs are dropped at cfg.dropout, without one never."""
    return Adapters(tree=tree, key=key, scale=cfg.alpha / cfg.rank, dropout=cfg.dropout)


def complete(params: Params, tree: Params) -> Params:
    """The base with what trains whole (``tree["whole"]``) added to it; these weights become float32."""
    base, whole = _named(params), tree.get("whole", {})
    layers = {name: base["layers"][name] + change for name, change in whole.get("layers", {}).items()}
    rest = {name: base[name] + change for name, change in whole.items() if name != "layers"}
    return _placed(base | rest | {"layers": base["layers"] | layers}, params)


@partial(jax.jit, static_argnums=2)
def merge(params: Params, tree: Params, cfg: AdapterConfig) -> Params:
    """Weights with adapters and what trains whole added, computed in float32, in each weight's own dtype.

    Raises:
        LoraError: an adapter whose weight is not in `params`.
    """

    def add(name: str, w: jax.Array, adapter: Params, layered: bool) -> jax.Array:
        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)

        delta = (jax.vmap(product) if layered else product)(adapter["a"], adapter["b"])
        return (w.astype(jnp.float32) + cfg.alpha / cfg.rank * delta).astype(w.dtype)

    base, adapters = _named(params), tree.get("layers", {})
    lost = sorted(adapters.keys() - base["layers"].keys()) + sorted(tree.keys() - {"layers", "whole"} - base.keys())
    if lost:
        raise LoraError(f"adapters {', '.join(lost)} have no weight to merge into")
    layers = {name: add(name, base["layers"][name], adapter, True) for name, adapter in adapters.items()}
    merged = jax.tree.map(lambda new, old: new.astype(old.dtype), complete(base, tree), base)
    merged |= {"layers": merged["layers"] | layers}
    if "lm_head" in tree:
        merged["lm_head"] = add("lm_head", base["lm_head"], tree["lm_head"], False)
    return _placed(merged, params)


def _named(params: Params) -> Params:
    """A model's tree by the names of its weights: the encoder's trunk (``bert``) without the level that holds it."""
    return params.get("bert", {}) | {name: part for name, part in params.items() if name != "bert"}


def _placed(named: Params, like: Params) -> Params:
    """The inverse of :func:`_named`, for the tree `like`."""
    trunk = {"bert": {name: named[name] for name in like["bert"]}} if "bert" in like else {}
    return {name: named[name] for name in like if name != "bert"} | trunk


def _split(name: str, axes: tuple[Any, ...], layered: bool) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Shape or axis names of a base weight as (layer axis if any, contracted axes, produced axes)."""
    lead = int(layered)
    inner = lead + IN_AXES.get(name, 1)
    return axes[:lead], axes[lead:inner], axes[inner:]


def _map_targets(
    cfg: AdapterConfig, params: Params, pair: Callable[[str, Any, bool], Params], difference: Callable[[Any], Any]
) -> Params:
    """The adapter tree made by ``pair(target, entry of the base tree, is it stacked)`` and ``difference(entry)``."""
    base, section = _named(params), "retriever.lora" if "bert" in params else "generator.lora"
    named = (*cfg.targets, *cfg.whole)
    doubled = sorted({name for name in named if named.count(name) > 1})
    if doubled:
        raise LoraError(f"{section}.targets and {section}.whole together name {', '.join(doubled)} twice")
    present = [name for name in TARGETS if name in base["layers"] or name in base]
    for name in cfg.targets:
        if name not in present:
            tied = " (the head is tied to the embedding: llama.tie_embeddings)" if name == "lm_head" else ""
            raise LoraError(f"{section}.targets: {name!r} matches no projection{tied}; there are {', '.join(present)}")
    weights = sorted({*base["layers"], *base} - {"layers"})
    for name in cfg.whole:
        if name not in weights:
            raise LoraError(f"{section}.whole: {name!r} matches no weight; there are {', '.join(weights)}")
    tree: Params = {"layers": {n: pair(n, base["layers"][n], True) for n in cfg.targets if n != "lm_head"}}
    if "lm_head" in cfg.targets:
        tree["lm_head"] = pair("lm_head", base["lm_head"], False)
    if cfg.whole:
        tree["whole"] = {n: difference(base[n]) for n in cfg.whole if n in base}
        tree["whole"]["layers"] = {n: difference(base["layers"][n]) for n in cfg.whole if n in base["layers"]}
    return tree
