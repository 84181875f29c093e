"""Generation from the decoder: one compiled loop with a key/value cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.layers import Adapters, Params


def generate(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: jax.Array,
    length_B: jax.Array,
    *,
    max_new: int,
    eos_id: int,
    stops: tuple[int, ...] = (),
    adapters: Adapters | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continue each prompt with the likeliest tokens until its end token, or for `max_new` of them.

    Shapes, `cfg` and `max_new` decide what is compiled. The loop ends when every row has ended.

    Args:
        prompt_BxT: int, right-padded, each row with at least one token.
        length_B: int, real tokens of each row.
        eos_id, stops: what ends a row: the end token, and others that do too.
        adapters: from :func:`jmlr_jax.nn.lora.bind`, without a dropout key.

    Returns:
        ``tokens_BxA`` int32 with A = max_new, filled with `eos_id` behind the end, and ``length_B`` int32, tokens
        generated, the end token included.

    Raises:
        ValueError: `max_new` below 1, or positions beyond cfg.max_positions.
    """
    if max_new < 1:
        raise ValueError(f"max_new={max_new}: generate at least one token")
    longest = prompt_BxT.shape[1] + max_new
    if longest > cfg.max_positions and (cfg.rope_scaling is None or cfg.rope_scaling.type != "dynamic"):
        raise ValueError(
            f"prompt of {prompt_BxT.shape[1]} and max_new={max_new} tokens reach position {longest}; "
            f"max_positions={cfg.max_positions}"
        )
    ends = jnp.asarray((eos_id, *stops), jnp.int32)
    return _generate(params, cfg, prompt_BxT, length_B, max_new, ends, adapters)


@partial(jax.jit, static_argnames=("cfg", "max_new"))
def _generate(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: jax.Array,
    length_B: jax.Array,
    max_new: int,
    end_E: jax.Array,
    adapters: Adapters | None,
) -> tuple[jax.Array, jax.Array]:
    B, T = prompt_BxT.shape
    length_B = length_B.astype(jnp.int32)

    def likeliest(hidden_BxD: jax.Array) -> jax.Array:
        return jnp.argmax(F.llama_logits(params, cfg, hidden_BxD, adapters=adapters), axis=-1).astype(jnp.int32)

    def ends(token_B: jax.Array) -> jax.Array:
        return jnp.any(token_B[:, None] == end_E, axis=1)

    eos_id = end_E[0]
    cache = F.init_cache(cfg, B, T + max_new)
    start_B = jnp.zeros_like(length_B)
    hidden, cache = F.llama_cached(params, cfg, prompt_BxT, start_B, length_B, cache, adapters=adapters)
    last_BxD = jnp.take_along_axis(hidden, (length_B - 1)[:, None, None], axis=1)[:, 0]
    token_B = likeliest(last_BxD)
    tokens_BxA = jnp.full((B, max_new), eos_id).at[:, 0].set(token_B)
    state = (jnp.int32(1), token_B, ends(token_B), tokens_BxA, jnp.ones_like(length_B), cache)

    def more(state: Any) -> jax.Array:
        step, _, ended_B, *_ = state
        return (step < max_new) & ~ended_B.all()

    def advance(state: Any) -> Any:
        step, token_B, ended_B, tokens_BxA, made_B, cache = state
        at_B = length_B + step - 1  # position of the token chosen last
        hidden, cache = F.llama_cached(params, cfg, token_B[:, None], at_B, at_B + 1, cache, adapters=adapters)
        token_B = jnp.where(ended_B, eos_id, likeliest(hidden[:, 0]))
        tokens_BxA = tokens_BxA.at[:, step].set(token_B)
        made_B = made_B + ~ended_B
        return step + 1, token_B, ended_B | ends(token_B), tokens_BxA, made_B, cache

    *_, tokens_BxA, made_B, _ = jax.lax.while_loop(more, advance, state)
    return tokens_BxA, made_B
