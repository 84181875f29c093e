"""The judge: what is tried every few steps, and a slow one in place of the generator that learns."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from runs import one_device, open_run
from steps import batch, frozen, spec, weights

from jmlr_jax.method.step import init_state, joint_loss, make_step
from jmlr_jax.run.phases import PHASES
from jmlr_jax.training.loop import train_phase
from jmlr_jax.training.probe import LEXICAL, RANDOM, JudgeProbe

KEY = jax.random.key(0)


@pytest.fixture
def run(tiny_data: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    one_device(monkeypatch)
    return open_run(tiny_data, tmp_path, train={"probe_questions": 6, "probe_steps": 2, "steps": 4, "refresh_steps": 0})


def judging(nll_PxK: list[list[float]]) -> Any:
    """A program whose judgements are these, whatever it is asked."""
    made = np.array(nll_PxK, np.float32)
    return SimpleNamespace(probe=lambda params, frozen, batch: made[: len(batch["valid_BxK"])])


def test_a_gold_passage_stands_among_lexical_and_random_ones_that_are_not(run: Any) -> None:
    probe, gold = JudgeProbe(run, judging([])), run.gold("dev")
    assert len(probe.rows) == 6 and len(set(probe.rows)) == 6
    for row, table in zip(probe.rows, probe.table_PxK, strict=True):
        assert table[0] in gold[row] and not set(table[1:]) & set(gold[row])
        assert len(set(table)) == 1 + LEXICAL + RANDOM
    assert (JudgeProbe(run, judging([])).table_PxK == probe.table_PxK).all()


def test_shares_are_of_questions_and_of_pairs(run: Any) -> None:
    """Of four questions a batch: the right passage first in one of them; an equal judgement is half a pair."""
    rows = [[1.0, 2, 2, 2, 2, 2], [3.0, 2, 4, 4, 4, 2], [1.0, 1, 0, 2, 1, 2], [9.0, 1, 1, 1, 1, 1]]
    probe = JudgeProbe(run, judging(rows))
    probe.rows, probe.table_PxK = probe.rows[:4], probe.table_PxK[:4]
    found = probe.measure(None, None)
    assert found["judge/hit"] == pytest.approx(1 / 4)
    assert found["judge/lexical"] == pytest.approx((3 + 2 + 1.5 + 0) / 12)
    assert found["judge/random"] == pytest.approx((2 + 1 + 1.5 + 0) / 8)
    ahead = [1] * 5 + [-1, 1, 1, 1, -1] + [0, -1, 1, 0, 1] + [-8] * 5
    apart = [0] * 10 + [2, 2, 2, 0, 0, 0, 2, 0, 2, 2] + [1, 1, 0, 1, 2, 1, 1, 1, 2, 1] + [0] * 10
    assert found["judge/gap"] == np.median(ahead) and found["judge/noise"] == np.median(apart)


def test_a_fall_is_said_beyond_chance(run: Any) -> None:
    probe = JudgeProbe(run, judging([]))
    assert probe.fallen(0.5, 0.4) is None and probe.fallen(0.5, 0.9) is None
    said = probe.fallen(0.9, 0.1)
    assert said is not None and "10% of 6 dev questions, 90%" in said and "train.judge_decay" in said


@pytest.mark.exhaustive
def test_trials_are_lines_of_metrics_and_change_no_weights(run: Any, tmp_path: Any) -> None:
    train_phase(run, PHASES["jmlr"], Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "arms/jmlr/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "judge/hit" in line] == [0, 2, 4]
    assert [line["step"] for line in lines if "loss/rank" in line] == [1, 2, 3, 4]


@pytest.mark.exhaustive
def test_the_slow_judge_judges() -> None:
    """With another judge beside it, the generator's own rank loss does not matter: it is that of the judge."""
    other = weights()
    other["generator"] = jax.tree.map(lambda x: x * 1.5, other["generator"])
    loss = jax.jit(partial(joint_loss, spec=spec(judge_decay=0.5, rank_loss="kl")))
    of = batch()
    _, live = loss(weights(), frozen(), of, KEY)
    _, beside = loss(weights(), frozen() | {"judge": other["generator"]}, of, KEY)
    _, alone = loss(other, frozen(), of, KEY)
    assert beside["loss/rank"] == pytest.approx(float(alone["loss/rank"]), rel=1e-5)
    assert abs(beside["loss/rank"] - live["loss/rank"]) > 1e-4 and beside["loss/answer"] == live["loss/answer"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_slow_judge_is_an_exponential_average(decay: float) -> None:
    optimizer = optax.sgd(0.5)
    step = jax.jit(make_step(spec(judge_decay=decay), optimizer))
    first = weights()
    state = init_state(first, optimizer, jax.random.PRNGKey(0), decay)
    of = {name: x for name, x in batch().items() if name != "gumbel_BxK"}
    expected = first["generator"]
    for _ in range(3):
        state, _ = step(state, frozen(), of)
        expected = jax.tree.map(lambda e, g: decay * e + (1 - decay) * g, expected, state["params"]["generator"])
    if decay == 0:
        assert "judge" not in state
        return
    jax.tree.map(lambda e, j: np.testing.assert_allclose(e, j, atol=1e-5), expected, state["judge"])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state["judge"], state["params"]["generator"])
    assert max(jax.tree.leaves(moved)) > 1e-3
