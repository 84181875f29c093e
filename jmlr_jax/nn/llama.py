"""The Llama family: Llama 2 and 3, Mistral (sliding window), Qwen2 (biases), Qwen3 (normed queries and keys), Gemma 3.

Of Gemma 3 (``block: gemma``) what attention and network make is normed too before it is added, every norm multiplies by
one plus its weight, the network is a GELU's, and embeddings are scaled up. All else it shares, layers with and without
a window included (:mod:`jmlr_jax.nn.rotary`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.nn.attention import attend
from jmlr_jax.nn.layers import (
    AXES,
    MLP,
    QKV,
    Adapters,
    Params,
    embedding,
    fan_in,
    ones,
    project,
    residual,
    rms_norm,
    scan_layers,
    stack,
    weight,
    zeros,
)
from jmlr_jax.nn.packing import Packing
from jmlr_jax.nn.rotary import Kinds, Rope, apply_rope
from jmlr_jax.parallel.sharding import constrain

HIDDEN = ("batch", "length", "hidden")


class LlamaLayer(nnx.Module):
    """Pre-norm attention and a gated network, each added to the residual stream."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        D, F, H, G, t = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.num_kv_heads, cfg.param_dtype
        E, same = cfg.head_width, zeros if cfg.block == "gemma" else ones  # a norm that changes nothing yet
        self.attn_norm = weight(rngs, (D,), ("norm",), same, t)
        self.q = weight(rngs, (D, H, E), AXES["q"], fan_in(1), t)
        self.k = weight(rngs, (D, G, E), AXES["k"], fan_in(1), t)
        self.v = weight(rngs, (D, G, E), AXES["v"], fan_in(1), t)
        self.o = weight(rngs, (H, E, D), AXES["o"], residual(2, cfg.num_layers), t)
        if cfg.qkv_bias:
            self.q_bias = weight(rngs, (H, E), ("heads", "head_dim"), zeros, t)
            self.k_bias = weight(rngs, (G, E), ("kv_heads", "head_dim"), zeros, t)
            self.v_bias = weight(rngs, (G, E), ("kv_heads", "head_dim"), zeros, t)
        if cfg.qk_norm:
            self.q_norm = weight(rngs, (E,), ("norm",), same, t)
            self.k_norm = weight(rngs, (E,), ("norm",), same, t)
        self.mlp_norm = weight(rngs, (D,), ("norm",), same, t)
        if cfg.block == "gemma":
            self.attn_out_norm = weight(rngs, (D,), ("norm",), same, t)
            self.mlp_out_norm = weight(rngs, (D,), ("norm",), same, t)
        self.gate = weight(rngs, (D, F), AXES["gate"], fan_in(1), t)
        self.up = weight(rngs, (D, F), AXES["up"], fan_in(1), t)
        self.down = weight(rngs, (F, D), AXES["down"], residual(1, cfg.num_layers), t)

    def __call__(
        self,
        x: jax.Array,
        position_BxT: jax.Array,
        kind: tuple[Rope, dict[str, Any]],
        cache: Params | None,
        adapters: Adapters | None,
        packing: Packing | None,
        int8: bool,
    ) -> tuple[jax.Array, Params | None]:
        """One layer on x BxTxD; `cache` holds keys and values BxSxGxE by position and comes back with these added.

        With `packing` x and the positions are packed; only attention sees the rows. `kind` is of
        :meth:`jmlr_jax.nn.rotary.Kinds.of_layer`.
        """
        cfg, gemma, norm = self.cfg, self.cfg.block == "gemma", norm_of(self.cfg)
        rope, seen = kind
        scale = None if cfg.query_pre_attn_scalar is None else cfg.query_pre_attn_scalar**-0.5
        h = norm(x, self.attn_norm)
        q, k, v = (project(h, getattr(self, name), 1, name, adapters, int8) for name in "qkv")
        if cfg.qkv_bias:
            q, k, v = (y + b[...].astype(y.dtype) for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if cfg.qk_norm:
            q, k = norm(q, self.q_norm), norm(k, self.k_norm)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0))
            start_B = position_BxT[:, 0]
            cache = {"k": write(cache["k"], k, start_B), "v": write(cache["v"], v, start_B)}
            k, v = cache["k"], cache["v"]
            heads = attend(q, k, v, position_BxT=position_BxT, scale=scale, **seen)
        else:
            q, k, v = (checkpoint_name(y, QKV) for y in (q, k, v))
            if packing is not None:
                q, k, v = packing.unpack(q), packing.unpack(k), packing.unpack(v)
            heads = attend(q, k, v, causal=True, scale=scale, **seen)
            if packing is not None:
                heads = packing.pack(heads)
        out = project(heads, self.o, 2, "o", adapters, int8)
        x = x + (norm(out, self.attn_out_norm) if gemma else out)
        h = norm(x, self.mlp_norm)
        gate, up = (project(h, getattr(self, name), 1, name, adapters, int8) for name in ("gate", "up"))
        gate, up = checkpoint_name(gate, MLP), checkpoint_name(up, MLP)
        act = partial(jax.nn.gelu, approximate=True) if gemma else jax.nn.silu
        out = project(act(gate) * up, self.down, 1, "down", adapters, int8)
        x = x + (norm(out, self.mlp_out_norm) if gemma else out)
        return constrain(x, *HIDDEN), cache


def norm_of(cfg: LlamaConfig) -> Callable[[jax.Array, nnx.Param[jax.Array]], jax.Array]:
    """The norm of a family: (x, weight) -> normed x."""
    return partial(rms_norm, eps=cfg.rms_norm_eps, from_one=cfg.block == "gemma")


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm and, unless tied to the embedding, the head."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs) -> None:
        if cfg.vocab_size < 1:
            raise ValueError("llama.vocab_size is 0: set it to the tokenizer's size before building the model")
        self.cfg = cfg
        V, D, t = cfg.vocab_size, cfg.hidden_size, cfg.param_dtype
        self.embed = weight(rngs, (V, D), ("vocab", "embed"), embedding, t)
        self.layers = stack(lambda r: LlamaLayer(cfg, r), cfg.num_layers, rngs)
        self.final_norm = weight(rngs, (D,), ("norm",), zeros if cfg.block == "gemma" else ones, t)
        if not cfg.tie_embeddings:
            self.lm_head = weight(rngs, (D, V), AXES["lm_head"], fan_in(1), t)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        length_B: jax.Array,
        start_B: jax.Array,
        cache: Params | None,
        adapters: Adapters | None,
        packing: Packing | None = None,
        int8: bool = False,
    ) -> tuple[jax.Array, Params | None]:
        """Final-normed hidden states BxTxD of tokens at positions ``start + 0 .. start + T - 1``.

        `length_B` counts a row's real tokens from position 0 on. Padding stands after them, so causality alone hides
        it from every real token; its own outputs are set to zero. With `packing` there is no cache, and no work for
        padding outside attention; with `int8` the projections multiply in it.
        """
        cfg = self.cfg
        position_BxT = start_B[:, None] + jnp.arange(tokens_BxT.shape[1])
        real_BxT, length_BxT = position_BxT < length_B[:, None], jnp.broadcast_to(length_B[:, None], position_BxT.shape)
        if packing is not None:
            assert cache is None
            tokens_BxT, position_BxT, length_BxT = map(packing.pack, (tokens_BxT, position_BxT, length_BxT))
            adapters = None if adapters is None else replace(adapters, place=packing.number_GxF())
        kinds = Kinds.of(cfg, position_BxT, length_BxT)
        x = constrain(self.embed[...][tokens_BxT].astype(cfg.dtype), *HIDDEN)
        if cfg.block == "gemma":
            x = x * jnp.asarray(math.sqrt(cfg.hidden_size), x.dtype)  # rounded first: the published model's bfloat16
        inputs = (kinds.narrow_L, cache, None if adapters is None else adapters.per_layer(cfg.num_layers))

        def body(layer: LlamaLayer, x: jax.Array, inputs: tuple) -> tuple[jax.Array, Params | None]:
            narrow, cache, adapter = inputs
            bound = None if adapters is None else adapters.at_layer(adapter)
            return layer(x, position_BxT, kinds.of_layer(narrow), cache, bound, packing, int8)

        x, cache = scan_layers(self.layers, x, inputs, body, cfg.remat)
        x = norm_of(cfg)(x, self.final_norm)
        x = x if packing is None else packing.unpack(x)
        return jnp.where(real_BxT[:, :, None], x, 0), cache

    def logits(self, hidden: jax.Array, adapters: Adapters | None) -> jax.Array:
        """Next-token logits ...xV, float32, at the given hidden states ...xD."""
        hidden = hidden.astype(self.cfg.dtype)
        head = self.embed[...].T if self.cfg.tie_embeddings else self.lm_head[...]
        out = jnp.einsum("...d,dv->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return out if adapters is None else out + adapters.update("lm_head", hidden, 1)
