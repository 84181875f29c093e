"""The seam between models and everything else: pure functions over plain nested dicts of arrays.

Flax modules exist only behind these functions. The shape, dtype, logical axes and initialiser of a weight stand in one
row of its module; the trees below are derived from those rows. Layers are stacked on a leading axis and scanned.
All functions trace under ``jax.jit``, ``jax.grad`` and ``jax.checkpoint``; configurations are static and hashable.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmlr_jax.config_models import BertConfig, LlamaConfig, RetrieverConfig
from jmlr_jax.nn.colbert import Colbert, trunk
from jmlr_jax.nn.layers import Adapters, Params
from jmlr_jax.nn.llama import Llama
from jmlr_jax.nn.packing import Packing
from jmlr_jax.parallel.sharding import constrain

ModelConfig = LlamaConfig | BertConfig | RetrieverConfig


def init_llama(cfg: LlamaConfig, key: jax.Array) -> Params:
    """Random decoder weights: ``embed``, ``layers`` (stacked), ``final_norm`` and, unless tied, ``lm_head``.

    Raises:
        ValueError: cfg.vocab_size is still 0.
    """
    return _init(cfg, key)


def init_bert(cfg: BertConfig, key: jax.Array) -> Params:
    """Random encoder weights, the ``bert`` part of :func:`init_colbert`.

    Raises:
        ValueError: cfg.vocab_size is still 0.
    """
    return _init(cfg, key)


def init_colbert(cfg: RetrieverConfig, key: jax.Array) -> Params:
    """Random retriever weights: ``bert`` and ``projection``.

    Raises:
        ValueError: cfg.bert.vocab_size is still 0.
    """
    return _init(cfg, key)


def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as ``ShapeDtypeStruct``, nothing allocated."""
    return nnx.to_pure_dict(_abstract(cfg)[1])


def logical_axes(cfg: ModelConfig) -> Params:
    """The parameter tree with each array replaced by the tuple of its logical axis names."""
    state = _abstract(cfg)[1]
    return nnx.to_pure_dict(jax.tree.map(lambda row: row.replace(row.axes), state, is_leaf=_is_param))


def llama_hidden(
    params: Params,
    cfg: LlamaConfig,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    *,
    adapters: Adapters | None = None,
    places: int | None = None,
    int8: bool = False,
) -> jax.Array:
    """Hidden states BxTxD after the final norm, in cfg.dtype.

    Args:
        tokens_BxT: int, right-padded; what stands in the padding does not matter.
        length_B: int, real tokens of each row.
        adapters: from :func:`jmlr_jax.nn.lora.bind`.
        places: compute for so many places, which the real tokens share end to end, instead of for B x T, with equal
            results. On a mesh it is those of each device that has rows of its own; at least
            :func:`jmlr_jax.nn.packing.fullest`.
        int8: the projections of all layers round both sides of their products to int8
            (:func:`jmlr_jax.nn.products.quantise`); then there are no adapters and no gradients.

    Returns:
        Position t sees tokens 0..t (in layers with a window W: the last W of them). Zero from `length_B` on.
    """
    start_B = jnp.zeros_like(length_B)
    packing = None if places is None else Packing.of(length_B, tokens_BxT.shape[1], places)
    return _model(cfg, params)(tokens_BxT, length_B, start_B, None, adapters, packing, int8)[0]


def llama_logits(params: Params, cfg: LlamaConfig, hidden: jax.Array, *, adapters: Adapters | None = None) -> jax.Array:
    """Next-token logits ...xV in float32 at hidden states ...xD; give it only the positions that are asked for."""
    return _model(cfg, params).logits(hidden, adapters)


def init_cache(cfg: LlamaConfig, rows: int, slots: int) -> Params:
    """Empty keys and values, each [layers, rows, slots, kv heads, head width] in cfg.dtype; slot = position."""
    shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_width)
    axes = ("layers", "batch", "length", "kv_heads", "head_dim")
    return {name: constrain(jnp.zeros(shape, cfg.dtype), *axes) for name in ("k", "v")}


def llama_cached(
    params: Params,
    cfg: LlamaConfig,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    cache: Params,
    *,
    adapters: Adapters | None = None,
) -> tuple[jax.Array, Params]:
    """:func:`llama_hidden` of the next tokens of each row, with the keys and values of the earlier ones in `cache`.

    Args:
        tokens_BxT: int, right-padded; the first stands at position `start_B`.
        start_B: int, tokens of each row already in the cache; ``start + T`` must not exceed the slots.
        length_B: int, real tokens of each row with these counted.
        cache: from :func:`init_cache` or an earlier call. Keys of padding may enter it: they stand at positions
            that no query sees before a later token has overwritten them.

    Returns:
        Hidden states BxTxD (zero at padding) and the cache with T more positions.
    """
    return _model(cfg, params)(tokens_BxT, length_B, start_B, cache, adapters)


def bert_hidden(params: Params, cfg: BertConfig, ids_BxT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Encoder outputs BxTxD in cfg.dtype; tokens from `length_B` on are not attended to.

    Raises:
        ValueError: T exceeds cfg.max_positions.
    """
    return _model(cfg, params)(ids_BxT, length_B)


def encode_queries(params: Params, cfg: RetrieverConfig, ids_BxQ: jax.Array, length_B: jax.Array) -> jax.Array:
    """Token vectors BxQxC of queries, float32 (method.md, step 1), unit vectors unless cfg.importance.

    Args:
        ids_BxQ: int, ``[CLS] [Q] ... [SEP]`` filled up with ``[MASK]`` (cfg.augment_queries) or padding.
        length_B: int, tokens before the filling.

    Returns:
        With augmentation every position counts, and the filling is attended to only if cfg.attend_to_mask_tokens;
        without it vectors from `length_B` on are zero, which add nothing to MaxSim. With cfg.importance each has the
        weight of its token for its length, ``exp(<q, u>)`` for the learned direction u (learned weights in MaxSim:
        arXiv 2511.16106; there one for each word, here a function of the vector).
    """
    return _model(cfg, params).queries(ids_BxQ, length_B)


def encode_passages(
    params: Params, cfg: RetrieverConfig, ids_NxP: jax.Array, length_N: jax.Array, skip_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Unit token vectors NxPxC of passages, float32, and which of them count (method.md, step 1).

    Args:
        ids_NxP: int, right-padded.
        length_N: int, real tokens of each row; 0 is a row with no passage.
        skip_V: bool, vocabulary entries that take no part in MaxSim (punctuation); they are attended to all the same.

    Returns:
        ``p_NxPxC``, zero where masked, and ``keep_NxP`` bool: neither padding nor skipped.
    """
    return _model(cfg, params).passages(ids_NxP, length_N, skip_V)


def _build(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(cfg, LlamaConfig):
        return Llama(cfg, rngs)
    return trunk(cfg, rngs) if isinstance(cfg, BertConfig) else Colbert(cfg, rngs)


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Param)


@partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(_build(cfg, nnx.Rngs(params=key)), nnx.Param))


@lru_cache(maxsize=64)
def _abstract(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: _build(cfg, nnx.Rngs(0))))


def _model(cfg: ModelConfig, params: Params) -> Any:
    """The module that `cfg` describes around these parameters.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape.
    """
    wanted, given = _shapes(abstract_params(cfg)), _shapes(params)
    if wanted != given:
        faults = [f"{k} missing" for k in sorted(wanted.keys() - given.keys())]
        faults += [f"{k} unknown" for k in sorted(given.keys() - wanted.keys())]
        faults += [
            f"{k} is {given[k]}, not {wanted[k]}" for k in sorted(wanted) if given.get(k, wanted[k]) != wanted[k]
        ]
        raise ValueError(f"parameters do not fit {type(cfg).__name__}: {'; '.join(faults[:8])}")
    return nnx.merge(_abstract(cfg)[0], params)


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
