"""The mesh, the rule table and its errors; models sharded over eight virtual devices against one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import BertConfig, LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.lora import abstract_lora, lora_axes
from jmlr_jax.parallel import sharding

V = 32
LLAMA = LlamaConfig(vocab_size=V, num_kv_heads=2, tie_embeddings=False)
COLBERT = RetrieverConfig(bert=BertConfig(vocab_size=V + 1))  # odd: the encoder's vocabulary need not divide


def mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_eight_devices_are_there() -> None:
    assert len(jax.devices()) == 8, "conftest.py asks XLA for eight virtual CPU devices before JAX starts"


@pytest.mark.parametrize(
    "sizes, shape",
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, 2, -1), (2, 2, 2)), ((4, 1, 2), (4, 1, 2))],
)
def test_minus_one_takes_what_is_left(sizes: tuple, shape: tuple) -> None:
    made = mesh(*sizes)
    assert tuple(made.shape.values()) == shape and made.axis_names == ("data", "fsdp", "tensor")
    assert set(made.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 1), "data and fsdp are both -1"),
        ((0, -1, 1), "mesh.data=0: an axis has a positive size"),
        ((1, -2, 1), "mesh.fsdp=-2"),
        ((2, 2, 1), "mesh.data=2 x mesh.fsdp=2 x mesh.tensor=1 needs 4 devices; 8 are there"),
        ((3, -1, 1), "needs a multiple of 3 devices; 8 are there"),
        ((1, -1, 16), "needs a multiple of 16 devices; 8 are there"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(sharding.ShardingError, match=message):
        mesh(*sizes)


def test_a_mesh_over_some_of_the_devices() -> None:
    assert sharding.make_mesh(MeshConfig(), jax.devices()[:2]).shape["fsdp"] == 2


def test_specs_of_the_weights() -> None:
    specs = jax.tree.map(
        lambda s: s.spec, sharding.shardings(mesh(2, 2, 2), F.logical_axes(LLAMA), F.abstract_params(LLAMA))
    )
    assert specs["embed"] == P("tensor", "fsdp")
    assert specs["layers"]["k"] == P(None, "fsdp", "tensor", None)
    assert specs["layers"]["down"] == P(None, "tensor", "fsdp")
    assert specs["layers"]["attn_norm"] == P(None, None)
    lora = LoraConfig(rank=4)
    placed = sharding.shardings(mesh(2, 2, 2), lora_axes(lora, LLAMA), abstract_lora(lora, LLAMA))
    specs = jax.tree.map(lambda s: s.spec, placed["layers"]["q"])
    assert specs == {"a": P(None, "fsdp", None), "b": P(None, "fsdp", "tensor", None)}  # rank only where fsdp is free
    placed = sharding.shardings(mesh(1, 8, 1), lora_axes(lora, LLAMA), abstract_lora(lora, LLAMA))
    assert placed["layers"]["q"]["b"].spec == P(None, None, "tensor", None)  # rank 4 does not divide by 8
    sharding.shardings(mesh(1, 4, 2), F.logical_axes(COLBERT), F.abstract_params(COLBERT))


def test_every_rule_names_mesh_axes_and_every_axis_in_use_has_a_rule() -> None:
    for rule in sharding.RULES.values():
        assert set((rule,) if isinstance(rule, str) else rule or ()) <= set(sharding.MESH_AXES)
    used = {"batch", "encoder_batch", "length", "hidden"}
    full = LLAMA.model_copy(update={"qkv_bias": True, "qk_norm": True})
    modern = COLBERT.bert.model_copy(update={"block": "modernbert"})
    for tree in (F.logical_axes(full), F.logical_axes(COLBERT), F.logical_axes(modern), lora_axes(LoraConfig(), LLAMA)):
        for axes in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple)):
            used |= set(axes)
    assert used == set(sharding.RULES)


def test_errors_name_weight_dimension_and_sizes() -> None:
    here = mesh(2, 2, 2)
    with pytest.raises(sharding.ShardingError, match=r"layers\.x: logical axis 'widht' has no rule; known are .*embed"):
        sharding.shardings(here, {"layers": {"x": ("widht",)}}, {"layers": {"x": jnp.ones(4)}})
    with pytest.raises(sharding.ShardingError, match="w: axes 'heads' and 'mlp' both map to mesh axis 'tensor'"):
        sharding.shardings(here, {"w": ("heads", "mlp")}, {"w": jnp.ones((4, 4))})
    with pytest.raises(sharding.ShardingError, match=r"w: 1 axis names \('embed',\) for shape \(4, 4\)"):
        sharding.shardings(here, {"w": ("embed",)}, {"w": jnp.ones((4, 4))})
    odd = LLAMA.model_copy(update={"num_kv_heads": 1})
    message = r"layers\.k: dimension 2 \('kv_heads'\) has size 1, which mesh\.tensor=2 does not divide"
    with pytest.raises(sharding.ShardingError, match=message):
        sharding.shardings(here, F.logical_axes(odd), F.abstract_params(odd))


def test_rows_over_data_and_fsdp() -> None:
    here = mesh(2, 2, 2)
    x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(here))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    assert sharding.check_rows(here, 8, "train.batch_size") == 2
    with pytest.raises(sharding.ShardingError, match=r"train.batch_size=6 is not a multiple of .*=2 x .*=2 = 4"):
        sharding.check_rows(here, 6, "train.batch_size")


def test_constrain_pins_layout_checks_rank_and_needs_no_mesh() -> None:
    x = jnp.ones((8, 4, 6))
    assert sharding.constrain(x, "batch", "length", "hidden") is x
    with jax.set_mesh(mesh(2, 2, 2)):
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "length", "hidden"))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 4, 6)}
    with pytest.raises(sharding.ShardingError, match=r"shape \(8, 4, 6\) constrained with 2 axis names"):
        sharding.constrain(x, "batch", "length")


def test_report_lists_large_arrays_that_are_whole_everywhere() -> None:
    here = mesh(1, 8, 1)
    put = lambda shape, spec: jax.device_put(np.zeros(shape, np.float32), jax.NamedSharding(here, spec))  # noqa: E731
    tree = {
        "a": put((64, 8), P()),
        "b": {"c": put((64, 64), P(None, None)), "d": put((64, 64), P("fsdp"))},
        "e": put(4, P()),
    }
    assert sharding.replicated_report(tree, 1024) == [("b.c", 64 * 64 * 4), ("a", 64 * 8 * 4)]
    alone = {"a": jax.device_put(np.zeros(4096), jax.devices()[0])}
    assert sharding.replicated_report(alone, 1) == []


@pytest.mark.exhaustive
def test_sharded_gradients_equal_single_ones() -> None:
    """Loss and gradient of decoder and encoder together, on the mesh and on one device; weights start in place."""
    rng = np.random.default_rng(0)
    ids, length = rng.integers(0, V, (8, 10)), rng.integers(3, 11, 8)
    configs = {"generator": LLAMA, "retriever": COLBERT}

    def init(key: jax.Array) -> dict:
        return {"generator": F.init_llama(LLAMA, key), "retriever": F.init_colbert(COLBERT, key)}

    def loss(params: dict, ids: jax.Array, length: jax.Array) -> jax.Array:
        hidden = F.llama_hidden(params["generator"], LLAMA, ids, length)
        logp = jax.nn.log_softmax(F.llama_logits(params["generator"], LLAMA, hidden[:, 1]))
        q = F.encode_queries(params["retriever"], COLBERT, ids, length)
        p, _ = F.encode_passages(params["retriever"], COLBERT, ids, length, jnp.zeros(V + 1, bool))
        return -logp[:, 0].mean() + (q[:, None] * p[:, ::-1, None]).sum() / 100

    key = jax.random.key(0)
    single = jax.jit(jax.value_and_grad(loss))(init(key), ids, length)
    here = mesh(2, 2, 2)
    axes = {name: F.logical_axes(cfg) for name, cfg in configs.items()}
    placed = sharding.shardings(here, axes, jax.eval_shape(init, key))
    with jax.set_mesh(here):
        params = jax.jit(init, out_shardings=placed)(key)
        rows = jax.device_put((ids, length), sharding.batch_sharding(here))
        sharded = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed))(params, *rows)
    q = params["generator"]["layers"]["q"]
    assert q.addressable_shards[0].data.size == q.size // 4
    assert sharding.replicated_report(params, 4096) == []
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), single, sharded)
