"""A start that favours copying, so that a tiny decoder learns to read in minutes rather than hours.

A model trained from nothing first memorises its training answers and only much later finds out that they stand in the
prompt. Here attention starts out as what it would have to become: keys resemble queries (a token looks for its like),
the value-output path is close to the identity (what is looked at is passed on), and the head reads a token's own
embedding. Nothing is frozen and no pre-trained model is touched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmlr_jax.config import LlamaConfig
from jmlr_jax.nn.layers import Params


def favour_copying(params: Params, cfg: LlamaConfig, strength: float, key: jax.Array) -> Params:
    """Decoder weights like those of ``init_llama`` whose attention copies.

    Args:
      params: a fresh tree; not changed.
      cfg: its shape, with as many key-value heads as heads, an untied head, and heads as wide as the model together.
      strength: 0 leaves `params` alone; towards 1 keys become equal to queries.
      key: for the orthogonal value weights.

    Raises:
      ValueError: a shape for which this start is not defined; ``generator.copy_init=0`` does without.
    """
    if strength == 0:
        return params
    layers, D = params["layers"], cfg.hidden_size
    count, _, H, E = layers["q"].shape
    if cfg.num_kv_heads != H or cfg.tie_embeddings or H * E != D:
        raise ValueError(
            "generator.copy_init needs num_kv_heads = num_heads, an untied head and heads as wide as the model; "
            "set generator.copy_init=0 for other shapes"
        )
    v = jnp.stack([jax.nn.initializers.orthogonal()(k, (D, D), jnp.float32) for k in jax.random.split(key, count)])
    v = v.reshape(count, D, H, E)
    embed = jax.random.normal(jax.random.fold_in(key, 0), params["embed"].shape)
    copied = {
        "k": (1 - strength) * layers["k"] + strength * layers["q"],
        "v": v,
        "o": jnp.transpose(v, (0, 2, 3, 1)),
    }
    copied = {name: w.astype(layers[name].dtype) for name, w in copied.items()}
    return params | {
        # Unit-variance embeddings: the residual stream must not drown them before the head has read them.
        "embed": embed.astype(params["embed"].dtype),
        "lm_head": (embed.T / D**0.5).astype(params["lm_head"].dtype),
        "layers": layers | copied,
    }
