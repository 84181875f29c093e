"""The decoder against transformers (logits, gradients), and what must hold of it alone."""

from __future__ import annotations

import hf_map
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.nn import functional as F

llama_hidden = jax.jit(F.llama_hidden, static_argnums=1)
llama_logits = jax.jit(F.llama_logits, static_argnums=1)
llama_cached = jax.jit(F.llama_cached, static_argnums=1)

V, T = hf_models.VOCAB, 24
LENGTHS = np.array([24, 17, 1])
SHAPE = hf_models.SHAPE | {"attn_implementation": "eager"}
# Of transformers' SHAPE; one for all tests that need no other, so that what is compiled is shared.
SMALL = LlamaConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
    tie_embeddings=True,
)


def rope(kind: str, **more: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama tied, heads not grouped, wide heads": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16},
    ),
    "linear": (transformers.LlamaConfig, rope("linear", factor=4.0)),
    "dynamic": (transformers.LlamaConfig, rope("dynamic", factor=2.0) | {"max_position_embeddings": 12}),
    "dynamic, short": (transformers.LlamaConfig, rope("dynamic", factor=2.0)),
    "llama3": (
        transformers.LlamaConfig,
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
        | {"head_dim": 16},
    ),
    "yarn": (
        transformers.LlamaConfig,
        rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0) | {"head_dim": 16},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
}


def pair(name: str) -> tuple[torch.nn.Module, LlamaConfig, dict]:
    """A small transformers model with every weight random, and ours with the same weights."""
    make, changes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(**(SHAPE | changes)), attn_implementation="eager").eval()
    for p in model.parameters():  # norms and biases start at 1 and 0, which would hide a mistake in them
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    cfg = hf_map.llama_config(model.config)
    return model, cfg, hf_map.llama_params(model, cfg)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (len(LENGTHS), T))


def logits(params: dict, cfg: LlamaConfig, tokens_BxT: np.ndarray, length_B: np.ndarray) -> jax.Array:
    return llama_logits(params, cfg, llama_hidden(params, cfg, tokens_BxT, length_B))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str) -> None:
    model, cfg, params = pair(name)
    ours = logits(params, cfg, tokens(), LENGTHS)
    assert ours.dtype == jnp.float32
    # Row by row, short ones first: transformers' dynamic scaling looks at the longest sequence it has seen so far.
    for row, n in sorted(enumerate(LENGTHS), key=lambda item: item[1]):
        with torch.no_grad():
            theirs = model(torch.tensor(tokens()[row : row + 1, :n])).logits[0].numpy()
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours[row, :n], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_equal_transformers(remat: str) -> None:
    model, cfg, params = pair("llama")
    cfg = cfg.model_copy(update={"remat": remat})
    ids = tokens()

    def loss(params: dict) -> jax.Array:
        logp = jax.nn.log_softmax(logits(params, cfg, ids, np.full(3, T))[:, :-1])
        return -jnp.take_along_axis(logp, jnp.asarray(ids)[:, 1:, None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    theirs = model(torch.tensor(ids), labels=torch.tensor(ids)).loss
    theirs.backward()
    for p in model.parameters():
        p.data = p.grad
    wanted = hf_map.llama_params(model, cfg)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), grads, wanted)


@pytest.mark.parametrize("window", [None, 4])
def test_a_position_depends_on_exactly_the_tokens_it_may_see(window: int | None) -> None:
    """Gradient of one output with respect to the embedding of each input token (all tokens distinct)."""
    cfg = SMALL.model_copy(update={"num_layers": 1})
    params = F.init_llama(cfg, jax.random.key(0))
    cfg = cfg.model_copy(update={"sliding_window": window})
    ids, at = jnp.arange(12)[None], 7

    def output(embed: jax.Array) -> jax.Array:
        return llama_hidden(params | {"embed": embed}, cfg, ids, jnp.array([12]))[0, at].sum()

    seen = np.abs(jax.jit(jax.grad(output))(params["embed"])[:12]).max(-1) > 0
    first = 0 if window is None else at - window + 1
    assert seen.tolist() == [first <= t <= at for t in range(12)]


def test_padding_changes_nothing_and_comes_out_zero() -> None:
    cfg = SMALL
    params = F.init_llama(cfg, jax.random.key(0))
    ids = tokens()
    other = np.where(np.arange(T) < LENGTHS[:, None], ids, tokens(1))
    hidden = llama_hidden(params, cfg, ids, LENGTHS)
    np.testing.assert_array_equal(hidden, llama_hidden(params, cfg, other, LENGTHS))
    assert (np.asarray(hidden)[np.arange(T) >= LENGTHS[:, None]] == 0).all()
    alone = llama_hidden(params, cfg, ids[1:2, :17], np.array([17]))
    np.testing.assert_allclose(hidden[1, :17], alone[0], atol=1e-5)


def test_logits_where_asked_equal_logits_everywhere() -> None:
    cfg = SMALL
    params = F.init_llama(cfg, jax.random.key(0))
    hidden = llama_hidden(params, cfg, tokens(), LENGTHS)
    replicated = llama_logits(params, cfg, hidden)
    np.testing.assert_allclose(llama_logits(params, cfg, hidden[:, 3]), replicated[:, 3], atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "dynamic, short"])
def test_cache_in_pieces_equals_one_pass(name: str) -> None:
    """Padded prompt, then two more tokens a row, rows at different positions."""
    _, cfg, params = pair(name)
    ids, prompt = tokens(), np.array([9, 5, 1])
    whole = llama_hidden(params, cfg, ids, np.full(3, T))
    cache = F.init_cache(cfg, 3, T)
    padded = np.where(np.arange(10) < prompt[:, None], ids[:, :10], 7)
    first, cache = llama_cached(params, cfg, padded, np.zeros(3, int), prompt, cache)
    more = np.take_along_axis(ids, prompt[:, None] + np.arange(2), 1)
    second, _ = llama_cached(params, cfg, more, prompt, prompt + 2, cache)
    for row, n in enumerate(prompt):
        np.testing.assert_allclose(first[row, :n], whole[row, :n], atol=2e-5)
        np.testing.assert_allclose(second[row], whole[row, n : n + 2], atol=2e-5)


def test_bfloat16_stays_close_and_keeps_its_dtypes() -> None:
    cfg = SMALL
    params = F.init_llama(cfg, jax.random.key(0))
    half = cfg.model_copy(update={"dtype": "bfloat16", "param_dtype": "bfloat16"})
    low = F.init_llama(half, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    hidden = llama_hidden(low, half, tokens(), LENGTHS)
    assert hidden.dtype == jnp.bfloat16
    out = llama_logits(low, half, hidden)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits(params, cfg, tokens(), LENGTHS), atol=0.05)


def test_rows_declare_the_trees() -> None:
    cfg = SMALL.model_copy(update={"num_layers": 3, "qkv_bias": True, "qk_norm": True, "tie_embeddings": False})
    made = jax.eval_shape(lambda key: F.init_llama(cfg, key), jax.random.key(0))
    params = jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert params == jax.tree.map(lambda x: (x.shape, x.dtype), F.abstract_params(cfg))
    axes = F.logical_axes(cfg)
    assert axes["layers"]["o"] == ("layers", "heads", "head_dim", "embed")
    assert axes["lm_head"] == ("embed", "vocab")
    named = jax.tree.map(lambda x, a: len(x.shape) == len(a), F.abstract_params(cfg), axes)
    assert all(jax.tree.leaves(named))


def test_layers_start_different_and_keys_decide() -> None:
    cfg = SMALL.model_copy(update={"num_kv_heads": 4})  # keys of the shape of queries
    one, again, other = (F.init_llama(cfg, jax.random.key(k)) for k in (0, 0, 1))
    q = one["layers"]["q"]
    assert not np.allclose(q[0], q[1]) and not np.allclose(one["layers"]["k"], q)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.allclose(q, other["layers"]["q"])


def test_parameters_that_do_not_fit_are_named() -> None:
    cfg = SMALL
    params = F.init_llama(cfg, jax.random.key(0))
    extra = params | {"lm_head": params["embed"], "final_norm": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"lm_head unknown; final_norm is \(3,\), not \(32,\)"):
        logits(extra, cfg, tokens(), LENGTHS)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        F.init_llama(LlamaConfig(), jax.random.key(0))
