"""What a phase computes: compiled once for all phases of one shape, laid out as promised, with nothing held twice."""

from __future__ import annotations

import gc
import logging
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from runs import assert_same_weights, one_device, open_run

from jmlr_jax.config import Config
from jmlr_jax.evaluation import arms, reading
from jmlr_jax.parallel.sharding import ShardingError
from jmlr_jax.planning.programs import step_program
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import phase_steps, phase_weights, retriever_of
from jmlr_jax.training import loop, warmup
from jmlr_jax.training.loop import train_phase
from jmlr_jax.training.program import PhaseProgram, divide, phase_program

QUIET = Console(quiet=True)
SHORT = {"steps": 2, "checkpoint_steps": 2, "refresh_steps": 0, "dev_questions": 4}
WIDE = 20  # of the generator's inner layer: no other array has its shape
ADAPTERS = {"lora": {"rank": 2, "targets": ["q", "down"]}, "llama": {"intermediate_size": WIDE}}


@pytest.fixture
def opened(tiny_data: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    one_device(monkeypatch)
    return lambda **sections: open_run(tiny_data, tmp_path, **sections)


def program(run: Run, name: str, cfg: Config | None = None) -> PhaseProgram:
    cfg, phase = cfg or run.cfg, PHASES[name]
    steps = phase_steps(cfg.train, phase)
    return phase_program(cfg, phase, run.retriever, run.llama, run.prepared.generator_ids, steps, run.mesh)


# ---------------------------------------------------------------- once


def test_phases_of_one_shape_compile_once(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The arms that read what they are given differ in weights and passages alone; one that reads nothing is another
    program. The rate is this test's own, so that no other has compiled for it."""
    run = opened(train=SHORT | {"generator": {"learning_rate": 0.0123}})

    def compiled(*arms: str) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for arm in arms:
                train_phase(run, PHASES[arm], QUIET)
        names = [record.getMessage().split()[1] for record in caplog.records if "Compiling" in record.getMessage()]
        return [name for name in names if name in ("jit(init_state)", "jit(step)", "jit(reading_loss)")]

    each = ["jit(init_state)", "jit(reading_loss)", "jit(step)"]
    assert sorted(compiled("bm25")) == each
    assert compiled("random", "frozen") == []
    assert sorted(compiled("closed_book")) == each
    assert program(run, "bm25").step._cache_size() == 1


def test_what_a_step_does_not_read_makes_no_other_program(opened: Any) -> None:
    run = opened(train=SHORT)
    reading = program(run, "bm25")
    assert program(run, "random") is program(run, "frozen") is program(run, "separate") is reading
    other = run.cfg.model_copy(update={"seed": 5, "train": run.cfg.train.model_copy(update={"log_steps": 7})})
    assert program(run, "bm25", other) is reading
    for name, value in (("steps", 3), ("accumulate", 2), ("read_passages", 1)):
        other = run.cfg.model_copy(update={"train": run.cfg.train.model_copy(update={name: value})})
        assert program(run, "bm25", other) is not reading, name
    assert len({program(run, name) for name in PHASES}) == 5


def test_microbatches_divide_over_the_mesh(opened: Any) -> None:
    run = opened(train={"batch_size": 4, "accumulate": 4})
    mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:2])
    with pytest.raises(ShardingError, match="train.batch_size / train.accumulate=1"):
        phase_program(run.cfg, PHASES["bm25"], run.retriever, run.llama, run.prepared.generator_ids, 4, mesh)


# ---------------------------------------------------------------- laid out as promised


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_what_a_phase_begins_with_is_what_its_program_says(opened: Any, adapters: bool) -> None:
    """Shapes, dtypes and places: a plan compiles from the ones, training runs on the others."""
    halves = {"generator": ADAPTERS, "retriever": {"lora": {"rank": 2, "targets": ["q"]}}} if adapters else {}
    run = opened(train=SHORT, **halves)
    made = program(run, "jmlr")
    with jax.set_mesh(run.mesh):
        params, frozen = divide(made.spec, phase_weights(run, PHASES["jmlr"]), run.retriever_adapters)
        state = made.start(params, key=jax.random.PRNGKey(0))
    assert set(frozen) == ({"base", "retriever_base"} if adapters else set())

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert described(state) == described(made.state)
    assert described(frozen) == described({name: tree for name, tree in made.frozen.items() if name != "skip_V"})
    generator = run.cfg.generator.model_copy(update={"llama": run.llama})
    planned = run.cfg.model_copy(update={"retriever": run.retriever, "generator": generator})
    assert described(step_program(planned, run.mesh).arguments[:2]) == described((made.state, made.frozen))


# ---------------------------------------------------------------- nothing held twice


def copies() -> int:
    """How many arrays on the devices have the shape of the base's inner layer."""
    gc.collect()
    return sum(x.shape == (1, 16, WIDE) for x in jax.live_arrays()) // 2  # gate and up


@pytest.mark.exhaustive
def test_the_frozen_base_lies_on_the_devices_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a phase trains, between phases, and while an arm is evaluated."""
    run, seen = opened(train=SHORT | {"warmup": {"steps": 1}}, generator=ADAPTERS, eval={"arms": ["bm25"]}), []

    def counted(name: str, function: Any) -> Any:
        def counting(*args: Any) -> Any:
            seen.append((name, copies()))
            return function(*args)

        return counting

    assert copies() == 0
    for module in (warmup, loop):
        monkeypatch.setattr(module, "assemble", counted("training", module.assemble))
    for name in ("warmup", "jmlr"):
        train_phase(run, PHASES[name], QUIET)
    assert len(seen) == 3 and set(seen) == {("training", 1)}
    kept = phase_weights(run, PHASES["bm25"]), retriever_of(run, None), run.initial_weights()
    assert copies() == 1
    train_phase(run, PHASES["bm25"], QUIET)
    del run, kept
    assert copies() == 0

    seen.clear()
    monkeypatch.setattr(reading, "place_batch", counted("evaluation", reading.place_batch))
    monkeypatch.setattr(arms, "fixed_table", counted("retrieval", arms.fixed_table))
    arms.evaluate_arms(opened(generator=ADAPTERS, train=SHORT | {"warmup": {"steps": 1}}), ["bm25"])
    assert {name for name, _ in seen} == {"evaluation", "retrieval"} and {count for _, count in seen} == {1}


@pytest.mark.exhaustive
def test_a_phase_does_not_give_away_the_weights_it_begins_with(opened: Any) -> None:
    """The step donates its state; the next phase begins with the same weights all the same."""
    run = opened(train=SHORT)
    before = jax.tree.map(np.array, run.initial_weights())
    train_phase(run, PHASES["separate_retriever"], QUIET)
    train_phase(run, PHASES["bm25"], QUIET)
    assert not any(x.is_deleted() for x in jax.tree.leaves(run.initial_weights()))
    assert_same_weights(run.initial_weights(), before)
    # Whoever changes a tree changes his own.
    run.initial_weights()["generator"].clear()
    assert_same_weights(run.initial_weights(), before)
