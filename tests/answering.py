"""A run that can be asked, without its training: weights are saved as a phase leaves them, then evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from runs import open_run

from jmlr_jax.commands import pipeline
from jmlr_jax.evaluation.arms import evaluate_arms
from jmlr_jax.run.artifact import Recipe
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import METRICS, begin, phase_folder, save_weights, seal_weights

ARMS = ("jmlr", "bm25", "closed_book")
SETTINGS = {"eval": {"max_questions": 8, "arms": ARMS, "max_risk": 0.6}, "train": {"read_passages": 3}}


def askable_run(data: Path, folder: Path) -> Run:
    """A run of the tiny world whose arms have weights of their own, indexes, and evaluations of dev and test."""
    run = open_run(data, folder, **SETTINGS)
    for number, arm in enumerate(ARMS):
        phase = PHASES[arm]
        begin(run, phase)
        weights, saved = run.initial_weights(), {}
        rng = np.random.default_rng(number)
        for half in ("generator", "retriever"):
            saved[half] = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(x.dtype), weights[half])  # noqa: B023
            save_weights(phase_folder(run, arm) / "weights" / half, saved[half])
        (phase_folder(run, arm) / METRICS).touch()
        seal_weights(phase_folder(run, arm), Recipe.read(phase_folder(run, arm)).digest, saved)
    pipeline.index(run)
    for split in ("test", "dev"):
        evaluate_arms(open_run(data, folder, **{**SETTINGS, "eval": {**SETTINGS["eval"], "split": split}}), ARMS)
    return run


def rows_of(folder: Path, arm: str, split: str = "test") -> list[dict[str, Any]]:
    """The evaluated questions of an arm."""
    lines = (folder / "eval" / split / arm / "questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
