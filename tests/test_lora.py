"""Adapters: a start that changes nothing, merging, what is trained, dropout, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.config_models import BertConfig, EncoderLoraConfig, LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.layers import TARGETS, _dropped
from jmlr_jax.nn.lora import abstract_lora, bind, complete, init_lora, lora_axes, merge

V = 40
LLAMA = LlamaConfig(vocab_size=V, num_kv_heads=2, tie_embeddings=False)
LORA = LoraConfig(rank=4, alpha=12.0, dropout=0.5)
DECODER = tuple(name for name in TARGETS if name != "qkv")  # which ModernBERT alone has
KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, V, (2, 7))
LENGTHS = np.array([7, 4])


@pytest.fixture(scope="module")
def params() -> dict:
    return F.init_llama(LLAMA, KEY)


def moved(tree: dict) -> dict:
    """The adapters away from their start, so that b is not zero."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return form.unflatten([0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@jax.jit
def logits(params: dict, adapters: object = None) -> jax.Array:
    hidden = F.llama_hidden(params, LLAMA, IDS, jnp.asarray(LENGTHS), adapters=adapters)
    return F.llama_logits(params, LLAMA, hidden, adapters=adapters)


def test_the_start_changes_nothing_and_has_the_declared_shapes(params: dict) -> None:
    tree = init_lora(LORA, LLAMA, KEY)
    assert set(tree["layers"]) | {"lm_head"} == set(DECODER)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_lora(LORA, LLAMA)
    )
    np.testing.assert_array_equal(logits(params, bind(tree, LORA)), logits(params))
    a = tree["layers"]["o"]["a"]
    assert a.shape == (2, 4, 16, 4) and not np.allclose(a[0], a[1])
    np.testing.assert_allclose(a.std(), 64**-0.5, rtol=0.2)


@pytest.mark.parametrize("targets", [DECODER, ("v", "down"), ("lm_head",)])
def test_merged_weights_equal_adapters(params: dict, targets: tuple[str, ...]) -> None:
    cfg = LORA.model_copy(update={"targets": targets})
    tree = moved(init_lora(cfg, LLAMA, KEY))
    merged = merge(params, tree, cfg)
    np.testing.assert_allclose(logits(params, bind(tree, cfg)), logits(merged), atol=2e-4)
    differs = {k for k in params["layers"] if not np.array_equal(params["layers"][k], merged["layers"][k])}
    assert differs | ({"lm_head"} if "lm_head" in targets else set()) == set(targets)
    assert np.array_equal(params["lm_head"], merged["lm_head"]) is ("lm_head" not in targets)


def test_scale_is_alpha_over_rank(params: dict) -> None:
    cfg = LORA.model_copy(update={"targets": ("lm_head",)})
    tree = moved(init_lora(cfg, LLAMA, KEY))
    hidden = F.llama_hidden(params, LLAMA, jnp.asarray(IDS), jnp.asarray(LENGTHS))
    wanted = logits(params) + 3.0 * (hidden @ tree["lm_head"]["a"] @ tree["lm_head"]["b"])
    np.testing.assert_allclose(logits(params, bind(tree, cfg)), wanted, atol=1e-4)


def test_every_adapter_has_a_gradient(params: dict) -> None:
    tree = moved(init_lora(LORA, LLAMA, KEY))
    grads = jax.jit(jax.grad(lambda t: (logits(params, bind(t, LORA)) ** 2).sum()))(tree)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, path


def test_dropout_needs_a_key_repeats_with_it_and_keeps_the_mean(params: dict) -> None:
    cfg = LORA.model_copy(update={"targets": ("lm_head",)})
    tree = moved(init_lora(cfg, LLAMA, KEY))

    @jax.jit
    def dropped(key: jax.Array) -> jax.Array:
        return logits(params, bind(tree, cfg, key))

    plain = logits(params, bind(tree, cfg))
    one, again, other = dropped(jax.random.key(1)), dropped(jax.random.key(1)), dropped(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, plain)
    many = jnp.stack([dropped(k) for k in jax.random.split(KEY, 400)])
    np.testing.assert_allclose(many.mean(0), plain, atol=5 * float(many.std(0).max()) / 20)


def test_dropout_masks(params: dict) -> None:
    """Under one key, with the same inputs and weights: other masks in another layer and for another input of it, the
    same for adapters that read one input."""
    tree = {n: {"a": jnp.ones((8, 1)), "b": jnp.ones((1, 8))} for n in ("q", "k", "gate")}
    bound = bind({"layers": jax.tree.map(lambda x: jnp.stack([x, x]), tree)}, LORA, KEY)
    trees, keys = bound.per_layer(2)
    x = jnp.ones((3, 7, 8))
    layer = [bound.at_layer((jax.tree.map(lambda t, i=i: t[i], trees), keys[i])) for i in (0, 1)]
    first = layer[0].update("q", x, 1)
    assert not np.allclose(first, layer[1].update("q", x, 1))
    assert not np.allclose(first, layer[0].update("gate", x, 1))
    np.testing.assert_array_equal(first, layer[0].update("k", x, 1))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_is_independent(rate: float) -> None:
    """Share dropped; correlation of neighbouring places; means of rows, columns and keys; every two columns: all
    within some five deviations of independent draws."""
    shape = (4, 32, 8, 64)
    keys = jax.random.split(KEY, 64)
    mask = np.asarray(jax.vmap(lambda key: _dropped(jnp.ones(shape), key, rate))(keys)) == 0
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - rate) < 5 * deviation / mask.size**0.5
    z = (mask - rate) / deviation
    for axis in range(mask.ndim):
        for shift in (1, 3):
            pairs = z * np.roll(z, shift, axis)
            assert abs(pairs.mean()) < 5 / z.size**0.5, (axis, shift)
        rest = z.size // z.shape[axis]
        means = z.mean(tuple(a for a in range(z.ndim) if a != axis)) * rest**0.5  # of each key, row, ... column
        assert np.abs(means).max() < 5, axis
    flat = z.reshape(-1, shape[-1]).astype(np.float32)
    between = flat.T @ flat / len(flat)  # of every two columns
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 5.5 / len(flat) ** 0.5


@pytest.mark.exhaustive
def test_weights_that_train_whole(params: dict) -> None:
    """Zero at the start; then base and difference make the weight, in training and merged; each has a gradient."""
    cfg = LORA.model_copy(update={"targets": ("q",), "whole": ("embed", "attn_norm")})
    tree = init_lora(cfg, LLAMA, KEY)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_lora(cfg, LLAMA))
    assert lora_axes(cfg, LLAMA)["whole"] == {"embed": ("vocab", "embed"), "layers": {"attn_norm": ("layers", "norm")}}
    jax.tree.map(np.testing.assert_array_equal, complete(params, tree), params)
    tree = moved(tree)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert complete(half, tree)["embed"].dtype == jnp.float32 and complete(half, tree)["lm_head"].dtype == jnp.bfloat16
    np.testing.assert_allclose(complete(params, tree)["embed"], params["embed"] + tree["whole"]["embed"])
    trained = logits(complete(params, tree), bind(tree, cfg))
    np.testing.assert_allclose(trained, logits(merge(params, tree, cfg)), atol=2e-4)
    assert np.abs(trained - logits(params, bind(tree, cfg))).max() > 0.1
    grads = jax.jit(jax.grad(lambda t: (logits(complete(params, t), bind(t, cfg)) ** 2).sum()))(tree)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, path
    for wrong, message in (
        ({"whole": ("ln",)}, "'ln' matches no weight; there are attn_norm"),
        ({"whole": ("q",)}, "q twice"),
    ):
        with pytest.raises(ValueError, match=message):
            abstract_lora(LORA.model_copy(update=wrong), LLAMA)


def test_axes_follow_the_base_weight() -> None:
    axes = lora_axes(LORA, LLAMA)
    assert axes["layers"]["q"] == {"a": ("layers", "embed", "rank"), "b": ("layers", "rank", "heads", "head_dim")}
    assert axes["layers"]["o"] == {"a": ("layers", "heads", "head_dim", "rank"), "b": ("layers", "rank", "embed")}
    assert axes["lm_head"] == {"a": ("embed", "rank"), "b": ("rank", "vocab")}


def test_targets_that_match_nothing_are_named(params: dict) -> None:
    with pytest.raises(ValueError, match="'w1' matches no projection; there are q, k, v"):
        init_lora(LORA.model_copy(update={"targets": ("q", "w1")}), LLAMA, KEY)
    with pytest.raises(ValueError, match="'lm_head' matches no projection .*tie_embeddings"):
        init_lora(LORA, LLAMA.model_copy(update={"tie_embeddings": True}), KEY)
    with pytest.raises(ValueError, match="name q twice"):
        init_lora(LORA.model_copy(update={"targets": ("q", "q")}), LLAMA, KEY)
    tree = init_lora(LORA, LLAMA, KEY)
    with pytest.raises(ValueError, match="adapters lm_head have no weight"):
        merge({k: v for k, v in params.items() if k != "lm_head"}, tree, LORA)


# ---------------------------------------------------------------- the encoder

RETRIEVER = RetrieverConfig(bert=BertConfig(vocab_size=V, num_layers=2), dim=8, query_length=7)
ENCODER = EncoderLoraConfig(rank=4, alpha=12.0, whole=("projection", "up_bias"))


@jax.jit
def queries(params: dict) -> jax.Array:
    return F.encode_queries(params, RETRIEVER, IDS, jnp.asarray(LENGTHS))


@pytest.mark.exhaustive
def test_encoder_starts_at_its_base_and_has_its_shapes_and_axes() -> None:
    params, tree = F.init_colbert(RETRIEVER, KEY), init_lora(ENCODER, RETRIEVER, KEY)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_lora(ENCODER, RETRIEVER))
    assert tree["layers"]["o"]["a"].shape == (2, 2, 32, 4) and tree["layers"]["up"]["b"].shape == (2, 4, 128)
    axes = lora_axes(ENCODER, RETRIEVER)
    assert axes["layers"]["q"]["b"] == ("layers", "rank", "encoder_heads", "head_dim")
    assert axes["whole"] == {"projection": ("embed", "token_vector"), "layers": {"up_bias": ("layers", "encoder_mlp")}}
    merged = merge(params, tree, ENCODER)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


@pytest.mark.exhaustive
def test_encoder_merges_what_adapters_would_add_and_gradients_pass() -> None:
    params, tree = F.init_colbert(RETRIEVER, KEY), moved(init_lora(ENCODER, RETRIEVER, KEY))
    merged = merge(params, tree, ENCODER)
    a, b = (np.asarray(tree["layers"]["o"][side][1], np.float64) for side in "ab")
    wanted = np.asarray(params["bert"]["layers"]["o"][1]) + 3 * np.einsum("hdr,re->hde", a, b)
    np.testing.assert_allclose(merged["bert"]["layers"]["o"][1], wanted, atol=1e-5)
    np.testing.assert_allclose(merged["projection"], params["projection"] + tree["whole"]["projection"], atol=1e-6)
    same = [k for k, w in merged["bert"]["layers"].items() if np.array_equal(w, params["bert"]["layers"][k])]
    assert set(same) == set(merged["bert"]["layers"]) - {*ENCODER.targets, "up_bias"}
    np.testing.assert_array_equal(merged["bert"]["word"], params["bert"]["word"])
    seen = jax.jit(jax.grad(lambda t: (queries(merge(params, t, ENCODER)) ** 3).sum()))(tree)
    for path, g in jax.tree_util.tree_leaves_with_path(seen):
        assert np.abs(g).max() > 0, path


def test_errors_name_the_half_and_what_it_has() -> None:
    wrong = ENCODER.model_copy(update={"whole": ("embed",)})
    with pytest.raises(ValueError, match=r"retriever\.lora\.whole: 'embed' matches no weight; there are .*word"):
        abstract_lora(wrong, RETRIEVER)
    with pytest.raises(ValueError, match=r"retriever\.lora\.targets and retriever\.lora\.whole together name up twice"):
        abstract_lora(ENCODER.model_copy(update={"whole": ("up",)}), RETRIEVER)
    with pytest.raises(ValueError, match=r"generator\.lora\.whole: 'word' matches no weight"):
        abstract_lora(LORA.model_copy(update={"whole": ("word",)}), LLAMA)
