"""The loop: what each phase trains and starts from, when it stops, which checkpoint it ends with."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from runs import assert_same_weights, one_device, open_run

from jmlr_jax.hf.export import write_colbert
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.method.step import live_retriever
from jmlr_jax.nn.functional import encode_queries
from jmlr_jax.run.candidates import fixed_table
from jmlr_jax.run.open import DataError
from jmlr_jax.run.phases import PHASES, chain
from jmlr_jax.run.weights import load_weights, phase_weights, retriever_of
from jmlr_jax.training import loop as module
from jmlr_jax.training import probe
from jmlr_jax.training.loop import TrainingStopped, train_phase

# No margin: to a reader that has learned nothing every difference is small.
SHORT = {"steps": 4, "refresh_steps": 0, "checkpoint_steps": 2, "help_margin": 0.0}


@pytest.fixture
def run(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    return open_run(tiny_data, tmp_path, train=SHORT | {"warmup": {"steps": 2}})


def weights(run, phase: str, part: str):
    return load_weights(run.directory / "arms" / phase / "weights" / part, run.abstract((part,))[part])


def changed(a, b) -> bool:
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_phases_train_what_they_say_and_start_where_they_say(run):
    for name in ("warmup", "separate_retriever"):
        train_phase(run, PHASES[name], Console(quiet=True))
    start = run.initial_weights()
    assert {p.name for p in (run.directory / "arms/warmup/weights").iterdir()} == {"generator"}
    assert {p.name for p in (run.directory / "arms/separate_retriever/weights").iterdir()} == {"retriever"}
    assert changed(weights(run, "warmup", "generator"), start["generator"])
    assert changed(weights(run, "separate_retriever", "retriever"), start["retriever"])
    # The second stage of the separate arm starts from both.
    found = phase_weights(run, PHASES["separate"])
    assert not changed(found["retriever"], weights(run, "separate_retriever", "retriever"))
    assert not changed(found["generator"], weights(run, "warmup", "generator"))
    assert not changed(phase_weights(run, PHASES["jmlr"])["retriever"], start["retriever"])
    before = (run.directory / "timing.json").read_text()
    train_phase(run, PHASES["warmup"], Console(quiet=True))
    assert (run.directory / "timing.json").read_text() == before  # finished phases are left alone


@pytest.mark.exhaustive
def test_adapters_on_the_retriever(tiny_data, tmp_path, monkeypatch):
    """What the phase ends with, exported too, encodes as the adapters on their base do, and the table of words is the
    base's; the two-stage arm starts from it."""
    one_device(monkeypatch)
    run = open_run(
        tiny_data, tmp_path, train=SHORT | {"steps": 2}, retriever={"lora": {"rank": 2, "targets": ["q", "up"]}}
    )
    live, finish = {}, module.finish

    def finished(run, loop, *rest):
        assert {"layers", "whole"} == set(loop.state["params"]["retriever"])
        live.update(live_retriever(run.retriever, loop.frozen | loop.state["params"]))
        finish(run, loop, *rest)

    monkeypatch.setattr(module, "finish", finished)
    train_phase(run, PHASES["separate_retriever"], Console(quiet=True))
    start, end = run.initial_weights()["retriever"], retriever_of(run, "separate_retriever")
    assert_same_weights(end, phase_weights(run, PHASES["separate"])["retriever"])
    write_colbert(_folder(tmp_path / "out"), run.retriever, end, run.prepared.tokenizer_dir("retriever"))
    exported = load_retriever(str(tmp_path / "out"), run.cfg.retriever, jax.random.key(1))[1]
    ids, length = run.prepared.query_tokens("train", np.arange(4))
    vectors = [encode_queries(w, run.retriever, ids, length) for w in (live, end, exported, start)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[3]).max() > 1e-4
    assert not changed(end["bert"]["word"], start["bert"]["word"])
    assert not changed(end["bert"]["layers"]["v"], start["bert"]["layers"]["v"])
    assert changed(end["bert"]["layers"]["q"], start["bert"]["layers"]["q"])


def _folder(path):
    path.mkdir()
    return epath.Path(path)


def test_a_phase_whose_start_is_missing_names_it(run):
    with pytest.raises(DataError, match="arms/warmup/weights: no weights; that phase has not been trained"):
        train_phase(run, PHASES["bm25"], Console(quiet=True))


def test_chains():
    assert [p.name for p in chain("separate", warmup=False)] == ["separate_retriever", "separate"]
    assert [p.name for p in chain("jmlr", warmup=True)] == ["warmup", "jmlr"]


def test_the_dev_loss_is_of_the_drawn_questions_each_once(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    run = open_run(tiny_data, tmp_path, train={"dev_questions": 5})
    read = []

    def assembled(prepared, split, rows, table):
        read.append((split, rows, table))
        return {"loss": rows.astype(float)}

    monkeypatch.setattr(probe, "assemble", assembled)
    monkeypatch.setattr(probe, "place_batch", lambda mesh, batch, held, size: batch)
    loop = SimpleNamespace(
        candidates=None,
        dev_table=run.dev_rows[:, None],
        state={"params": None},
        frozen=None,
        dev=lambda params, frozen, batch: batch["loss"],
    )
    assert module.dev_loss(run, loop) == run.dev_rows.mean() and run.dev_rows.tolist() != list(range(5))
    for split, rows, table in read:
        assert split == "dev" and table[:, 0].tolist() == rows.tolist()


def test_fixed_phases_read_the_passages_of_the_drawn_questions(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    run = open_run(tiny_data, tmp_path, train={"dev_questions": 5, "warmup": {"steps": 0}})
    with jax.set_mesh(run.mesh):
        for phase, passages in (("bm25", run.cfg.train.read_passages), ("warmup", 1)):
            loop = module.build(run, PHASES[phase], tmp_path / phase, Console(quiet=True))
            np.testing.assert_array_equal(loop.dev_table, fixed_table(run, "bm25", "dev", passages)[run.dev_rows])


def test_the_best_checkpoint_by_dev_loss_gives_the_final_weights(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    losses = iter([0.1, 0.7])
    monkeypatch.setattr(module, "dev_loss", lambda run, loop: next(losses))
    kept = {}
    original = module.checkpoint

    def checkpoint(run, loop, checkpoints, stream, step, *rest):
        kept[step] = jax.device_get(loop.state["params"]["generator"])
        original(run, loop, checkpoints, stream, step, *rest)

    monkeypatch.setattr(module, "checkpoint", checkpoint)
    run = open_run(tiny_data, tmp_path, train=SHORT, eval={"checkpoint": "best"})
    train_phase(run, PHASES["closed_book"], Console(quiet=True))
    final = weights(run, "closed_book", "generator")
    assert not changed(final, kept[2]) and changed(final, kept[4])
    lines = [json.loads(line) for line in (tmp_path / "arms/closed_book/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["dev/loss"]) for row in lines if "dev/loss" in row] == [(2, 0.1), (4, 0.7)]


def test_updates_that_stay_not_finite_stop_the_run(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    run = open_run(tiny_data, tmp_path, train=SHORT | {"max_skipped_in_row": 2})
    broken = run.initial_weights()
    broken["generator"] = jax.tree.map(lambda x: x * np.nan, broken["generator"])
    monkeypatch.setattr(module, "phase_weights", lambda run, phase: broken)
    with pytest.raises(TrainingStopped, match="2 updates in a row had gradients that are not finite"):
        train_phase(run, PHASES["closed_book"], Console(quiet=True))
    assert not (tmp_path / "arms/closed_book/weights").exists()
