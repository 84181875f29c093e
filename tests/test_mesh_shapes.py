"""Twenty joint steps on every mesh of eight devices, with adapters and without, equal those of one device.

Where a mesh sums in another order the last bits differ, and training multiplies differences: at a learning rate of 0.2
by three to ten a step, until after a dozen steps nothing agrees. At the rates below they stay near the rounding of
float32, far from the smallest gap between scores or judgements that a choice among passages hangs on, so sampling,
ranking and dropout take part as they are. Plain gradient steps with momentum, because Adam turns gradients that are
rounding and nothing else (the bias of a key) into steps of full size.

Each array's path of twenty steps is compared with its own length: a gradient that lacks a sum over devices, or is
averaged over the wrong number of them, is off by half of it or more.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from steps import ENCODER_LORA, RETRIEVER, batch, frozen, spec

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LlamaConfig, LoraConfig
from jmlr_jax.method.step import StepSpec, init_state, make_step
from jmlr_jax.nn import functional as F
from jmlr_jax.nn import lora
from jmlr_jax.parallel import sharding
from jmlr_jax.training.optimizer import state_shardings

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
STEPS, BATCHES, LARGE = 20, 4, 1024  # bytes: what a projection takes
LOSS, PATH = 1e-4, 1e-3  # nats; share of the way an array went
# Eight of everything that is cut eight ways; dropout on, so that masks must not depend on the mesh either.
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=8, num_kv_heads=8, tie_embeddings=False
)
LORA = LoraConfig(rank=8, alpha=16, dropout=0.1, targets=("q", "o", "down", "lm_head"), whole=("embed", "final_norm"))
FULL, GENERATOR, BOTH = "full", "adapters", "adapters on both"  # what trains
OPTIMIZER = {FULL: optax.sgd(0.004, momentum=0.9), GENERATOR: optax.sgd(0.005, momentum=0.9)}
OPTIMIZER[BOTH] = OPTIMIZER[GENERATOR]


def made(what: str) -> StepSpec:
    retriever = RETRIEVER.model_copy(update={"lora": ENCODER_LORA if what == BOTH else None})
    return replace(spec(lora=None if what == FULL else LORA), llama=LLAMA, retriever=retriever)


@cache
def start(what: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What trains, on the host because each run gives its copy away, what is frozen, and the logical axes of all."""
    base = F.init_llama(LLAMA, jax.random.key(0))
    base["embed"] = base["embed"] * 40
    params = {"generator": base, "retriever": F.init_colbert(RETRIEVER, jax.random.key(1))}
    axes = {"generator": F.logical_axes(LLAMA), "retriever": F.logical_axes(RETRIEVER)}
    still = frozen()
    if what != FULL:
        still["base"], params["generator"] = base, lora.init_lora(LORA, LLAMA, jax.random.key(2))
        axes |= {"base": axes["generator"], "generator": lora.lora_axes(LORA, LLAMA)}
    if what == BOTH:
        still["retriever_base"] = params["retriever"]
        params["retriever"] = lora.init_lora(ENCODER_LORA, RETRIEVER, jax.random.key(3))
        axes |= {"retriever_base": axes["retriever"], "retriever": lora.lora_axes(ENCODER_LORA, RETRIEVER)}
    return jax.device_get(params), still, axes


@cache
def batches() -> list[dict[str, Any]]:
    return [{k: v for k, v in batch(8, seed).items() if k != "gumbel_BxK"} for seed in range(BATCHES)]


def run(step: Any, state: dict[str, Any], still: dict[str, Any], place: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Weights at the end, and both losses of every step."""
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, still, place(batches()[number % BATCHES]))
        losses.append([metrics["loss/answer"], metrics["loss/rank"]])
    return jax.device_get(state["params"]), np.asarray(jax.device_get(losses))


@cache
def alone(what: str) -> tuple[dict[str, Any], np.ndarray]:
    """The same on one device."""
    params, still, _ = start(what)
    state = init_state(params, OPTIMIZER[what], jax.random.PRNGKey(0))
    return run(jax.jit(make_step(made(what), OPTIMIZER[what])), state, still, lambda of: of)


@pytest.mark.exhaustive  # test_step has one mesh of eight
@pytest.mark.parametrize(
    ("shape", "what"),
    [*itertools.product(SHAPES, (GENERATOR, FULL)), ((2, 2, 2), BOTH)],
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)),
)
def test_every_mesh_of_eight_equals_one_device(shape: tuple[int, int, int], what: str) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    params, still, axes = start(what)
    replicated = jax.NamedSharding(mesh, jax.P())
    layout: dict[str, Any] = dict.fromkeys(("step", "key", "skipped", "skipped_in_row"), replicated)
    layout["params"] = sharding.shardings(mesh, {name: axes[name] for name in params}, params)
    layout["opt"] = state_shardings(OPTIMIZER[what], params, layout["params"], replicated)
    with jax.set_mesh(mesh):
        state = jax.device_put(init_state(params, OPTIMIZER[what], jax.random.PRNGKey(0)), layout)
        bases = {name: still[name] for name in still.keys() & axes.keys()}
        still = still | jax.device_put(bases, sharding.shardings(mesh, {name: axes[name] for name in bases}, bases))
        whole = [name for name, _ in sharding.replicated_report({"state": state, "still": still}, LARGE)]
        if shape[0] < 8:  # along `tensor` alone the encoder is not cut, along `data` nothing is
            assert [name for name in whole if shape[1] > 1 or "retriever" not in name] == []
        # Adapters on both: prompts are packed here, by each device its own rows, and not where it is alone.
        packing = replace(made(what), pack=(0.9,) if what == BOTH else ())
        step = jax.jit(make_step(packing, OPTIMIZER[what]), donate_argnums=0, out_shardings=(layout, None))
        weights, losses = run(step, state, still, lambda of: jax.device_put(of, sharding.batch_sharding(mesh)))
        assert step._cache_size() == 1
    expected, alone_losses = alone(what)
    assert alone_losses[-BATCHES:, 0].mean() < alone_losses[:BATCHES, 0].mean() - 0.1, "nothing is learned"
    np.testing.assert_allclose(losses, alone_losses, atol=LOSS, rtol=0)

    def same_path(here: np.ndarray, there: np.ndarray, first: np.ndarray) -> None:
        way = np.abs(there - first).max()
        np.testing.assert_allclose(here, there, atol=PATH * max(way, 1e-3), rtol=0)

    jax.tree.map(same_path, weights, expected, params)
