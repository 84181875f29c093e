"""The one attention function; every model here calls it, so a faster kernel is chosen here and nowhere else.

Letters besides the project's: H query heads, G key/value heads (G divides H), E head width, S key slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row with no visible key gives a uniform average instead of NaN


def attend(
    q_BxTxHxE: jax.Array,
    k_BxSxGxE: jax.Array,
    v_BxSxGxE: jax.Array,
    *,
    position_BxT: jax.Array | None = None,
    key_length_B: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads: query head h reads key/value head ``h // (H / G)``.

    Args:
        q_BxTxHxE, k_BxSxGxE, v_BxSxGxE: in the computing dtype.
        position_BxT: position of each query (a leading 1 broadcasts). Key slot s holds position s, and a query sees
            the slots up to its own position. None: every query sees every key.
        key_length_B: slots from this one on are hidden. None: no such limit.
        window: with `position_BxT`, slots ``s <= position - window`` are hidden (Mistral). None: no such limit.

    Returns:
        Head outputs BxTxHxE in q's dtype. Scores, mask and softmax are float32.
    """
    B, T, H, E = q_BxTxHxE.shape
    S, G = k_BxSxGxE.shape[1:3]
    q = q_BxTxHxE.reshape(B, T, G, H // G, E)
    scores = jnp.einsum("btgre,bsge->bgrts", q, k_BxSxGxE, preferred_element_type=jnp.float32) * E**-0.5
    slot_S = jnp.arange(S)
    visible_BxTxS = jnp.ones((1, 1, S), bool)
    if position_BxT is not None:
        visible_BxTxS &= slot_S <= position_BxT[:, :, None]
        if window is not None:
            visible_BxTxS &= slot_S > position_BxT[:, :, None] - window
    if key_length_B is not None:
        visible_BxTxS &= slot_S < key_length_B[:, None, None]
    scores = jnp.where(visible_BxTxS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bgrts,bsge->btgre", weights, v_BxSxGxE).reshape(B, T, H, E)
