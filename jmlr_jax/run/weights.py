"""Weights of a run on disk: what each finished phase ends with, and what another starts from.

``arms/PHASE`` is one artifact: its record is written when the phase begins, and ``weights/`` appears when it ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jmlr_jax.config import TrainConfig
from jmlr_jax.errors import first_line
from jmlr_jax.parallel.distributed import from_first, on_first
from jmlr_jax.parallel.placement import local_arrays
from jmlr_jax.run.artifact import ArtifactError, Recipe, refuse
from jmlr_jax.run.checks import checksums, differing, file_sum, read_checks, write_checks
from jmlr_jax.run.open import DataError, Run, Weights
from jmlr_jax.run.phases import PHASES, Phase, chain
from jmlr_jax.run.recipes import model_recipe, phase_recipe

COST = "cost.json"  # of a phase, see `training/cost.py`
METRICS = "metrics.jsonl"  # of a phase, see `training/metrics_log.py`
INITIAL = "initial"  # the name of the index of the retriever before any training


def phase_steps(cfg: TrainConfig, phase: Phase) -> int:
    """How many steps a phase has."""
    return cfg.warmup.steps if phase.name == "warmup" else cfg.steps


def phase_folder(run: Run, phase: str) -> Path:
    """Where a phase keeps everything of its own."""
    return run.directory / "arms" / phase


def is_trained(run: Run, phase: str) -> bool:
    """Whether a phase has been trained to its end; of several processes the first looks."""
    found: bool = from_first((phase_folder(run, phase) / "weights").exists)
    return found


def begin(run: Run, phase: Phase) -> None:
    """Begins a phase, or finds that it may go on: what it was begun with is what is asked for now.

    A phase without a checkpoint has nothing to lose and begins anew.

    Raises:
      ArtifactError: it was begun or finished with other values or on other data; every difference is named.
      DataError: a path that checkpoints cannot be read back from.
    """
    folder = phase_folder(run, phase.name)
    if set(str(folder)) & set("[]*?"):
        raise DataError(
            f"{run.directory}: Orbax reads [ ] * ? in a path as a pattern, so weights kept there could not be read "
            "again; give a directory without them (--run-dir)"
        )

    def check() -> None:
        recipe, made = _recipe(run, phase), Recipe.read(folder)
        differ = None if made is None else recipe.differences(made)
        if differ == []:
            return
        steps = folder / "checkpoints"
        begun = (folder / "weights").exists() or (steps.is_dir() and any(p.name.isdecimal() for p in steps.iterdir()))
        if begun and differ is None:
            raise ArtifactError(f"{folder}: trained by an earlier version of jmlr; give the run a new directory")
        if begun:
            remedy = "give the values it was trained with, a new directory (--run-dir), or remove that folder"
            refuse(recipe, differ or [], f"{remedy} to train it again")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe.write()

    on_first(check)


def _recipe(run: Run, phase: Phase) -> Recipe:
    warm = run.cfg.train.warmup.steps > 0
    earlier = {each.name: _made(run, each.name).digest for each in chain(phase.name, warm)[:-1]}
    return phase_recipe(run.cfg, run.fingerprints, phase, earlier)


def _made(run: Run, phase: str) -> Recipe:
    """What a finished phase was made from."""
    folder = phase_folder(run, phase)
    made = Recipe.read(folder) if (folder / "weights").exists() else None
    if made is None:
        raise DataError(f"{folder}/weights: no weights; that phase has not been trained to its end (jmlr train)")
    return made


def digests(run: Run, arm: str) -> dict[str, str]:
    """Digests of the phases whose weights an arm answers with, by name.

    Raises:
      DataError: one of them has not been trained to its end.
    """
    retriever = PHASES[arm].retriever
    names = (arm, *([retriever] if retriever is not None else []))
    return {name: _made(run, name).digest for name in names}


def trained(run: Run, phase: str, half: str) -> Any:
    """``retriever`` or ``generator`` as a finished phase left it, on the mesh.

    The phase may have been trained on an earlier corpus or other questions, but model and tokenizer must be those of
    the run as it is now.

    Raises:
      DataError: the phase has not finished, or its files are damaged.
      ArtifactError: the weights are of another model, or another tokenizer's ids.
    """
    folder = phase_folder(run, phase)

    def check() -> None:
        made = _made(run, phase)
        keys, inputs = model_recipe(run.cfg, run.fingerprints, half)
        asked = Recipe(folder, keys, inputs)
        known = Recipe(folder, *({k: v for k, v in part.items() if k in now} for part, now in _pairs(made, asked)))
        refuse(asked, asked.differences(known), "give the values it was trained with, or train in a new directory")
        if read_checks(folder)["of"] != made.digest:
            raise ArtifactError(
                f"{folder}/weights: not of this phase, but of another one or another run; remove them and run "
                "`jmlr train`, which continues from the last checkpoint"
            )

    on_first(check)
    return load_weights(folder / "weights" / half, run.abstract((half,))[half])


def _pairs(made: Recipe, asked: Recipe) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    return (made.keys, asked.keys), (made.inputs, asked.inputs)


def phase_weights(run: Run, phase: Phase) -> Weights:
    """The weights a phase starts from."""
    weights = run.initial_weights()
    for half, source in (("generator", phase.generator), ("retriever", phase.retriever)):
        if source is not None and (source != "warmup" or run.cfg.train.warmup.steps):
            weights[half] = trained(run, source, half)
    return weights


def retriever_of(run: Run, phase: str | None) -> object:
    """Weights of the retriever that a phase trained (None: the initial one), for this process to compute with."""
    weights = run.initial_weights()["retriever"] if phase is None else trained(run, phase, "retriever")
    return local_arrays(weights, run.mesh)


def seal_weights(folder: Path, of: str, halves: Mapping[str, Any]) -> None:
    """Writes checksums of all that a phase ends with, before its weights take their name; every process calls it.

    Args:
      folder: of the phase.
      of: digest of its recipe.
      halves: the arrays that were saved.
    """
    sums = {name: checksums(tree) for name, tree in halves.items()}
    on_first(lambda: write_checks(folder, of, sums, file_sum(folder / METRICS)))


def save_weights(folder: Path, weights: Any) -> None:
    """A phase's final trained weights, by which later phases, evaluation and export read it; whole or not at all."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), weights, force=True)


def load_weights(folder: Path, abstract: Any) -> Any:
    """Weights of :func:`save_weights` in the given shapes and shardings.

    Raises:
      DataError: there are none, or their files are damaged.
      ArtifactError: their checksums are gone.
    """
    if not folder.exists():
        raise DataError(f"{folder}: no weights; that phase has not been trained to its end (jmlr train)")
    remedy = f"remove {folder.parent} and run `jmlr train`, which continues from the last checkpoint"
    try:
        with ocp.StandardCheckpointer() as reader:
            weights = reader.restore(folder.absolute(), abstract)
    except Exception as error:  # whatever its storage library says, as plain Exception too
        raise DataError(f"{folder}: cannot be restored ({first_line(error)}); {remedy}") from error
    saved = read_checks(folder.parent.parent)["halves"].get(folder.name, {})
    if changed := differing(weights, saved):
        raise DataError(f"{folder}: changed since it was written ({', '.join(changed[:3])}); {remedy}")
    return weights
