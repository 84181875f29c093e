"""Packed rows give what padded rows give, forward and backward, on one device and on eight."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import LORA, M, adapters, batch, frozen, spec, weights

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LlamaConfig, LoraConfig, RopeScalingConfig
from jmlr_jax.method.step import joint_loss, judge
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.lora import bind, init_lora
from jmlr_jax.nn.packing import Packing, fullest, in_fewest_places
from jmlr_jax.parallel import sharding

KEY = jax.random.key(0)
V, T = 32, 12
LENGTHS = np.array([3, 12, 0, 5, 1, 7, 4, 2], np.int32)  # 34 of 96
TOKENS = np.random.default_rng(0).integers(0, V, (len(LENGTHS), T)).astype(np.int32)
PLAIN = LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=8, num_layers=2, num_heads=4, num_kv_heads=2, tie_embeddings=False
)
DROPPING = LoraConfig(rank=2, alpha=4, dropout=0.5)
SCALED = RopeScalingConfig(type="dynamic", factor=2.0, original_max_positions=4)


def close(a: Any, b: Any) -> None:
    """To rounding, of each array's own largest entry."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-4 * max(1, np.abs(y).max()), rtol=1e-4), a, b)


def test_tokens_move_there_and_back() -> None:
    packing = Packing.of(jnp.array([2, 0, 3]), 4, 6)
    rows = jnp.array([[11, 12, 0, 0], [0, 0, 0, 0], [31, 32, 33, 0]])
    assert packing.pack(rows).tolist() == [[11, 12, 31, 32, 33, 0]]
    assert packing.unpack(packing.pack(rows)).tolist() == rows.tolist()
    assert packing.number_GxF()[0, :5].tolist() == [0, 1, 8, 9, 10]


@pytest.mark.parametrize(
    "more",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"sliding_window": 3, "rope_scaling": SCALED}],
    ids=["plain", "window and rope"],
)
def test_the_decoder_on_packed_rows(more: dict[str, Any]) -> None:
    """Hidden states and the gradients of weights and adapters, with the same entries dropped."""
    cfg = PLAIN.model_copy(update=more)
    params, tree = F.init_llama(cfg, KEY), init_lora(DROPPING, cfg, jax.random.key(1))
    tree = jax.tree.map(lambda x: x + 0.2, tree)
    ahead = jax.random.normal(jax.random.key(2), (*TOKENS.shape, cfg.hidden_size))

    @partial(jax.jit, static_argnums=2)
    def both(params: Any, tree: Any, places: int | None) -> Any:
        def total(params: Any, tree: Any) -> Any:
            bound = bind(tree, DROPPING, jax.random.key(3))
            hidden = F.llama_hidden(params, cfg, TOKENS, jnp.asarray(LENGTHS), adapters=bound, places=places)
            return jnp.sum(hidden * ahead), hidden

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, tree)

    padded = both(params, tree, None)
    assert np.abs(padded[0][1]).max() > 0.5
    for path, gradient in jax.tree_util.tree_leaves_with_path(padded[1]):
        assert "lm_head" in jax.tree_util.keystr(path) or np.abs(gradient).max() > 1e-4, path
    for places in (int(LENGTHS.sum()), 48):
        close(both(params, tree, places), padded)


def test_the_fewest_places_that_hold_the_tokens_are_taken() -> None:
    @partial(jax.jit, static_argnums=1)
    def chosen(length_B: jax.Array, fractions: tuple[float, ...]) -> jax.Array:
        return in_fewest_places(lambda places: jnp.array(0 if places is None else places), fractions, length_B, 16)

    # Of 8 rows of 16: quarters are 32, 64 and 96 places.
    quarters = (0.75, 0.25, 0.5)
    for real, places in ((32, 32), (33, 64), (64, 64), (96, 96), (97, 0), (128, 0)):
        length_B = jnp.array([16] * (real // 16) + [real % 16] + [0] * 8)[:8]
        assert chosen(length_B, quarters) == places, real
    assert chosen(jnp.full(8, 1), ()) == 0 and chosen(jnp.full(8, 1), (1.0,)) == 0


@pytest.mark.parametrize("fraction", [0.75, pytest.param(1.0, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        pytest.param({"max_length": 13}, marks=pytest.mark.exhaustive),
        {"lora": LORA},
    ],
    ids=["room", "dropped", "adapters"],
)
def test_a_packed_joint_loss(settings: dict[str, Any], fraction: float) -> None:
    """Equal losses and gradients of judging and reading, with the same entries dropped, also where passages are dropped
    and questions have fewer than M candidates; at 1.0 the tokens fit."""
    of = batch(8)
    assert (of["valid_BxK"].sum(1) < M).any()
    params, still = weights(), frozen()
    if "lora" in settings:
        params, still = params | {"generator": adapters()}, still | {"base": params["generator"]}

    def losses(pack: tuple[float, ...]) -> Any:
        made = spec(**settings, pack=pack, rank_loss="kl")
        return jax.jit(jax.value_and_grad(partial(joint_loss, spec=made), has_aux=True))(params, still, of, KEY)

    (loss, metrics), gradients = losses(())
    close(losses((fraction - 0.05,)), ((loss, metrics), gradients))
    assert metrics["loss/rank"] > 0


@pytest.mark.exhaustive
def test_packed_judging_on_eight_devices() -> None:
    """Each of the four that share the rows packs its own: the same numbers, and no token travels for it."""
    of = {k: jnp.asarray(v) for k, v in batch(8).items() if k != "gumbel_BxK"}
    index, taken = jnp.tile(jnp.arange(M), (8, 1)), jnp.ones((8, M), bool)
    having = frozen() | weights()
    padded = jax.jit(partial(judge, spec()))(having, of, index, taken)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {"generator": F.logical_axes(spec().llama), "retriever": F.logical_axes(spec().retriever)}
    layout = sharding.shardings(mesh, axes, {name: having[name] for name in axes})
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        placed = having | jax.device_put({name: having[name] for name in axes}, layout)
        arguments = placed, *jax.device_put((of, index, taken), rows)
        compiled = jax.jit(partial(judge, spec(pack=(0.9,)))).lower(*arguments).compile()
        np.testing.assert_allclose(compiled(*arguments), padded, rtol=1e-5)

        def travelling(places: int | None) -> int:
            hidden = partial(F.llama_hidden, cfg=spec().llama, places=places)
            tokens, length = jax.device_put((jnp.asarray(TOKENS), jnp.asarray(LENGTHS)), rows)
            lowered = jax.jit(lambda p: hidden(p, tokens_BxT=tokens, length_B=length)).lower(placed["generator"])
            text = lowered.compile().as_text()
            return sum(text.count(f" {name}(") for name in ("all-gather", "all-to-all", "collective-permute"))

        assert fullest(jnp.asarray(LENGTHS)) == 15
        assert travelling(16) == travelling(None)
