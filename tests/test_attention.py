"""The attention kernel for TPUs, run by its interpreter, against plain XLA; where it is used; what it visits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.config import MeshConfig
from jmlr_jax.nn import attention
from jmlr_jax.nn.attention import attend, blocks, splash, visited
from jmlr_jax.parallel import sharding


def heads(rows: int, length: int, query: int, groups: int, width: int = 128) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(length), 3)
    return tuple(
        jax.random.normal(k, (rows, length, n, width)) for k, n in zip(keys, (query, groups, groups), strict=True)
    )


def loss(function: Any, *qkv: jax.Array) -> jax.Array:
    """Of outputs that all weigh differently."""
    out = function(*qkv)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))


@pytest.mark.parametrize(
    "length, query, groups, window",
    [
        (100, 2, 1, None),
        pytest.param(256, 2, 2, None, marks=pytest.mark.exhaustive),
        pytest.param(1100, 1, 1, None, marks=pytest.mark.exhaustive),
        (1100, 1, 1, 300),
    ],
    ids=["grouped, padded", "one block", "blocks", "window"],
)
def test_kernel_equals_xla_outputs_and_gradients(length: int, query: int, groups: int, window: int | None) -> None:
    qkv = heads(1, length, query, groups)
    kernel = partial(splash, window=window, interpret=True)
    plain = partial(attend, causal=True, window=window)
    np.testing.assert_allclose(jax.jit(kernel)(*qkv), jax.jit(plain)(*qkv), atol=2e-5)
    ours, theirs = (jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(*qkv) for f in (kernel, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("length", [128, 300, 1100])
@pytest.mark.parametrize("window, narrow", [(None, None), (70, None), (70, True), (70, False)])
def test_blocks_of_queries_equal_all_at_once(length: int, window: int | None, narrow: bool | None) -> None:
    """Positions that are given, as a cache needs them, are not cut into blocks."""
    qkv = heads(2, length, 3, 1, width=8)
    shared = partial(attend, window=window, narrow=None if narrow is None else jnp.array(narrow))
    blocked, whole = partial(shared, causal=True), partial(shared, position_BxT=jnp.arange(length)[None])
    np.testing.assert_allclose(jax.jit(blocked)(*qkv), jax.jit(whole)(*qkv), atol=2e-6)
    ours, theirs = (jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(*qkv) for f in (blocked, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_compute_less_than_all_at_once() -> None:
    qkv = heads(1, 1024, 2, 1, width=64)
    work = [
        jax.jit(f).lower(*qkv).compile().cost_analysis()["flops"]
        for f in (partial(attend, causal=True), partial(attend, position_BxT=jnp.arange(1024)[None]))
    ]
    assert work[0] < 0.65 * work[1]  # eight blocks: 36 of 64


def test_kernel_on_a_mesh_equals_one_device() -> None:
    """Rows over data and fsdp, heads over tensor; the compiler cannot split a kernel, so it is told."""
    qkv = heads(4, 128, 4, 2)
    alone = splash(*qkv, interpret=True)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        spread = jax.jit(partial(splash, interpret=True))(*qkv)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 128, 2, 128)}
    np.testing.assert_allclose(spread, alone, atol=1e-6)


def test_the_mesh_in_use_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not attention.splash_applies(128)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention.splash_applies(128) and not attention.splash_applies(64)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):  # of CPU devices
        assert not attention.splash_applies(128)


@pytest.mark.parametrize("length, window", [(640, None), (2688, None), (4096, None), (4096, 1000), (1100, 300)])
def test_visited_counts_the_blocks_that_hold_a_visible_pair(length: int, window: int | None) -> None:
    padded, side = blocks(length)
    assert padded % side == 0 and padded >= length
    position = np.arange(padded)
    visible = position[:, None] >= position
    if window is not None:
        visible &= position > position[:, None] - window
    count = padded // side
    there = visible.reshape(count, side, count, side).any((1, 3))
    assert visited(length, window) == there.sum() * side * side
