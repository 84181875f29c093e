"""Evaluation against one-question-at-a-time brute force on a tiny model, and the summary of its rows."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluations import brute_nll, full_logits, prompt_ids, small_setting

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LoraConfig
from jmlr_jax.evaluation import evaluate
from jmlr_jax.evaluation.evaluate import evaluate_arm, summarise_rows
from jmlr_jax.evaluation.intervals import bootstrap_interval
from jmlr_jax.evaluation.report import summarise
from jmlr_jax.evaluation.seed_run import read_run
from jmlr_jax.method.prompt import read_prompt, reading_width
from jmlr_jax.nn.functional import abstract_params, logical_axes
from jmlr_jax.nn.lora import bind, init_lora
from jmlr_jax.parallel.sharding import ShardingError, make_mesh, shardings


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return small_setting(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def result(setting):
    cfg, prepared, reader, table = setting
    before = evaluate.evaluate_batch._cache_size()
    found = evaluate_arm("jmlr", reader, prepared, "test", table, cfg)
    assert evaluate.evaluate_batch._cache_size() - before == 1  # two batches, the second filled up
    return found


def test_likelihoods_equal_brute_force(setting, result):
    _, prepared, reader, table = setting
    starts = np.load(prepared.directory / "tokens" / "test.option_starts.npy")
    for place, row in enumerate(result.rows):
        answer = prepared.tokens("test.answers").row(place).tolist()
        prompt = prompt_ids(prepared, place, table[place])
        assert row["nll"] == pytest.approx(brute_nll(reader, prompt, answer), rel=1e-4)
        bare = prompt_ids(prepared, place, [])
        assert row["nll_none"] == pytest.approx(brute_nll(reader, bare, answer), rel=1e-4)
        options = [prepared.tokens("test.options").row(i).tolist() for i in range(starts[place], starts[place + 1])]
        expected = [brute_nll(reader, prompt, option) for option in options]
        assert row["option_nll"] == pytest.approx(expected, rel=1e-4)
        if options:
            assert row["prediction"] == int(np.argmin(expected))
            sums = [nll * len(option) for nll, option in zip(expected, options, strict=True)]
            assert row["prediction_sum"] == int(np.argmin(sums))
            assert row["correct"] == (row["prediction"] == row["answer"])
            assert row["nll"] == pytest.approx(row["option_nll"][row["answer"]], rel=1e-5)
    assert result.rows[2]["nll"] == pytest.approx(result.rows[2]["nll_none"], rel=1e-5)  # nothing was retrieved for it


def test_generation_equals_greedy_choice(setting, result):
    _, prepared, reader, table = setting
    eos = prepared.generator_ids.eos
    for place in (0, 3):
        prompt, made = prompt_ids(prepared, place, table[place]), []
        while len(made) < 12 and eos not in made:
            made.append(int(jnp.argmax(full_logits(reader, prompt + made)[len(prompt) + len(made) - 1])))
        assert result.rows[place]["generated"] == reader.decode([t for t in made if t != eos]).strip()


def test_rows_say_what_was_asked_and_read(result):
    assert [row["id"] for row in result.rows] == [f"q{i}" for i in range(7)]
    assert result.rows[0]["passages"] == ["p0", "p1", "p2"] and result.rows[1]["passages"] == ["p3"]
    assert result.rows[0]["group"] == "g0" and result.rows[0]["kind"] == "even"
    free = result.rows[3]
    assert (free["options"], free["answer"], free["prediction"], free["parsed"]) == (0, -1, -1, None)
    assert free["correct"] == free["exact_match"] == free["generated_correct"]
    assert all(row["dropped"] == 0 for row in result.rows)
    assert all(len(row["option_nll"]) == row["options"] == len(row["option_texts"]) for row in result.rows)


def test_batch_size_and_sharding_do_not_matter_and_adapters_do(setting, result):
    cfg, prepared, reader, table = setting
    lora_cfg = LoraConfig(rank=2, alpha=4, targets=("q", "lm_head"))
    tree = jax.tree.map(lambda w: w + 0.5, init_lora(lora_cfg, reader.cfg, jax.random.key(1)))
    adapted = replace(reader, adapters=bind(tree, lora_cfg))
    at_once = cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"batch_size": 7})})
    single = evaluate_arm("jmlr", adapted, prepared, "test", table, at_once)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(reader.params, shardings(mesh, logical_axes(reader.cfg), abstract_params(reader.cfg)))
    sharded = evaluate_arm("jmlr", replace(adapted, params=placed), prepared, "test", table, cfg, mesh=mesh)
    for a, b, plain in zip(single.rows, sharded.rows, result.rows, strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4) and a["generated"] == b["generated"]
        assert a["option_nll"] == pytest.approx(b["option_nll"], rel=1e-4)
        assert a["nll"] != pytest.approx(plain["nll"], rel=1e-3)
    with pytest.raises(ShardingError, match="eval.batch_size=7"):
        evaluate_arm("jmlr", adapted, prepared, "test", table, at_once, mesh=mesh)


def test_a_prompt_is_as_wide_as_its_pieces_can_reach():
    batch = {"reader_ids_BxKxL": jnp.zeros((2, 3, 5), int), "question_ids_BxS": jnp.zeros((2, 7), int)}
    assert reading_width(batch, 100, 2, 1) == 1 + 3 * 5 + 7 + 2
    assert reading_width(batch, 20, 2, 1) == 20
    batch["reader_ids_BxKxL"] = batch["reader_ids_BxKxL"][:, :0]
    assert reading_width(batch, 100, 2, 1) == 1 + 7 + 2


@pytest.mark.parametrize("arm", ["jmlr", "closed_book"])
def test_padding_beyond_what_can_be_read_is_left_out_and_changes_nothing(setting, monkeypatch, arm):
    """The same batches with empty passages behind the rest, which make every row as wide as max_length. Likelihoods may
    be rounded otherwise: for a CPU, XLA compiles norms of few tokens in another way. This decoder is a sharp one."""
    cfg, prepared, reader, table = setting
    table = table if arm == "jmlr" else np.full_like(table, -1)
    batches, found = [], []

    def recorded(params, adapters, batch, **static):
        batches.append((batch, static))
        found.append(compiled(params, adapters, batch, **static))
        return found[-1]

    compiled = evaluate.evaluate_batch
    monkeypatch.setattr(evaluate, "evaluate_batch", recorded)
    evaluate_arm(arm, reader, prepared, "test", table, cfg)
    read = 3 if arm == "jmlr" else 0
    assert len(batches) == 2
    for (batch, static), narrow in zip(batches, found, strict=True):
        assert batch["reader_ids_BxKxL"].shape == (4, read, 48) and static["max_length"] == 256
        assert reading_width(batch, 256, 12, 1) == 1 + read * 48 + 64 + 12 < 256
        empty = ((0, 0), (0, 5 - read))
        wide = batch | {
            "reader_ids_BxKxL": np.pad(batch["reader_ids_BxKxL"], (*empty, (0, 0))),
            "reader_len_BxK": np.pad(batch["reader_len_BxK"], empty),
        }
        assert reading_width(wide, 256, 12, 1) == 256
        for name, value in compiled(reader.params, reader.adapters, wide, **static).items():
            rtol = 1e-4 if name == "nll" else 0
            np.testing.assert_allclose(narrow[name], value, rtol=rtol, atol=0, err_msg=name)


def test_passages_that_do_not_fit_are_dropped_worst_first():
    ids = jnp.array([[[11, 12, 13], [21, 22, 0], [31, 0, 0]], [[11, 12, 13], [21, 22, 23], [31, 0, 0]]])
    batch = {
        "reader_ids_BxKxL": ids,
        "reader_len_BxK": jnp.array([[3, 2, 1], [3, 3, 1]]),
        "question_ids_BxS": jnp.array([[7, 8], [7, 0]]),
        "question_len_B": jnp.array([2, 1]),
    }
    packed = jax.jit(read_prompt, static_argnames=("total", "bos_id", "pad_id"))
    tokens, length, dropped = packed(batch, total=8, bos_id=1, pad_id=0)
    assert tokens.tolist() == [[1, 21, 22, 11, 12, 13, 7, 8], [1, 21, 22, 23, 11, 12, 13, 7]]
    assert length.tolist() == [8, 8] and dropped.tolist() == [1, 1]
    tokens, length, dropped = packed(batch, total=4, bos_id=1, pad_id=0)  # the best does not fit: none is read
    assert tokens.tolist() == [[1, 7, 8, 0], [1, 7, 0, 0]] and dropped.tolist() == [3, 3]


def test_closed_book_gains_nothing_and_max_questions_spreads(setting):
    cfg, prepared, reader, table = setting
    cfg = cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"max_questions": 4})})
    closed = evaluate_arm("closed_book", reader, prepared, "test", np.full_like(table, -1), cfg)
    assert [row["id"] for row in closed.rows] == ["q0", "q2", "q4", "q6"]
    assert closed.summary["nll"]["gain"] == pytest.approx(0, abs=1e-5)
    assert all(row["passages"] == [] for row in closed.rows)


def test_summary_of_rows(result):
    rows, summary = result.rows, result.summary
    groups = [row["group"] for row in rows]
    expected = bootstrap_interval([float(r["correct"]) for r in rows], groups=groups, resamples=200)
    assert (summary["accuracy"], summary["low"], summary["high"]) == expected
    assert (summary["n"], summary["groups"], summary["split"]) == (7, 4, "test")
    assert summary["chance"] == pytest.approx(np.mean([1 / r["options"] for r in rows if r["options"]]))
    assert summary["generation"]["unparsed"] == sum(r["parsed"] is None for r in rows if r["options"])
    assert summary["nll"]["gain"] == pytest.approx(np.mean([r["nll_none"] - r["nll"] for r in rows]))
    assert {kind: part["n"] for kind, part in summary["by_kind"].items()} == {"even": 4, "odd": 3}
    right = [{**row, "correct": True, "parsed": 0} for row in rows]
    assert summarise_rows(right, 50)["accuracy"] == 1 and summarise_rows(right, 50)["generation"]["unparsed"] == 0


def test_saved_files_are_what_the_report_reads(result, tmp_path):
    result.save(tmp_path / "eval" / "test" / "jmlr")
    assert not list((tmp_path / "eval").rglob(".*"))
    report = summarise([read_run(Path(tmp_path), "run", "test")], resamples=200)
    arm = report["arms"]["jmlr"]
    for key in ("accuracy", "low", "high", "n"):
        assert arm[key] == pytest.approx(result.summary[key])
    assert arm["unparsed"] == result.summary["generation"]["unparsed"]
    assert arm["nll_gain"] == pytest.approx(result.summary["nll"]["gain"])


def test_a_table_of_another_split_is_refused(setting):
    cfg, prepared, reader, table = setting
    with pytest.raises(ValueError, match=r"\(6, 3\) for the 7 questions of split 'test'"):
        evaluate_arm("jmlr", reader, prepared, "test", table[:6], cfg)
