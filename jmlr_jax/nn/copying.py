"""A start that favours copying, so that a tiny decoder learns to read in minutes rather than hours.

A model trained from scratch first memorises its training answers and only much later finds out that they stand in the
prompt. Here attention starts out as what it would have to become: keys resemble queries (a token looks for its like),
the value-output path is the identity up to scale (what is looked at is passed on), and the head is the embedding.
Nothing is frozen and no pre-trained model is touched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.errors import JmlrError
from jmlr_jax.nn.layers import Params

# Standard deviation of the residual stream at the start. The embedding is also the head: smaller values make copying a
# change of the stream that the first updates wipe out, larger ones make the first logits too sharp to learn from.
STREAM = 0.35


class CopyingError(JmlrError, ValueError):
    """A shape that cannot start as a copier."""


def favour_copying(params: Params, cfg: LlamaConfig, strength: float, key: jax.Array) -> Params:
    """Decoder weights like those of ``init_llama`` whose attention copies.

    Args:
      params: a fresh tree; not changed.
      cfg: its shape: as many key-value heads as heads, together as wide as the model, the head tied to the embedding,
        layers of block llama.
      strength: 0 leaves `params` alone; towards 1 keys become equal to queries.
      key: for the orthogonal value weights and the embedding.

    Raises:
      CopyingError: a shape for which this start is not defined; ``generator.copy_init=0`` does without.
    """
    if strength == 0:
        return params
    layers, D = params["layers"], cfg.hidden_size
    count, _, H, E = layers["q"].shape
    if cfg.num_kv_heads != H or not cfg.tie_embeddings or H * E != D or cfg.block != "llama":
        raise CopyingError(
            f"generator.copy_init={strength} needs generator.llama.num_kv_heads = num_heads, heads as wide as the "
            f"model together, tie_embeddings and block llama (here num_kv_heads={cfg.num_kv_heads}, num_heads={H}, "
            f"head_dim={E}, hidden_size={D}, tie_embeddings={cfg.tie_embeddings}, block={cfg.block}); set "
            "generator.copy_init=0 for such a shape"
        )
    embed_key, *keys = jax.random.split(key, count + 1)
    turn = jax.nn.initializers.orthogonal()
    v = jnp.stack([turn(k, (D, D), jnp.float32) for k in keys]).reshape(count, D, H, E)
    copied = {
        "k": (1 - strength) * layers["k"] + strength * layers["q"],
        "v": v,
        "o": STREAM * jnp.transpose(v, (0, 2, 3, 1)),
        "down": STREAM * layers["down"],
    }
    embed = STREAM * jax.random.normal(embed_key, params["embed"].shape)
    copied = {name: w.astype(layers[name].dtype) for name, w in copied.items()}
    return params | {"embed": embed.astype(params["embed"].dtype), "layers": layers | copied}
