"""ModernBERT (arXiv 2412.13663): norms before attention and a gated network, rotary positions, windows by layer.

Beside :mod:`jmlr_jax.nn.bert`, with which it shares projections, attention and the layer scan and nothing of a layer's
own order: no biases, no tables of positions and types, no norm before the first layer's attention, one after the last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jmlr_jax.config_models import BertConfig
from jmlr_jax.nn.attention import attend
from jmlr_jax.nn.bert import ACTIVATIONS, HIDDEN, QUIET
from jmlr_jax.nn.layers import MLP, QKV, fan_in, layer_norm, ones, project, scan_layers, stack, weight, words
from jmlr_jax.nn.rotary import Kinds, Rope, apply_rope
from jmlr_jax.parallel.sharding import constrain


class ModernBertLayer(nnx.Module):
    """Attention and a gated network, each on a normed input and added to the residual stream."""

    def __init__(self, cfg: BertConfig, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        D, F, H, E, t = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.head_width, cfg.param_dtype
        self.qkv = weight(rngs, (D, 3, H, E), ("embed", "parts", "encoder_heads", "head_dim"), fan_in(1), t)
        self.o = weight(rngs, (H, E, D), ("encoder_heads", "head_dim", "embed"), fan_in(2, QUIET), t)
        self.mlp_norm = weight(rngs, (D,), ("norm",), ones, t)
        self.up = weight(rngs, (D, 2, F), ("embed", "parts", "encoder_mlp"), fan_in(1), t)
        self.down = weight(rngs, (F, D), ("encoder_mlp", "embed"), fan_in(1, QUIET), t)

    def __call__(
        self, x: jax.Array, h: jax.Array, kind: tuple[Rope, dict[str, Any]], key_length_B: jax.Array
    ) -> jax.Array:
        """One layer on x BxTxD, `h` being what attention reads of it; `kind` of ``Kinds.of_layer``."""
        cfg, (rope, seen) = self.cfg, kind
        qkv = checkpoint_name(project(h, self.qkv), QKV)
        q, k, v = (qkv[:, :, part] for part in range(3))
        heads = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, key_length_B=key_length_B, **seen)
        x = x + project(heads, self.o, 2)
        h = project(layer_norm(x, self.mlp_norm, None, cfg.layer_norm_eps), self.up)
        h = checkpoint_name(h, MLP)
        h = ACTIVATIONS[cfg.hidden_act](h[:, :, 0]) * h[:, :, 1]
        return constrain(x + project(h, self.down), *HIDDEN)


class ModernBert(nnx.Module):
    """Embedding, stacked layers, and a norm after the last."""

    def __init__(self, cfg: BertConfig, rngs: nnx.Rngs) -> None:
        if cfg.vocab_size < 1:
            raise ValueError("bert.vocab_size is 0: set it to the tokenizer's size before building the model")
        self.cfg = cfg
        D, L, t = cfg.hidden_size, cfg.num_layers, cfg.param_dtype
        self.word = weight(rngs, (cfg.vocab_size, D), ("encoder_vocab", "embed"), words, t)
        self.embed_norm = weight(rngs, (D,), ("norm",), ones, t)
        if L > 1:  # the first layer's attention reads what embed_norm made
            self.attn_norm = weight(rngs, (L - 1, D), ("layers", "norm"), ones, t)
        self.layers = stack(lambda r: ModernBertLayer(cfg, r), L, rngs)
        self.final_norm = weight(rngs, (D,), ("norm",), ones, t)

    def __call__(self, ids_BxT: jax.Array, key_length_B: jax.Array) -> jax.Array:
        """Hidden states BxTxD in cfg.dtype, with attention to the first `key_length_B` tokens of each row.

        Raises:
            ValueError: T exceeds the positions that the model was made for.
        """
        cfg, T = self.cfg, ids_BxT.shape[1]
        if T > cfg.max_positions:
            raise ValueError(f"{T} tokens a row exceed bert.max_positions={cfg.max_positions}")
        x = self.word[...][ids_BxT].astype(cfg.dtype)
        x = constrain(layer_norm(x, self.embed_norm, None, cfg.layer_norm_eps), *HIDDEN)
        kinds = Kinds.of(cfg, jnp.arange(T)[None], jnp.full((1, T), T))
        first_L = jnp.arange(cfg.num_layers) == 0
        scale_LxD = jnp.ones((1, cfg.hidden_size), cfg.param_dtype)
        if cfg.num_layers > 1:
            scale_LxD = jnp.concatenate([scale_LxD, self.attn_norm[...]])

        def body(layer: ModernBertLayer, x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            first, scale_D, narrow = inputs
            h = jnp.where(first, x, layer_norm(x, scale_D, None, cfg.layer_norm_eps))
            return layer(x, h, kinds.of_layer(narrow), key_length_B), None

        x, _ = scan_layers(self.layers, x, (first_L, scale_LxD, kinds.narrow_L), body, cfg.remat)
        return layer_norm(x, self.final_norm, None, cfg.layer_norm_eps)
