"""The joint step against the method computed question by question, and what the compiled step promises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import ENCODER_LORA, LORA, RETRIEVER, M, adapters, batch, frozen, one, slow_loss, spec, weights

from jmlr_jax.config import MeshConfig, OptimizerConfig
from jmlr_jax.method.step import (
    StepSpec,
    answer_losses,
    choose,
    init_state,
    joint_loss,
    judge,
    live_retriever,
    make_step,
    passages_to_read,
    reading_prompt,
)
from jmlr_jax.nn import functional as F
from jmlr_jax.nn import lora
from jmlr_jax.parallel import sharding
from jmlr_jax.training.optimizer import make_optimizer, state_shardings

KEY = jax.random.key(0)
RATES = OptimizerConfig(learning_rate=1e-3), OptimizerConfig(learning_rate=3e-4)  # retriever, generator


def losses(made: StepSpec) -> Any:
    """Compiled ``(params, frozen, batch, dropout key) -> ((loss, metrics), gradients)``."""
    return jax.jit(jax.value_and_grad(partial(joint_loss, spec=made), has_aux=True))


@pytest.fixture(scope="module")
def plain() -> Any:
    return losses(spec())


def without_noise(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x for name, x in of.items() if name != "gumbel_BxK"}


def fresh(params: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """A state of its own, to be given away."""
    start = jax.jit(partial(init_state, optimizer=optimizer))  # compiled: no two counters share a buffer
    return start(jax.tree.map(jnp.copy, params), key=jax.random.PRNGKey(0))


def close(a: Any, b: Any, atol: float) -> None:
    jax.tree_util.tree_map_with_path(
        lambda path, x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-3, err_msg=jax.tree_util.keystr(path)),
        a,
        b,
    )


def size(tree: Any) -> float:
    return float(optax.tree.norm(tree))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        {"help_margin": 0.3, "max_length": 13, "rank_weight": 0.5},
    ],
)
def test_loss_equals_the_question_by_question_reference(settings: dict[str, Any]) -> None:
    """Fault 7 with it: the batch's loss is the mean over all its questions. The margin and the room both bite."""
    made, halves, of = spec(**settings), weights(), batch()
    slow = [slow_loss(made, halves, of, row) for row in range(4)]
    (loss, metrics), _ = losses(made)(halves, frozen(), of, KEY)
    rank, answer = np.mean([s["rank"] for s in slow]), np.mean([s["answer"] for s in slow])
    assert metrics["loss/rank"] == pytest.approx(rank, rel=1e-4)
    assert metrics["loss/answer"] == pytest.approx(answer, rel=1e-4)
    assert loss == pytest.approx(answer + made.rank_weight * rank, rel=1e-4)
    assert metrics["prompt/dropped"] == sum(s["dropped"] for s in slow)
    counted = [slow_loss(spec(), halves, of, row)["pairs"] for row in range(4)]
    if settings:
        assert 0 < sum(s["pairs"] for s in slow) < sum(counted) and metrics["prompt/dropped"] > 0
    else:
        assert rank > 0 and metrics["prompt/dropped"] == 0


def test_batch_gradient_is_the_mean_of_single_ones(plain: Any) -> None:
    halves, of = weights(), batch()
    (loss, _), grads = plain(halves, frozen(), of, KEY)
    singles = [plain(halves, frozen(), one(of, row), KEY) for row in range(4)]
    assert loss == pytest.approx(np.mean([s[0][0] for s in singles]), rel=1e-5)
    close(grads, jax.tree.map(lambda *g: sum(g) / 4, *[s[1] for s in singles]), atol=1e-5)


def test_each_loss_teaches_its_own_half_only() -> None:
    """With the KL loss, through which a judgement could have a gradient; LLM-Rank only compares judgements."""

    def parts(params: Any) -> jax.Array:
        _, metrics = joint_loss(params, frozen(), batch(), KEY, spec=spec(rank_loss="kl"))
        return jnp.stack([metrics["loss/rank"], metrics["loss/answer"]])

    rank, answer = jax.jit(lambda params: [jax.vjp(parts, params)[1](row)[0] for row in jnp.eye(2)])(weights())
    assert size(rank["retriever"]) > 1e-3 and size(rank["generator"]) == 0
    assert size(answer["generator"]) > 1e-3 and size(answer["retriever"]) == 0


def test_what_stands_at_a_missing_candidate_changes_nothing(plain: Any) -> None:
    of = batch()
    assert not of["valid_BxK"].all()
    of["valid_BxK"][3] = False  # a question without any candidate
    other = dict(of)
    for name in ("passage_ids_BxKxP", "reader_ids_BxKxL"):
        other[name] = np.where(of["valid_BxK"][..., None], of[name], 9).astype(np.int32)
    for name in ("passage_len_BxK", "reader_len_BxK"):
        other[name] = np.where(of["valid_BxK"], of[name], 4).astype(np.int32)
    other["gumbel_BxK"] = np.where(of["valid_BxK"], of["gumbel_BxK"], 50).astype(np.float32)
    (loss, metrics), grads = plain(weights(), frozen(), of, KEY)
    (loss_other, metrics_other), _ = plain(weights(), frozen(), other, KEY)
    assert np.isfinite(loss) and np.isfinite(size(grads))
    assert loss == loss_other and {k: float(v) for k, v in metrics.items()} == {
        k: float(v) for k, v in metrics_other.items()
    }


def test_best_passages_are_read_and_without_scores_the_first() -> None:
    of = {k: jnp.asarray(v) for k, v in batch().items()}
    of["valid_BxK"] = jnp.ones_like(of["valid_BxK"])
    of["reader_ids_BxKxL"] = jnp.broadcast_to(jnp.arange(5)[None, :, None], of["reader_ids_BxKxL"].shape)
    score = jnp.array([[0.0, 1.0, -1.0, 0.5, 0.2]] * 4)
    assert passages_to_read(spec(), of, score)["reader_ids_BxKxL"][0, :, 0].tolist() == [1, 3]
    assert passages_to_read(spec(), of, None)["reader_ids_BxKxL"][0, :, 0].tolist() == [0, 1]


# ---------------------------------------------------------------- adapters


def test_judging_has_no_dropout_and_training_has_it() -> None:
    """Fault 6."""
    made = spec(lora=LORA)
    params = {"generator": adapters(), "retriever": weights()["retriever"]}
    still = frozen() | {"base": weights()["generator"]}
    f = losses(made)
    (_, first), _ = f(params, still, batch(), jax.random.key(1))
    (_, second), _ = f(params, still, batch(), jax.random.key(2))
    assert first["loss/rank"] == second["loss/rank"] > 0
    assert abs(first["loss/answer"] - second["loss/answer"]) > 1e-4
    without = spec(lora=LORA.model_copy(update={"dropout": 0.0}))
    _, never = jax.jit(partial(joint_loss, spec=without))(params, still, batch(), KEY)
    assert first["loss/rank"] == pytest.approx(float(never["loss/rank"]), rel=1e-5)  # nor the same one every time


def test_judging_adds_the_adapters_to_the_base_as_reading_does() -> None:
    of = {k: jnp.asarray(v) for k, v in batch().items() if k != "gumbel_BxK"}
    index, taken = jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), bool)
    having = frozen() | {"base": weights()["generator"], "generator": adapters()}
    nll_Bx1 = jax.jit(partial(judge, spec(lora=LORA)))(having, of, index, taken)
    alone = jax.jit(choose)(of, index, taken)
    made = spec(lora=LORA)
    nll_B = jax.jit(lambda w, b: answer_losses(made, w, b, reading_prompt(made, b), None))(having, alone)
    np.testing.assert_allclose(nll_Bx1[:, 0], nll_B, rtol=1e-5)
    bare = jax.jit(partial(judge, spec()))({"generator": weights()["generator"]}, of, index, taken)
    assert np.abs(nll_Bx1 - bare).min() > 1e-3


def test_adapters_train_and_their_base_does_not() -> None:
    params = {"generator": adapters(), "retriever": weights()["retriever"]}
    still = frozen() | {"base": weights()["generator"]}
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(spec(lora=LORA), optimizer), donate_argnums=0)
    state, metrics = step(fresh(params, optimizer), still, without_noise(batch()))
    assert jax.tree.structure(state["params"]) == jax.tree.structure(params) and "base" not in state["params"]
    for name in ("q", "down"):
        for side in "ab":
            moved = state["params"]["generator"]["layers"][name][side] - params["generator"]["layers"][name][side]
            assert size(moved) > 1e-5, (name, side)
    close(still["base"], weights()["generator"], atol=0)
    assert set(metrics) >= {"grad_norm/generator", "grad_norm/retriever"}


@pytest.mark.exhaustive
def test_the_retrievers_adapters_train_and_their_base_does_not() -> None:
    """At first the step is that of the base; then each adapter moves, the projection too, and nothing else: the plain
    weights that they make have the same loss."""
    halves = weights()
    made = replace(spec(), retriever=RETRIEVER.model_copy(update={"lora": ENCODER_LORA}))
    params = halves | {"retriever": lora.init_lora(ENCODER_LORA, RETRIEVER, KEY)}
    still = frozen() | {"retriever_base": halves["retriever"]}
    (begun, _), _ = losses(made)(params, still, batch(), KEY)
    assert float(begun) == pytest.approx(float(losses(spec())(halves, frozen(), batch(), KEY)[0][0]), rel=1e-6)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(made, optimizer), donate_argnums=0)
    state = fresh(params, optimizer)
    for _ in range(2):  # b is zero at first, and a has no gradient
        state, metrics = step(state, still, without_noise(batch()))
    moved = jax.tree.map(lambda new, old: new - old, state["params"]["retriever"], params["retriever"])
    for path, change in jax.tree_util.tree_leaves_with_path(moved):
        assert size(change) > 1e-5, jax.tree_util.keystr(path)
    assert set(moved["layers"]) == {"q", "o", "down"} and set(moved["whole"]) - {"layers"} == {"projection"}
    close(still["retriever_base"], weights()["retriever"], atol=0)
    assert float(metrics["grad_norm/retriever"]) > 0
    (trained, _), _ = losses(made)(state["params"], still, batch(), KEY)
    plain = state["params"] | {"retriever": live_retriever(made.retriever, still | state["params"])}
    (same, _), _ = losses(spec())(plain, frozen(), batch(), KEY)
    assert float(trained) == pytest.approx(float(same), rel=1e-6) and abs(float(trained) - float(begun)) > 1e-3


# ---------------------------------------------------------------- the compiled step


@pytest.mark.exhaustive
def test_accumulation_equals_the_full_batch() -> None:
    """Plain descent, so that the difference of the weights is the gradient; the questions differ in every length."""
    optimizer, of, results = optax.sgd(1.0), without_noise(batch()), {}
    for pieces in (1, 2, 4):
        step = jax.jit(make_step(spec(accumulate=pieces), optimizer), donate_argnums=0)
        results[pieces] = step(fresh(weights(), optimizer), frozen(), of)
    whole, metrics = results[1]
    assert size(jax.tree.map(jnp.subtract, whole["params"], weights())) > 1e-2
    for pieces in (2, 4):
        close(results[pieces][0]["params"], whole["params"], atol=1e-5)
        for name in metrics.keys() - {"rank/pair_accuracy"}:  # pooled over pairs, so it depends on the pieces
            assert float(results[pieces][1][name]) == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6), name


def test_non_finite_gradients_change_nothing_but_the_counters() -> None:
    made = spec(rank=False)
    optimizer = make_optimizer(*RATES, RATES[0], 10)
    step = jax.jit(make_step(made, optimizer))
    params = {"generator": weights()["generator"]}
    good, of = fresh(params, optimizer), without_noise(batch())
    good, _ = step(good, frozen(), of)
    broken = good | {"params": jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), good["params"])}
    for row in (1, 2):
        before = broken
        broken, metrics = step(broken, frozen(), of)
        assert (metrics["skipped"], metrics["skipped_in_row"]) == (row, row) and not np.isfinite(
            metrics["grad_norm/generator"]
        )
        close([broken["params"], broken["opt"]], [before["params"], before["opt"]], atol=0)
        assert broken["step"] == before["step"] + 1
    healed, metrics = step(broken | {"params": good["params"]}, frozen(), of)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 0)
    assert size(jax.tree.map(jnp.subtract, healed["params"], good["params"])) > 0


def test_on_eight_devices_it_compiles_once_donates_and_equals_one_device() -> None:
    made, halves, mesh = spec(accumulate=1), weights(), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(*RATES, RATES[0], 10)
    batches = [without_noise(batch(8, seed)) for seed in range(3)]
    single, alone = fresh(halves, optimizer), []
    step = jax.jit(make_step(made, optimizer), donate_argnums=0)
    for of in batches:
        single, metrics = step(single, frozen(), of)
        alone.append(metrics)

    replicated = jax.NamedSharding(mesh, jax.P())
    axes = {"generator": F.logical_axes(made.llama), "retriever": F.logical_axes(made.retriever)}
    placed = dict.fromkeys(("step", "key", "skipped", "skipped_in_row"), replicated)
    placed["params"] = sharding.shardings(mesh, axes, halves)
    placed["opt"] = state_shardings(optimizer, halves, placed["params"], replicated)
    with jax.set_mesh(mesh):
        state = jax.device_put(fresh(halves, optimizer), placed)
        step = jax.jit(make_step(made, optimizer), donate_argnums=0, out_shardings=(placed, None))
        for of, expected in zip(batches, alone, strict=True):
            given = state
            state, metrics = step(given, frozen(), jax.device_put(of, sharding.batch_sharding(mesh)))
            assert given["params"]["generator"]["embed"].is_deleted()
            assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
                {k: float(v) for k, v in expected.items()}, rel=2e-3, abs=1e-5
            )
        assert step._cache_size() == 1
    moments = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim > 1]
    assert any(not leaf.sharding.is_fully_replicated for leaf in moments)
    # Adam turns the rounding noise of a bias that softmax ignores into steps; everything else agrees.
    for tree in (single, state):
        tree["params"]["retriever"]["bert"]["layers"].pop("k_bias")
    close(jax.device_get(state["params"]), single["params"], atol=1e-4)


def test_judging_in_int8_changes_the_judgements_a_little_and_nothing_else() -> None:
    """Reading and its gradients are the same to the bit, the retriever's are near; packed judging rounds the same."""
    of, params, still = batch(8), weights() | {"generator": adapters()}, frozen() | {"base": weights()["generator"]}

    def made(**settings: Any) -> StepSpec:
        return spec(lora=LORA, rank_loss="kl", **settings)

    (_, plain), gradients = losses(made())(params, still, of, KEY)
    (_, rounded), others = losses(made(judge_int8=True))(params, still, of, KEY)
    assert rounded["loss/answer"] == plain["loss/answer"]
    close(others["generator"], gradients["generator"], atol=0)
    assert rounded["loss/rank"] != plain["loss/rank"]
    assert float(rounded["loss/rank"]) == pytest.approx(float(plain["loss/rank"]), rel=0.2)
    taken = jnp.ones((8, M), bool)
    arguments = still | params, of, jnp.tile(jnp.arange(M), (8, 1)), taken
    one, other, packed = (
        np.asarray(jax.jit(partial(judge, made(**settings)))(*arguments))
        for settings in ({}, {"judge_int8": True}, {"judge_int8": True, "pack": (0.9,)})
    )
    assert 1e-4 < np.abs(one - other).max() < 0.2 * np.abs(one).max()
    np.testing.assert_allclose(packed, other, rtol=1e-4)


# ---------------------------------------------------------------- no label of a passage


def test_judgements_are_of_the_sampled_passages_alone() -> None:
    """A judgement depends on its own passage, not on what else was sampled, and on the question and answer alone."""
    of = {k: jnp.asarray(v) for k, v in batch().items() if k != "gumbel_BxK"}
    index, taken = jnp.tile(jnp.array([0, 1, 0]), (4, 1)), jnp.ones((4, M), bool)
    f = jax.jit(partial(judge, spec()))
    nll = f(frozen() | weights(), of, index, taken)
    np.testing.assert_allclose(nll[:, 0], nll[:, 2], rtol=1e-5)
    assert np.abs(nll[:, 0] - nll[:, 1]).min() > 1e-5
    swapped = f(frozen() | weights(), of, index[:, ::-1] * 0 + jnp.array([1, 0, 1]), taken)
    np.testing.assert_allclose(swapped[:, 1], nll[:, 0], rtol=1e-5)


def test_a_step_reads_these_arrays_and_no_label_of_a_passage(tiny_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are made although every way to the gold rows is barred, and they hold what the step names, no more."""
    from jmlr_jax.data.batches import Prepared, assemble

    prepared, tokens = Prepared.open(tiny_data), Prepared.tokens
    assert any(len(prepared.gold("train", row)) for row in range(4))

    def barred(self: Prepared, name: str) -> Any:
        assert not name.endswith(".gold"), "training reads gold passages"
        return tokens(self, name)

    monkeypatch.setattr(Prepared, "tokens", barred)
    with pytest.raises(AssertionError, match="training reads gold"):
        prepared.gold("train", 0)
    made = assemble(prepared, "train", np.arange(4), np.array([[0, 1, 2, -1, -1]] * 4, np.int32))
    assert made.keys() == without_noise(batch()).keys()
