"""The BERT encoder: post-norm layers, learned positions and token types, no pooler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jmlr_jax.config_models import BertConfig
from jmlr_jax.nn.attention import attend
from jmlr_jax.nn.layers import (
    MLP,
    QKV,
    faint,
    fan_in,
    layer_norm,
    ones,
    project,
    scan_layers,
    stack,
    weight,
    words,
    zeros,
)
from jmlr_jax.parallel.sharding import constrain

HIDDEN = ("encoder_batch", "length", "hidden")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


# A fresh encoder starts near a matcher of words: what a layer adds, and where a token stands, change its vector little.
# Larger starts bury the only thing a retriever from scratch has to go by.
QUIET = 0.2


class BertLayer(nnx.Module):
    """Attention and a two-layer network, each added to its input and then normed."""

    def __init__(self, cfg: BertConfig, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        D, F, H, t = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.param_dtype
        E = D // H
        inward = ("embed", "encoder_heads", "head_dim")
        for name in "qkv":
            setattr(self, name, weight(rngs, (D, H, E), inward, fan_in(1), t))
            setattr(self, f"{name}_bias", weight(rngs, (H, E), inward[1:], zeros, t))
        self.o = weight(rngs, (H, E, D), ("encoder_heads", "head_dim", "embed"), fan_in(2, QUIET), t)
        self.o_bias = weight(rngs, (D,), ("norm",), zeros, t)
        self.attn_norm = weight(rngs, (D,), ("norm",), ones, t)
        self.attn_norm_bias = weight(rngs, (D,), ("norm",), zeros, t)
        self.up = weight(rngs, (D, F), ("embed", "encoder_mlp"), fan_in(1), t)
        self.up_bias = weight(rngs, (F,), ("encoder_mlp",), zeros, t)
        self.down = weight(rngs, (F, D), ("encoder_mlp", "embed"), fan_in(1, QUIET), t)
        self.down_bias = weight(rngs, (D,), ("norm",), zeros, t)
        self.mlp_norm = weight(rngs, (D,), ("norm",), ones, t)
        self.mlp_norm_bias = weight(rngs, (D,), ("norm",), zeros, t)

    def __call__(self, x: jax.Array, key_length_B: jax.Array) -> jax.Array:
        """One layer on x BxTxD; tokens from `key_length_B` on are attended to by none."""
        cfg = self.cfg
        q, k, v = (project(x, getattr(self, n)) + getattr(self, f"{n}_bias")[...].astype(x.dtype) for n in "qkv")
        q, k, v = (checkpoint_name(y, QKV) for y in (q, k, v))
        heads = attend(q, k, v, key_length_B=key_length_B)
        h = project(heads, self.o, 2) + self.o_bias[...].astype(x.dtype)
        x = layer_norm(x + h, self.attn_norm, self.attn_norm_bias, cfg.layer_norm_eps)
        h = checkpoint_name(project(x, self.up) + self.up_bias[...].astype(x.dtype), MLP)
        h = ACTIVATIONS[cfg.hidden_act](h)
        h = project(h, self.down) + self.down_bias[...].astype(x.dtype)
        return constrain(layer_norm(x + h, self.mlp_norm, self.mlp_norm_bias, cfg.layer_norm_eps), *HIDDEN)


class Bert(nnx.Module):
    """Embeddings and stacked layers. Every token has type 0; the type table is whole for exchange with other code."""

    def __init__(self, cfg: BertConfig, rngs: nnx.Rngs) -> None:
        if cfg.vocab_size < 1:
            raise ValueError("bert.vocab_size is 0: set it to the tokenizer's size before building the model")
        self.cfg = cfg
        D, t = cfg.hidden_size, cfg.param_dtype
        self.word = weight(rngs, (cfg.vocab_size, D), ("encoder_vocab", "embed"), words, t)
        self.position = weight(rngs, (cfg.max_positions, D), ("positions", "embed"), faint, t)
        self.token_type = weight(rngs, (cfg.type_vocab_size, D), ("token_types", "embed"), faint, t)
        self.embed_norm = weight(rngs, (D,), ("norm",), ones, t)
        self.embed_norm_bias = weight(rngs, (D,), ("norm",), zeros, t)
        self.layers = stack(lambda r: BertLayer(cfg, r), cfg.num_layers, rngs)

    def __call__(self, ids_BxT: jax.Array, key_length_B: jax.Array) -> jax.Array:
        """Hidden states BxTxD in cfg.dtype, with attention to the first `key_length_B` tokens of each row.

        Raises:
            ValueError: T exceeds the position table.
        """
        cfg, T = self.cfg, ids_BxT.shape[1]
        if T > cfg.max_positions:
            raise ValueError(f"{T} tokens a row exceed bert.max_positions={cfg.max_positions}")
        x = self.word[...][ids_BxT] + self.position[...][:T] + self.token_type[...][0]
        x = layer_norm(x.astype(cfg.dtype), self.embed_norm, self.embed_norm_bias, cfg.layer_norm_eps)

        def body(layer: BertLayer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x, key_length_B), None

        return scan_layers(self.layers, constrain(x, *HIDDEN), None, body, cfg.remat)[0]
