"""One test for each fault of the released PyTorch code that docs/method.md lists: this code does not have it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from runs import assert_same_weights, one_device, open_run, tiny_config
from steps import LORA, adapters, batch, frozen, one, spec, weights

from jmlr_jax.config import Config, TrainConfig
from jmlr_jax.data.batches import Prepared, assemble
from jmlr_jax.data.leakage import filter_leaks
from jmlr_jax.data.schema import InputError, Passage, Question
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.evaluation.answers import parse_answer
from jmlr_jax.method.losses import RANK_LOSSES, llm_rank_loss, rank_loss
from jmlr_jax.method.prompt import read_prompt
from jmlr_jax.method.scoring import maxsim, minmax, sample
from jmlr_jax.method.step import init_state, joint_loss
from jmlr_jax.retrieval.candidates import build_table
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.vectors import TokenVectors
from jmlr_jax.run.artifact import ArtifactError
from jmlr_jax.run.candidates import Candidates
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import trained
from jmlr_jax.training.checkpoint import Checkpoints
from jmlr_jax.training.loop import train_phase
from jmlr_jax.training.optimizer import GroupError, labels, make_optimizer, trainable_counts


def test_fault_01_each_half_trains_at_its_own_rate() -> None:
    """The two rates were exchanged and matched by a prefix no weight had, so one rate served everything."""
    params = {"retriever": {"w": jnp.ones(2)}, "generator": {"w": jnp.ones(2)}}
    rate = {"warmup_steps": 0}
    cfg = TrainConfig.model_validate(
        {"retriever": {"learning_rate": 1e-4, **rate}, "generator": {"learning_rate": 1e-2, **rate}}
    )
    optimizer = make_optimizer(cfg.retriever, cfg.generator, cfg.importance, 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["retriever"]["w"], -1e-4, rtol=1e-3)
    np.testing.assert_allclose(updates["generator"]["w"], -1e-2, rtol=1e-3)
    with pytest.raises(GroupError, match="no group"):
        labels({"model": params})
    with pytest.raises(GroupError, match="retriever and everything"):
        labels({"retriever": params["retriever"]}, {"retriever": "retriever/.*", "everything": ".*"})


def test_fault_02_with_adapters_the_whole_retriever_still_trains() -> None:
    """Putting adapters on the generator froze most of the retriever, and nothing said so."""
    params = {"generator": adapters(), "retriever": weights()["retriever"]}
    loss = partial(joint_loss, spec=spec(read=False, lora=LORA))
    still = frozen() | {"base": weights()["generator"]}
    grads = jax.jit(jax.grad(lambda p: loss(p, still, batch(), jax.random.key(0))[0]))(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads["retriever"])
        if not np.any(g)
    ]
    assert not dead
    size = sum(x.size for x in jax.tree.leaves(weights()["retriever"]))
    assert trainable_counts(params)["retriever"] == size > 0


def test_fault_03_candidates_follow_the_retriever(tiny_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Candidates were retrieved once, before training; here a refresh reads another retriever's, from its step on."""
    one_device(monkeypatch)
    mix = {"index": 4, "bm25": 0, "random": 0}
    run = open_run(tiny_data, tmp_path, train={"mix": mix})
    first = run.initial_weights()["retriever"]
    other = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), first)
    table = Candidates(run, tmp_path / "tables")
    rows = np.arange(len(table.train_NxK))
    with jax.set_mesh(run.mesh):
        table.start(0, first, rows)
        table.adopt()
        before = table.train_NxK.copy()
        table.start(4, other, rows)
        table.wait()
        assert int(table.state()["pending"]) == 4  # what a checkpoint holds names the refresh under way
        np.testing.assert_array_equal(table.train_NxK, before)  # finished, and still not adopted
        table.adopt()
    table.close()
    assert {tuple(sorted(r)) for r in table.train_NxK.tolist()} != {tuple(sorted(r)) for r in before.tolist()}
    assert table.metrics["index/staleness"] > 0


def test_fault_04_equal_scores_and_too_few_candidates() -> None:
    """All scores equal gave 0/0 and then an error in sampling; fewer candidates than M were an error too."""
    valid = jnp.array([[True] * 4, [True, False, False, False], [False] * 4])
    score = minmax(jnp.full((3, 4), 7.0), valid)
    np.testing.assert_array_equal(score, 0)
    index, taken = sample(score, valid, jax.random.gumbel(jax.random.key(0), (3, 4)), 3)
    assert taken.sum(1).tolist() == [3, 1, 0] and len(set(index[0].tolist())) == 3 and index[1, 0] == 0
    nll = jnp.where(taken, 0.5, jnp.nan)  # what stands in a slot not taken reaches neither value nor gradient
    for name in RANK_LOSSES:
        loss = rank_loss(name, 0.0)
        value, slope = jax.value_and_grad(lambda s, loss=loss: loss(s, nll, taken).sum())(jnp.zeros((3, 3)))
        assert np.isfinite(value) and np.isfinite(slope).all(), name


def test_fault_05_ties_have_no_weight_and_the_mean_is_true() -> None:
    """A tie was counted as "worse", and the sum over 45 pairs was divided by 46."""
    taken = jnp.ones((1, 10), bool)
    distinct = llm_rank_loss(jnp.zeros((1, 10)), jnp.arange(10.0)[None], taken)
    assert float(distinct[0]) == pytest.approx(np.log(2), rel=1e-6)  # of each pair, hence of their mean
    score = jnp.linspace(-1, 1, 10)[None]
    value, slope = jax.value_and_grad(lambda s: llm_rank_loss(s, jnp.ones((1, 10)), taken)[0])(score)
    assert value == 0 and not slope.any()


def test_fault_06_no_dropout_while_judging() -> None:
    """Passages were judged with dropout on: the same one was better or worse by chance."""
    params = {"generator": adapters(), "retriever": weights()["retriever"]}
    still = frozen() | {"base": weights()["generator"]}
    loss = jax.jit(partial(joint_loss, spec=spec(lora=LORA)))
    first, second = (loss(params, still, batch(), jax.random.key(seed))[1] for seed in (1, 2))
    assert first["loss/rank"] == second["loss/rank"] and first["loss/answer"] != second["loss/answer"]


def test_fault_07_every_question_of_a_batch_counts() -> None:
    """With more than one question a batch, all but the first were dropped in silence."""
    loss = jax.jit(partial(joint_loss, spec=spec()))
    whole = loss(weights(), frozen(), batch(3), jax.random.key(0))[0]
    singles = [float(loss(weights(), frozen(), one(batch(3), row), jax.random.key(0))[0]) for row in range(3)]
    assert float(whole) == pytest.approx(np.mean(singles), rel=1e-5) and np.ptp(singles) > 0.01


def test_fault_08_one_place_decides_lengths(tiny_data: Path, tmp_path: Path) -> None:
    """Prompts grew without a limit, and the index cut passages at another length than training."""
    of = {name: jnp.asarray(x) for name, x in batch(2).items()}
    of["reader_len_BxK"] = jnp.full((2, 5), 6)
    tail = of["question_len_B"]
    tokens, length, dropped = read_prompt(of, total=20, bos_id=1, pad_id=0)
    assert tokens.shape == (2, 20) and dropped.tolist() == (5 - (20 - 1 - tail) // 6).tolist()
    assert length.tolist() == (1 + tail + 6 * (5 - dropped)).tolist()
    prepared = Prepared.open(tiny_data)
    made = assemble(prepared, "train", np.array([0]), np.array([[0, 1]], np.int32))
    ids, lengths = prepared.passage_tokens(np.array([0, 1]))  # as the index encodes them
    np.testing.assert_array_equal(made["passage_ids_BxKxP"][0], ids)
    np.testing.assert_array_equal(made["passage_len_BxK"][0], lengths)
    assert ids.shape[1] == tiny_config(tmp_path).retriever.passage_length and prepared.card["lengths"]["passage"] == 40
    with pytest.raises(InputError, match="a row of 3 tokens in a table opened at 2"):
        TokenTable.of([[1, 2, 3]]).padded(np.array([0]), 2, 0)  # nowhere else is anything cut


def test_fault_09_one_generator_shape_for_training_and_use(tiny_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Inference scaled rotary positions as training never had."""
    one_device(monkeypatch)
    short = {"steps": 1, "refresh_steps": 0, "checkpoint_steps": 1, "dev_questions": 0}
    run = open_run(tiny_data, tmp_path, train=short)
    train_phase(run, PHASES["closed_book"], Console(quiet=True))
    scaled = {"llama": {"rope_scaling": {"type": "linear", "factor": 2.0}}}
    with pytest.raises(ArtifactError, match="rope_scaling"):
        trained(open_run(tiny_data, tmp_path, train=short, generator=scaled), "closed_book", "generator")


def test_fault_10_maxsim_adds_up_in_float32() -> None:
    """In half precision sums over 512 tokens lie 0.25 apart, and different passages tie."""
    q = jnp.ones((1, 512, 1), jnp.bfloat16)
    p = jnp.array([1.0, 1.0 - 2**-8], jnp.bfloat16).reshape(1, 2, 1, 1)
    score = maxsim(q, p, jnp.ones((1, 2, 1), bool))
    assert score.dtype == jnp.float32 and score.tolist() == [[512.0, 510.0]]
    q = jnp.concatenate([jnp.ones((1, 511, 1)), jnp.full((1, 1, 1), 2**-6)], axis=1).astype(jnp.float16)
    assert maxsim(q, jnp.ones((1, 1, 1, 1), jnp.float16), jnp.ones((1, 1, 1), bool)).tolist() == [[511 + 2**-6]]


def test_fault_11_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    """Resuming failed, and took the retriever from the command line instead of the checkpoint."""
    optimizer = optax.adam(0.1)
    state = init_state({"retriever": {"w": jnp.arange(3.0)}}, optimizer, jax.random.PRNGKey(5))
    updates, opt = optimizer.update(state["params"], state["opt"])
    state |= {"opt": opt, "params": optax.apply_updates(state["params"], updates), "step": jnp.array(7, jnp.int32)}
    tables = {"train": np.array([[3, 1, -1]], np.int32), "pending": np.array(4, np.int32)}
    writer = Checkpoints(tmp_path / "checkpoints", 2)
    writer.save(7, state, tables, {"data": {"next_index": 9}})
    writer.close()
    reader = Checkpoints(tmp_path / "checkpoints", 2)
    empty = jax.tree.map(jnp.zeros_like, (state, {k: jnp.asarray(v) for k, v in tables.items()}))
    found, table, notes = reader.restore(reader.latest(), empty[0], jax.tree.map(np.asarray, empty[1]))
    reader.close()
    assert_same_weights(found, state)
    assert_same_weights(table, tables)
    assert notes == {"data": {"next_index": 9}}


def test_fault_12_quoting_passages_are_filtered_unless_told_otherwise(tmp_path: Path) -> None:
    """The filter was commented out while rationales of the test answers stood in the corpus."""
    asked = " ".join(f"word{i}" for i in range(15))
    questions = {"test": [Question("t", asked, ("yes", "no"), "yes", 0)]}
    passages = [Passage("leak", "", f"It reads: {asked}, so the answer is yes."), Passage("clean", "", "Other words.")]
    kept, report = filter_leaks(passages, questions, Config(run_dir=str(tmp_path)).data.leakage_ngram)
    assert [p.id for p in kept] == ["clean"]
    assert [(o.passage_id, o.question_id) for o in report.removed] == [("leak", "t")]


def test_fault_13_answers_are_parsed_not_read_off_the_first_character() -> None:
    """The first character of the output was taken for the answer, and an empty output was an error."""
    options = ("aspirin", "heparin", "warfarin")
    assert [parse_answer(text, options) for text in ("", "  ", "A patient needs heparin.", "The answer is (C).")] == [
        None,
        None,
        1,
        2,
    ]


def test_fault_14_fewer_hits_do_not_shift_the_next_question() -> None:
    """Hits lay end to end and were cut every K: one short list misaligned all after it."""
    vectors = np.eye(3, dtype=np.float16)[:, None]
    index = ExactIndex(TokenVectors(vectors, np.ones((3, 1), bool)))
    table, _ = build_table(index.search, [np.eye(3, dtype=np.float32)[:, None]], 3, 5)
    assert table.shape == (3, 5) and table[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(table[:, 3:], -1)
    assert all(sorted(row) == [0, 1, 2] for row in table[:, :3].tolist())
