"""The late-interaction encoder (ColBERT, arXiv 2004.12832): an encoder, a linear map, unit-length vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jmlr_jax.config_models import BertConfig, RetrieverConfig
from jmlr_jax.nn.bert import Bert
from jmlr_jax.nn.layers import fan_in, project, weight, zeros
from jmlr_jax.nn.modernbert import ModernBert


def trunk(cfg: BertConfig, rngs: nnx.Rngs) -> Bert | ModernBert:
    """The encoder that a configuration describes."""
    return ModernBert(cfg, rngs) if cfg.block == "modernbert" else Bert(cfg, rngs)


class Colbert(nnx.Module):
    """Encoder of queries and passages into token vectors (method.md, step 1)."""

    def __init__(self, cfg: RetrieverConfig, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.bert = trunk(cfg.bert, rngs)
        D = cfg.bert.hidden_size
        self.projection = weight(rngs, (D, cfg.dim), ("embed", "token_vector"), fan_in(1), cfg.bert.param_dtype)
        if cfg.importance:
            self.importance = weight(rngs, (cfg.dim,), ("token_vector",), zeros, "float32")

    def vectors(self, ids: jax.Array, key_length: jax.Array) -> jax.Array:
        """Unit vectors ...xC of every token, float32."""
        x = project(self.bert(ids, key_length), self.projection).astype(jnp.float32)
        # The floor under the squared norm keeps value and gradient finite for a zero vector.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))

    def queries(self, ids_BxQ: jax.Array, length_B: jax.Array) -> jax.Array:
        """See :func:`jmlr_jax.nn.functional.encode_queries`."""
        Q, all_B = ids_BxQ.shape[1], jnp.full_like(length_B, ids_BxQ.shape[1])
        attended_B = all_B if self.cfg.augment_queries and self.cfg.attend_to_mask_tokens else length_B
        q_BxQxC = self.vectors(ids_BxQ, attended_B)
        if self.cfg.importance:  # MaxSim is linear in each query vector: its length is the weight of its token
            q_BxQxC *= jnp.exp(q_BxQxC @ self.importance[...])[..., None]
        real_BxQ = jnp.arange(Q) < (all_B if self.cfg.augment_queries else length_B)[:, None]
        return jnp.where(real_BxQ[:, :, None], q_BxQxC, 0)

    def passages(self, ids_NxP: jax.Array, length_N: jax.Array, skip_V: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See :func:`jmlr_jax.nn.functional.encode_passages`."""
        keep_NxP = (jnp.arange(ids_NxP.shape[1]) < length_N[:, None]) & ~skip_V[ids_NxP]
        return jnp.where(keep_NxP[:, :, None], self.vectors(ids_NxP, length_N), 0), keep_NxP
