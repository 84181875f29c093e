"""Layers of both kinds in one stack: what each sees, with a cache, packed, on every remat; the pattern with a rest.

That they compute what transformers computes is tested with the models (``test_hf_parity.py``, ``test_modernbert.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.config_models import AttentionConfig, BertConfig, LlamaConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.attention import attend, splash
from jmlr_jax.nn.generate import generate
from jmlr_jax.run.work import decoder_attention, encoder_forward, visible_pairs

V, T, WINDOW = 41, 14, 4
LENGTHS = np.array([14, 9, 1])
KINDS = {"sliding_window": WINDOW, "layer_kinds": ("window", "full"), "window_rope_theta": 100.0, "rope_theta": 5000.0}
DECODER = LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, block="gemma",
    qk_norm=True, head_dim=8, **KINDS,
)  # fmt: skip
ENCODER = BertConfig(
    block="modernbert", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, **KINDS
)
IDS = np.random.default_rng(0).integers(0, V, (3, T))


def weights(cfg: LlamaConfig | BertConfig) -> Any:
    """Every weight random, so that no norm is plain and layers differ."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), F.abstract_params(cfg))


@pytest.mark.parametrize(
    ("kinds", "count", "wanted"),
    [
        ((), 3, (4, 4, 4)),
        (("window", "window", "full"), 5, (4, 4, None, 4, 4)),
        (("full", "window"), 3, (None, 4, None)),
        (("full",), 2, (None, None)),
    ],
)
def test_the_pattern_is_repeated_with_a_remainder(kinds: tuple, count: int, wanted: tuple) -> None:
    assert LlamaConfig(sliding_window=4, layer_kinds=kinds, num_layers=count).windows == wanted


def test_kinds_without_a_window_are_refused() -> None:
    for more in ({"layer_kinds": ("window",)}, {"window_rope_theta": 1.0}):
        with pytest.raises(ValueError, match="set sliding_window"):
            LlamaConfig(**more)
    for name in AttentionConfig.model_fields:
        value = {"layer_kinds": ("full",), "rope_scaling": {"type": "linear", "factor": 2.0}}.get(name, 7)
        with pytest.raises(ValueError, match="of block=modernbert"):
            BertConfig(**({"sliding_window": 3} | {name: value}))


def seen_by(cfg: LlamaConfig | BertConfig, at: int) -> list[bool]:
    """Of which tokens of a row of distinct ones an output depends, by its gradient in the embedding."""
    params, ids = weights(cfg), jnp.arange(T)[None]
    name = "embed" if isinstance(cfg, LlamaConfig) else "word"

    def output(table: jax.Array) -> jax.Array:
        whole = params | {name: table}
        if isinstance(cfg, LlamaConfig):
            return F.llama_hidden(whole, cfg, ids, jnp.array([T]))[0, at].sum()
        return (F.bert_hidden(whole, cfg, ids, jnp.array([T]))[0, at] ** 3).sum()

    return (np.abs(jax.jit(jax.grad(output))(params[name])[:T]).max(-1) > 1e-9).tolist()


@pytest.mark.parametrize("layers", [("window",), ("full",), ("window", "full")])
def test_a_position_depends_on_exactly_the_tokens_it_may_see(layers: tuple) -> None:
    """In a stack of both kinds the first layer is windowed and the second sees all, so all are seen through it."""
    at = 8
    decoder = DECODER.model_copy(update={"num_layers": len(layers), "layer_kinds": layers})
    first = at - WINDOW + 1 if layers == ("window",) else 0
    assert seen_by(decoder, at) == [first <= t <= at for t in range(T)]
    encoder = ENCODER.model_copy(update={"num_layers": len(layers), "layer_kinds": layers})
    near = WINDOW if layers == ("window",) else T
    assert seen_by(encoder, at) == [abs(t - at) <= near for t in range(T)]


def test_which_layer_has_the_window_matters() -> None:
    """Two layers, the window in one or the other, rotation included: different results, each its own layer's."""
    params, length = weights(DECODER.model_copy(update={"num_layers": 2})), jnp.asarray(LENGTHS)
    found = [
        F.llama_hidden(params, DECODER.model_copy(update={"num_layers": 2, "layer_kinds": kinds}), IDS, length)
        for kinds in (("window", "full"), ("full", "window"), ("window",), ("full",))
    ]
    for i in range(4):
        for j in range(i):
            assert np.abs(found[i] - found[j]).max() > 1e-2, (i, j)


def test_one_kind_said_as_a_pattern_is_the_same_program() -> None:
    """All layers windowed, once by default and once by name: bit for bit."""
    cfg = DECODER.model_copy(update={"layer_kinds": ()})
    params, length = weights(cfg), jnp.asarray(LENGTHS)
    named = cfg.model_copy(update={"layer_kinds": ("window", "window")})
    np.testing.assert_array_equal(F.llama_hidden(params, cfg, IDS, length), F.llama_hidden(params, named, IDS, length))


def test_generation_with_a_cache_equals_recomputation() -> None:
    params = weights(DECODER)
    tokens, _ = generate(params, DECODER, jnp.asarray(IDS), jnp.asarray(LENGTHS), max_new=6, eos_id=V)

    @jax.jit
    def next_of(row_T: jax.Array, length: jax.Array) -> jax.Array:
        hidden = F.llama_hidden(params, DECODER, row_T[None], length[None])
        return jnp.argmax(F.llama_logits(params, DECODER, hidden[0, length - 1]))

    for row, n in enumerate(LENGTHS):
        ids = np.zeros(T + 6, int)
        ids[:n] = IDS[row, :n]
        for step in range(6):
            ids[n + step] = next_of(jnp.asarray(ids), jnp.int32(n + step))
        assert tokens[row].tolist() == ids[n : n + 6].tolist()


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("attention", "dots"))]
)
def test_gradients_do_not_depend_on_remat_or_packing(remat: str) -> None:
    params, length = weights(DECODER), jnp.asarray(LENGTHS)

    @partial(jax.jit, static_argnums=(1, 2))
    def gradient(params: Any, cfg: LlamaConfig, places: int | None) -> Any:
        return jax.grad(lambda p: (F.llama_hidden(p, cfg, IDS, length, places=places) ** 2).sum())(params)

    plain = gradient(params, DECODER, None)
    kept = gradient(params, DECODER.model_copy(update={"remat": remat}), int(LENGTHS.sum()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(b).max())), kept, plain
    )


@pytest.mark.parametrize("narrow", [True, False])
def test_the_flag_chooses_as_a_fixed_window_does(narrow: bool) -> None:
    """Causal, from a cache, and both ways; with a scale that is not the head width's."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    window = 3 if narrow else None
    for more in ({"causal": True}, {"position_BxT": jnp.arange(T)[None]}, {"key_length_B": jnp.array([T, 5])}):
        flagged = jax.jit(lambda flag, more=more: attend(q, k, v, window=3, narrow=flag, scale=0.2, **more))
        fixed = attend(q, k, v, window=window, scale=0.2, **more)
        np.testing.assert_allclose(flagged(narrow), fixed, atol=1e-6)


def test_the_kernel_takes_a_scale() -> None:
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, heads, 128)), jnp.float32) for heads in (2, 1, 1))
    ours = splash(q, k, v, 50, scale=0.05, interpret=True)
    np.testing.assert_allclose(ours, attend(q, k, v, causal=True, window=50, scale=0.05), atol=2e-5)
    assert np.abs(ours - attend(q, k, v, causal=True, window=50)).max() > 1e-2


def test_work_counts_each_layer_by_its_window() -> None:
    pairs = 2 * visible_pairs(100, WINDOW) + visible_pairs(100)
    assert decoder_attention(DECODER, 100) == 4 * DECODER.num_heads * DECODER.head_width * pairs
    full = encoder_forward(ENCODER.model_copy(update={"layer_kinds": ("full",)}), 8, 100)
    near = 100 + 2 * sum(100 - apart for apart in range(1, WINDOW + 1))
    assert full - encoder_forward(ENCODER, 8, 100) == 4 * 16 * 2 * (100**2 - near)
