"""Two optimizers in one: groups by path, schedules, clipping of each half alone, placement of the moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmlr_jax.config import MeshConfig, OptimizerConfig
from jmlr_jax.parallel import sharding
from jmlr_jax.training import optimizer as optim
from jmlr_jax.training.optimizer import GroupError, labels, make_optimizer, schedule, state_shardings, trainable_counts

PARAMS = {
    "retriever": {"projection": jnp.ones((4, 2)), "bert": {"word": jnp.ones(3)}},
    "generator": {"layers": {"q": jnp.ones((2, 4))}},
}


def half(rate: float, **more: float) -> OptimizerConfig:
    """No warm-up, no decay of the rate: the first update is made at this rate."""
    return OptimizerConfig(learning_rate=rate, warmup_steps=0, final_fraction=1.0, **more)


def first_update(retriever: OptimizerConfig, generator: OptimizerConfig, grads: dict) -> dict:
    optimizer = make_optimizer(retriever, generator, half(1.0), 10)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_every_array_has_its_group() -> None:
    assert labels(PARAMS) == {
        "retriever": {"projection": "retriever", "bert": {"word": "retriever"}},
        "generator": {"layers": {"q": "generator"}},
    }


@pytest.mark.parametrize("place", [("importance",), ("whole", "importance")])
def test_importance_has_a_rate_of_its_own(place: tuple[str, ...]) -> None:
    """With adapters and without."""
    tree: Any = jnp.ones(2)
    for name in reversed(place):
        tree = {name: tree}
    params = {"retriever": {"projection": jnp.ones(2), **tree}}
    optimizer = make_optimizer(half(1e-3), half(1.0), half(0.5), 10)
    update = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]["retriever"]
    np.testing.assert_allclose(update["projection"], -1e-3, rtol=1e-4)
    for name in place:
        update = update[name]
    np.testing.assert_allclose(update, -0.5, rtol=1e-4)
    assert trainable_counts(params) == {"retriever": 2, "importance": 2, "generator": 0}


def test_an_array_without_group_or_with_two_is_an_error_that_names_it() -> None:
    with pytest.raises(GroupError, match="one optimizer group:\nmodel/a: no group\nretriever2/b: no group"):
        labels({"model": {"a": jnp.ones(1)}, "retriever2": {"b": jnp.ones(1)}, **PARAMS})
    with pytest.raises(GroupError, match="generator/layers/q: generator and attention"):
        labels(PARAMS, optim.GROUPS | {"attention": ".*/q"})
    with pytest.raises(GroupError, match="adapters/q: no group"):
        make_optimizer(half(1.0), half(1.0), half(1.0), 10).init({"adapters": {"q": jnp.ones(1)}})


def test_schedule_rises_from_zero_and_falls_to_its_final_fraction() -> None:
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.25), 12)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 4, 8, 12, 20)], [0, 0.5, 2, 1.25, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_schedule_of_a_run_shorter_than_its_warm_up(steps: int) -> None:
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=20), steps)
    seen = [float(rate(step)) for step in range(steps + 1)]
    assert np.isfinite(seen).all() and max(seen) == pytest.approx(1.0)


def test_each_half_has_its_own_rate() -> None:
    updates = first_update(half(1e-3), half(1e-1), jax.tree.map(lambda x: 0.1 * x, PARAMS))
    for leaf in jax.tree.leaves(updates["retriever"]):
        np.testing.assert_allclose(leaf, -1e-3, rtol=1e-3)
    np.testing.assert_allclose(updates["generator"]["layers"]["q"], -1e-1, rtol=1e-3)


def test_each_half_has_its_own_decay() -> None:
    updates = first_update(half(1.0, weight_decay=0.5), half(1.0), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["retriever"]["projection"], -0.5)
    np.testing.assert_array_equal(updates["generator"]["layers"]["q"], 0)


def test_a_huge_gradient_of_one_half_does_not_shrink_the_other() -> None:
    """Adam hides a common scale in its first update, so the first moments are looked at: they are (1 - b1) times the
    clipped gradient."""
    small = jax.tree.map(lambda x: 0.01 * x, PARAMS)
    huge = small | {"retriever": jax.tree.map(lambda x: 1e6 * x, PARAMS["retriever"])}
    optimizer = make_optimizer(half(1e-3), half(1e-3), half(1e-3), 10)
    moments = {}
    for name, grads in {"small": small, "huge": huge}.items():
        _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
        moments[name] = optax.tree.get_all_with_path(state, "mu")
    generator = {name: [mu for path, mu in found if "generator" in str(path)] for name, found in moments.items()}
    retriever = [mu for path, mu in moments["huge"] if "retriever" in str(path)]
    kept = generator["huge"][0]["generator"]["layers"]["q"]
    np.testing.assert_allclose(kept, 0.1 * 0.01, rtol=1e-5)
    np.testing.assert_array_equal(kept, generator["small"][0]["generator"]["layers"]["q"])
    assert float(optax.tree.norm(retriever[0]["retriever"])) == pytest.approx(0.1, rel=1e-4)


def test_trainable_counts_name_both_halves_even_if_one_is_frozen() -> None:
    assert trainable_counts(PARAMS) == {"retriever": 11, "generator": 8}
    assert trainable_counts({"generator": PARAMS["generator"]}) == {"retriever": 0, "generator": 8}


def test_moments_lie_where_their_weights_lie() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    replicated, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("fsdp"))
    placed = jax.tree.map(lambda _: replicated, PARAMS)
    placed["retriever"]["projection"] = split
    optimizer = make_optimizer(half(1.0), half(1.0), half(1.0), 10)
    found = state_shardings(optimizer, PARAMS, placed, replicated)
    assert jax.tree.structure(found) == jax.tree.structure(optimizer.init(PARAMS))
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)]
    moments = [leaf for name, leaf in named if "projection" in name]
    assert len(moments) == 2 and all(leaf == split for leaf in moments)
    assert all(leaf == replicated for name, leaf in named if "projection" not in name)
