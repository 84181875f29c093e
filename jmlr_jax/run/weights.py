"""Weights of a run on disk: what each finished phase ends with, and what another starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jmlr_jax.config import TrainConfig
from jmlr_jax.parallel.placement import own_arrays
from jmlr_jax.run.open import DataError, Run, Weights
from jmlr_jax.run.phases import Phase


def save_weights(folder: Path, weights: Any) -> None:
    """A phase's final trained weights, by which later phases, evaluation and export read it; whole or not at all."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), weights, force=True)


def load_weights(folder: Path, abstract: Any) -> Any:
    """Weights of :func:`save_weights` in the given shapes and shardings.

    Raises:
      DataError: that phase has not finished.
    """
    if not folder.exists():
        raise DataError(f"{folder}: no weights; that phase has not been trained to its end (jmlr train)")
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder.absolute(), abstract)


def phase_steps(cfg: TrainConfig, phase: Phase) -> int:
    """How many steps a phase has."""
    return cfg.warmup.steps if phase.name == "warmup" else cfg.steps


def phase_weights(run: Run, phase: Phase) -> Weights:
    """The weights a phase starts from."""
    weights = run.initial_weights()
    for part, source in (("generator", phase.generator), ("retriever", phase.retriever)):
        if source is not None and (source != "warmup" or run.cfg.train.warmup.steps):
            weights[part] = load_weights(weights_folder(run, source) / part, run.abstract((part,))[part])
    return weights


INITIAL = "initial"  # the name of the index of the retriever before any training


def retriever_of(run: Run, phase: str | None) -> object:
    """Weights of the retriever that a phase trained (None: the initial one), for this process to compute with."""
    if phase is None:
        weights = run.initial_weights()["retriever"]
    else:
        weights = load_weights(weights_folder(run, phase) / "retriever", run.abstract(("retriever",))["retriever"])
    return own_arrays(weights, run.mesh)


def weights_folder(run: Run, phase: str) -> Path:
    """Where a finished phase keeps its weights, a folder for each half it trained."""
    return run.directory / "arms" / phase / "weights"
