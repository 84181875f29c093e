"""The compiled programs of an answer, and the few shapes they are compiled for.

Letters: B rows read at once, K passages of L tokens, S tokens of a question, O options of A tokens, T tokens of a
prompt. A row is one prompt, with all that is to be scored after it; rows of different questions share a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.evaluation.reading import after_prefix, prompt_prefix
from jmlr_jax.method.prompt import read_prompt
from jmlr_jax.nn.functional import llama_cached, llama_logits
from jmlr_jax.nn.layers import Adapters, Params

ROWS = (1, 4, 8)
SHORTEST = 32  # tokens of a prompt below which a shape of its own saves nothing


def prompt_widths(full: int) -> tuple[int, ...]:
    """T of the compiled shapes: the longest prompt, its half and its quarter.

    >>> prompt_widths(1000), prompt_widths(121), prompt_widths(40)
    ((250, 500, 1000), (61, 121), (40,))
    """
    return tuple(sorted({full, *(w for part in (2, 4) if (w := -(-full // part)) >= SHORTEST)}))


def smallest(sizes: Sequence[int], least: int) -> int:
    """The smallest of some sizes that is no smaller than `least`; the largest where none is.

    >>> [smallest((1, 4, 8), n) for n in (1, 3, 8, 9)]
    [1, 4, 8, 8]
    """
    return next((size for size in sizes if size >= least), sizes[-1])


@partial(jax.jit, static_argnames=("cfg", "ids", "width"))
def read_rows(
    params: Params,
    adapters: Adapters | None,
    batch: dict[str, Array],
    count: Array,
    *,
    cfg: LlamaConfig,
    ids: GeneratorIds,
    width: int,
) -> tuple[dict[str, Array], Params]:
    """Reads prompts, scores what may follow each, and chooses the first token of an answer.

    Args:
      batch: int32 ``reader_ids_BxKxL reader_len_BxK`` (best first; length 0 is left out), ``question_ids_BxS
        question_len_B option_ids_BxOxA option_len_BxO``.
      count: how many of the O options any row has; the others cost nothing.
      width: T, tokens of a prompt at most.

    Returns:
      ``nll_BxO`` (nats per token), ``token_B`` (the likeliest first token) with its log-probability ``logp_B``,
      ``length_B`` and ``dropped_B`` of the prompts; and the cache, from which :func:`next_tokens` goes on.
    """
    prompt_BxT, length_B, dropped_B = read_prompt(batch, total=width, bos_id=ids.begin, pad_id=ids.pad)
    option_ids_BxOxA, option_len_BxO = batch["option_ids_BxOxA"], batch["option_len_BxO"]
    prefix = prompt_prefix(params, cfg, prompt_BxT, length_B, option_ids_BxOxA.shape[-1], adapters)

    def score(o: Array, nll_BxO: Array) -> Array:
        nll_B = after_prefix(params, cfg, prefix, option_ids_BxOxA[:, o], option_len_BxO[:, o], adapters)
        return nll_BxO.at[:, o].set(nll_B)

    nll_BxO = jax.lax.fori_loop(0, count, score, jnp.zeros(option_len_BxO.shape, jnp.float32))
    token_B, logp_B = _likeliest(llama_logits(params, cfg, prefix.last_Bx1xD[:, 0], adapters=adapters))
    found = {"nll": nll_BxO, "token": token_B, "logp": logp_B, "length": length_B, "dropped": dropped_B}
    return found, prefix.cache


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache",))
def next_tokens(
    params: Params, adapters: Adapters | None, cache: Params, token_B: Array, at_B: Array, *, cfg: LlamaConfig
) -> tuple[Array, Array, Params]:
    """One more token of each row: `token_B` stands at position `at_B`; the likeliest after it, its log-probability,
    and the cache."""
    hidden, cache = llama_cached(params, cfg, token_B[:, None], at_B, at_B + 1, cache, adapters=adapters)
    token_B, logp_B = _likeliest(llama_logits(params, cfg, hidden[:, 0], adapters=adapters))
    return token_B, logp_B, cache


def _likeliest(logits_BxV: Array) -> tuple[Array, Array]:
    token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return token_B, jnp.max(logits_BxV, axis=-1) - jax.nn.logsumexp(logits_BxV, axis=-1)
