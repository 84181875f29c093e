"""No gold label is read in training: with other labels, every phase ends with the very same losses and weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from runs import assert_same_weights, one_device, open_run

from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.builders import write_questions
from jmlr_jax.data.schema import SPLITS
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.run.artifact import Recipe, listed
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import load_weights
from jmlr_jax.training.loop import train_phase

pytestmark = pytest.mark.exhaustive

# All that differ in where passages come from, in an order in which each finds what it starts from.
TRAINED = ("warmup", "jmlr", "frozen", "bm25", "separate_retriever", "separate")
# Refreshes and checkpoints with dev questions fall inside; no margin, so that every judgement counts.
TRAIN = {
    "steps": 4,
    "refresh_steps": 2,
    "refresh_delay": 1,
    "checkpoint_steps": 2,
    "help_margin": 0.0,
    "probe_questions": 4,
}


def with_other_labels(data: Path, folder: Path) -> Path:
    """A copy of prepared data in which each question has the gold passages of another and no further label."""
    shutil.copytree(data, folder)
    prepared = Prepared.open(data)
    moved = {}
    for split in SPLITS:
        questions = list(prepared.questions(split))
        rows = np.roll(np.arange(len(questions)), 5)
        moved[split] = [
            dataclasses.replace(question, gold_doc_ids=questions[row].gold_doc_ids, kind="", meta={})
            for question, row in zip(questions, rows, strict=True)
        ]
        TokenTable.of([prepared.gold(split, int(row)) for row in rows]).save(folder / "tokens", f"{split}.gold")
    shutil.rmtree(folder / "questions")
    write_questions(folder, moved)
    made = Recipe.read(folder)
    assert made is not None
    made.write(files=listed(folder))  # as if it had been prepared so
    return folder


def trained(data: Path, folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, float]]]]:
    """Final weights and lines of metrics, by phase."""
    run = open_run(data, folder, train=TRAIN | {"warmup": {"steps": 3}})
    weights, metrics = {}, {}
    for name in TRAINED:
        place = train_phase(run, PHASES[name], Console(quiet=True))
        parts = sorted(part.name for part in place.iterdir())
        weights[name] = {part: load_weights(place / part, run.abstract((part,))[part]) for part in parts}
        lines = (folder / "arms" / name / "metrics.jsonl").read_text().splitlines()
        metrics[name] = [json.loads(line) for line in lines]
    return weights, metrics


def without_labels(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: x for name, x in line.items() if not name.startswith(("recall/", "judge/"))} for line in lines]


def test_other_gold_labels_change_what_is_measured_by_them_and_nothing_else(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_device(monkeypatch)
    other_data = with_other_labels(tiny_data, tmp_path / "other_labels")
    before, after = Prepared.open(tiny_data), Prepared.open(other_data)
    count = len(before.questions("train"))
    assert np.mean([set(before.gold("train", i)) & set(after.gold("train", i)) != set() for i in range(count)]) < 0.2

    weights, metrics = trained(tiny_data, tmp_path / "a")
    other_weights, other_metrics = trained(other_data, tmp_path / "b")
    for name in TRAINED:
        assert without_labels(metrics[name]) == without_labels(other_metrics[name]), name
        assert_same_weights(weights[name], other_weights[name])
    for name in ("jmlr", "separate_retriever"):  # that the labels are others is seen where they are meant to be
        assert "index/staleness" in metrics[name][-2] and metrics[name] != other_metrics[name]
