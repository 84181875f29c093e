"""Generation from the decoder: one compiled loop with a key/value cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jmlr_jax.config import LlamaConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.layers import Adapters, Params


def generate(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: jax.Array,
    length_B: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    adapters: Adapters | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continue each prompt until its end token, or for `max_new` tokens.

    Shapes, `cfg`, `max_new` and whether the choice is greedy (``temperature == 0``) decide what is compiled; other
    values of `temperature`, `top_p` and `eos_id` reuse it. The loop ends when every row has ended.

    Args:
        prompt_BxT: int, right-padded, each row with at least one token.
        length_B: int, real tokens of each row.
        key: of the random choices; a greedy run does not read it.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: choose among the fewest likeliest tokens that together have this probability.
        adapters: from :func:`jmlr_jax.nn.lora.bind`, without a dropout key.

    Returns:
        ``tokens_BxA`` int32 with A = max_new, filled with `eos_id` behind the end, and ``length_B`` int32, tokens
        generated, the end token included.

    Raises:
        ValueError: `max_new`, `temperature` or `top_p` out of range, or positions beyond cfg.max_positions.
    """
    if max_new < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new={max_new} >= 1, temperature={temperature} >= 0 and 0 < top_p={top_p} <= 1 must hold")
    longest = prompt_BxT.shape[1] + max_new
    if longest > cfg.max_positions and (cfg.rope_scaling is None or cfg.rope_scaling.type != "dynamic"):
        raise ValueError(
            f"prompt of {prompt_BxT.shape[1]} and max_new={max_new} tokens reach position {longest}; "
            f"max_positions={cfg.max_positions}"
        )
    choice = None if temperature == 0 else (jnp.float32(temperature), jnp.float32(top_p))
    return _generate(params, cfg, prompt_BxT, length_B, key, max_new, jnp.int32(eos_id), choice, adapters)


@partial(jax.jit, static_argnames=("cfg", "max_new"))
def _generate(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: jax.Array,
    length_B: jax.Array,
    key: jax.Array,
    max_new: int,
    eos_id: jax.Array,
    choice: tuple[jax.Array, jax.Array] | None,
    adapters: Adapters | None,
) -> tuple[jax.Array, jax.Array]:
    B, T = prompt_BxT.shape
    length_B = length_B.astype(jnp.int32)

    def pick(hidden_BxD: jax.Array, step: jax.Array) -> jax.Array:
        logits_BxV = F.llama_logits(params, cfg, hidden_BxD, adapters=adapters)
        if choice is None:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV = nucleus(logits_BxV / choice[0], choice[1])
        return jax.random.categorical(jax.random.fold_in(key, step), logits_BxV, axis=-1).astype(jnp.int32)

    cache = F.init_cache(cfg, B, T + max_new)
    start_B = jnp.zeros_like(length_B)
    hidden, cache = F.llama_cached(params, cfg, prompt_BxT, start_B, length_B, cache, adapters=adapters)
    last_BxD = jnp.take_along_axis(hidden, (length_B - 1)[:, None, None], axis=1)[:, 0]
    token_B = pick(last_BxD, jnp.int32(0))
    tokens_BxA = jnp.full((B, max_new), eos_id).at[:, 0].set(token_B)
    state = (jnp.int32(1), token_B, token_B == eos_id, tokens_BxA, jnp.ones_like(length_B), cache)

    def more(state: Any) -> jax.Array:
        step, _, ended_B, *_ = state
        return (step < max_new) & ~ended_B.all()

    def advance(state: Any) -> Any:
        step, token_B, ended_B, tokens_BxA, made_B, cache = state
        at_B = length_B + step - 1  # position of the token chosen last
        hidden, cache = F.llama_cached(params, cfg, token_B[:, None], at_B, at_B + 1, cache, adapters=adapters)
        token_B = jnp.where(ended_B, eos_id, pick(hidden[:, 0], step))
        tokens_BxA = tokens_BxA.at[:, step].set(token_B)
        made_B = made_B + ~ended_B
        return step + 1, token_B, ended_B | (token_B == eos_id), tokens_BxA, made_B, cache

    *_, tokens_BxA, made_B, _ = jax.lax.while_loop(more, advance, state)
    return tokens_BxA, made_B


def nucleus(logits_BxV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits with all but the likeliest tokens, those that just reach probability `top_p` together, at -inf.

    >>> import numpy as np
    >>> kept = nucleus(jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1]])), 0.7)
    >>> np.isfinite(kept).tolist()
    [[True, False, True, False]]
    """
    order_BxV = jnp.argsort(-logits_BxV, axis=-1)
    p_BxV = jax.nn.softmax(jnp.take_along_axis(logits_BxV, order_BxV, axis=-1), axis=-1)
    before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV  # probability of the likelier ones; 0 for the first
    rank_BxV = jnp.argsort(order_BxV, axis=-1)
    return jnp.where(jnp.take_along_axis(before_BxV < top_p, rank_BxV, axis=-1), logits_BxV, -jnp.inf)
