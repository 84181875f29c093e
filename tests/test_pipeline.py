"""`jmlr run` in miniature: all arms end to end, what it leaves behind, and that a second call does nothing."""

import json
import re
import shutil

import pytest
from runs import tiny_config

from jmlr_jax.commands import pipeline
from jmlr_jax.run import index as tables
from jmlr_jax.run.artifact import ArtifactError
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import retriever_of
from jmlr_jax.training import loop as train

ARMS = ["jmlr", "frozen", "separate", "bm25", "random", "closed_book"]
SHORT = {
    "steps": 4,
    "refresh_steps": 2,
    "refresh_delay": 1,
    "checkpoint_steps": 4,
    "dev_questions": 0,
    "warmup": {"steps": 2},
}


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory, patch):
    """The directory of a finished run of one seed."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_data, root / "seed_0" / "data")
    pipeline.run_all(tiny_config(root, train=SHORT), seeds=1)
    return root


def test_the_report_has_the_agreed_form(finished):
    found = json.loads((finished / "report.json").read_text())
    assert list(found["arms"]) == ARMS
    for arm in found["arms"].values():
        assert {"accuracy", "low", "high", "n", "unparsed"} <= set(arm)
        assert arm["low"] <= arm["accuracy"] <= arm["high"] and arm["n"] == 4 and 0 <= arm["unparsed"] <= 4
    assert set(found["retriever"]["hit@1"]) == {"before", "after"}
    assert found["seeds"] == 1 and found["missing"] == []
    assert set(found["seconds"]) == {"train", "total"} and 0 < found["seconds"]["train"] < found["seconds"]["total"]


def test_pictures_and_a_page_of_its_own(finished):
    for name in ("accuracy.png", "training.png", "retriever.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    # Pictures are taken out first: base64 spells any four letters sooner or later.
    text, pictures = re.subn(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", page)
    assert pictures == 6 and "http" not in text.split("<body")[1]


def test_every_arm_gave_the_generator_as_many_updates(finished):
    for arm in ARMS:
        lines = (finished / "seed_0" / "arms" / arm / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [row["step"] for row in steps] == [1, 2, 3, 4], arm
        assert all(row["grad_norm/generator"] > 0 for row in steps), arm


def test_saved_indexes_are_opened_and_not_built_again(finished, patch):
    assert {p.name for p in (finished / "seed_0" / "index").iterdir()} == {"initial", "jmlr", "separate_retriever"}
    cfg = tiny_config(finished / "seed_0", train=SHORT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tables, "encode_passages_batched", lambda *a, **k: pytest.fail("built again"))
        run = Run.open(cfg)
        index = tables.retriever_index(run, retriever_of(run, "jmlr"))
    assert len(index) == len(run.prepared.passages)


def test_a_second_call_trains_and_builds_nothing(finished, patch):
    before = json.loads((finished / "report.json").read_text())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tables, "encode_passages_batched", lambda *a, **k: pytest.fail("built again"))
        monkeypatch.setattr(train, "MetricsLog", lambda *a: pytest.fail("trained again"))
        pipeline.run_all(tiny_config(finished, train=SHORT), seeds=1)
    after = json.loads((finished / "report.json").read_text())
    for key in ("arms", "differences", "retriever"):
        assert after[key] == before[key]


def test_training_otherwise_is_refused_by_the_name_of_the_key(finished, patch):
    run = Run.open(tiny_config(finished / "seed_0", train=SHORT | {"sampled": 2}))
    with pytest.raises(ArtifactError, match="train.sampled was 3, now 2"):
        pipeline.train(run, "jmlr")


def test_training_does_not_look_at_gold_passages(finished, tmp_path, patch):
    """Recall is measured with them, nothing else: batches are the same without."""
    shutil.copytree(finished / "seed_0" / "data", tmp_path / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Run, "gold", lambda self, split: [[] for _ in self.prepared.questions(split)])
        pipeline.train(Run.open(tiny_config(tmp_path, train=SHORT)), "jmlr")
    name = "arms/jmlr/metrics.jsonl"
    rows = [[json.loads(x) for x in (d / name).read_text().splitlines()] for d in (tmp_path, finished / "seed_0")]
    blind, seeing = ([{k: v for k, v in row.items() if not k.startswith("recall/")} for row in r] for r in rows)
    assert blind == seeing and "recall/top1" in rows[1][0] and "recall/top1" not in rows[0][0]
