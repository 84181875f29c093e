"""What the directories of a run hold for its report; what does not belong together is refused.

A run directory holds, for each phase of training, ``arms/PHASE/metrics.jsonl`` and ``speed.jsonl``; for each arm
``eval/SPLIT/ARM/summary.json`` and ``questions.jsonl`` (:mod:`jmlr_jax.evaluation.arms`), for the retriever before
training ``eval/SPLIT/initial``; besides them ``timing.json``, ``data/prepare.json`` and the configuration. A run
over several seeds holds such directories as ``seed_*``. What is not there is listed in the report under "missing";
nothing is made up for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from jmlr_jax.config import ArmName
from jmlr_jax.config_io import RESOLVED_NAME
from jmlr_jax.data.batches import CARD
from jmlr_jax.evaluation.evaluate import QUESTIONS, SUMMARY
from jmlr_jax.evaluation.figures import WARMUP, Curve
from jmlr_jax.files import read_sealed
from jmlr_jax.run.artifact import ArtifactError, Recipe, check_files, refuse
from jmlr_jax.run.checks import CHECKS, file_sum, read_checks
from jmlr_jax.run.weights import COST, INITIAL, METRICS

ARMS: tuple[str, ...] = get_args(ArmName)


@dataclass
class SeedRun:
    """What one run directory holds; absent files leave their field empty and a line in ``missing``."""

    name: str
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)  # phase -> metric -> curve
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)  # arm -> summary.json
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # arm -> questions.jsonl
    initial: dict[str, Any] = field(default_factory=dict)  # summary.json of the retriever before training
    timing: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)
    dev: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # arm -> rows that calibrate the split's
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)  # phase -> cost.json
    config: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of training that left something behind."""
        return tuple(self.curves)


def read_run(folder: Path, name: str, split: str) -> SeedRun:
    """Reads one run directory; see :class:`SeedRun`."""
    run = SeedRun(name)
    config = folder / RESOLVED_NAME
    if config.exists():
        run.config = config.read_text()
    else:
        run.missing.append(f"{name}: {RESOLVED_NAME}")
    results = folder / "eval" / split
    _check_whole(folder, split)
    _check_together(folder, split)
    run.initial = _read_json(results / INITIAL / SUMMARY, run)
    run.timing = _read_json(folder / "timing.json", run)
    run.prepare = _read_json(folder / "data" / "prepare.json", run)
    for arm in _expected_arms(run.config):
        run.summaries |= {arm: found} if (found := _read_json(results / arm / SUMMARY, run)) else {}
        run.rows |= {arm: rows} if (rows := _read_jsonl(results / arm / QUESTIONS, run)) else {}
        if split != "dev" and (folder / "eval" / "dev" / arm / QUESTIONS).exists() and _alike(folder, split, arm, run):
            run.dev |= {arm: rows} if (rows := _read_jsonl(folder / "eval" / "dev" / arm / QUESTIONS, run)) else {}
    arms = folder / "arms"
    for path in sorted(arms.iterdir()) if arms.is_dir() else ():
        if (path / COST).exists():
            run.costs |= {path.name: cost} if (cost := _read_json(path / COST, run)) else {}
        logged = [row for name in ("metrics.jsonl", "speed.jsonl") for row in _read_jsonl(path / name, run)]
        run.curves[path.name] = _curves(logged)
    return run


def _alike(folder: Path, split: str, arm: str, run: SeedRun) -> bool:
    """Whether an arm's dev evaluation is of the weights and readings of the split's; if not, it is listed."""
    made = [Recipe.read(folder / "eval" / name / arm) for name in ("dev", split)]
    parts = [{} if one is None else {**one.keys, **one.inputs} for one in made]
    # What only one of them lists belongs to a probe; probes change no answer.
    both = {name for name in parts[0].keys() & parts[1].keys() if not name.startswith("eval.")}
    if differ := [name for name in sorted(both) if parts[0][name] != parts[1][name]]:
        other = f"{', '.join(differ)} differ, so nothing is calibrated on it; run `jmlr eval eval.split=dev`"
        run.missing.append(f"{run.name}: dev/{arm} ({other})")
    return not differ


def _check_whole(folder: Path, split: str) -> None:
    """Refuses evaluations, statistics and curves that are not as they were written."""
    for name in dict.fromkeys((split, "dev")):
        for arm in (*ARMS, INITIAL):
            if Recipe.read(folder / "eval" / name / arm) is not None:
                check_files(folder / "eval" / name / arm)
    if Recipe.read(folder / "data") is not None:
        check_files(folder / "data", only=(CARD,))
    for phase in sorted(path.parent for path in folder.glob(f"arms/*/{CHECKS}")):
        if (phase / "weights").exists() and read_checks(phase)["metrics"] != file_sum(phase / METRICS):
            raise ArtifactError(
                f"{phase / METRICS}: changed since it was written; bring it back from a copy, or remove {phase} to "
                "train it again"
            )


def _check_together(folder: Path, split: str) -> None:
    """Refuses evaluations of other questions than one another, and of weights that were replaced since."""
    first: Recipe | None = None
    for arm in ARMS:
        place = folder / "eval" / split / arm
        made = Recipe.read(place)
        if made is None:
            continue
        first = first or made
        same = [Recipe(place, _chosen(each.keys), _chosen(each.inputs, split)) for each in (made, first)]
        remedy = f"evaluated otherwise than {first.folder.name}, and so not comparable; run `jmlr eval` for both arms"
        refuse(same[0], same[0].differences(same[1]), f"{place}: {remedy}")
        trained = Recipe.read(folder / "arms" / arm)
        if trained is not None and made.inputs[f"arms/{arm}"] != trained.digest:
            raise ArtifactError(f"{place}: of other weights than arms/{arm} has now; run `jmlr eval --arm {arm}`")


def _chosen(part: Mapping[str, Any], split: str = "") -> dict[str, Any]:
    """What evaluations must have in common to be compared."""
    names = ("eval.max_questions", "eval.bootstrap", "seed", "generator.max_length", f"{split} questions")
    return {name: value for name, value in part.items() if name in names}


def seed_folders(root: Path) -> list[Path]:
    """Run directories of the seeds in a directory, or itself."""
    folders = [path for path in root.iterdir() if path.name.startswith("seed_") and path.is_dir()]

    def order(path: Path) -> tuple[float, str]:
        number = path.name.removeprefix("seed_")
        return (float(number) if number.isdecimal() else math.inf, path.name)

    return sorted(folders, key=order) or [root]


def _expected_arms(config: str) -> tuple[str, ...]:
    """Arms that the run was to evaluate, all of them if its configuration does not say."""
    try:
        named = yaml.safe_load(config)["eval"]["arms"]
    except (yaml.YAMLError, TypeError, KeyError):
        return ARMS
    return tuple(arm for arm in ARMS if arm in named)


def _read_json(path: Path, run: SeedRun) -> dict[str, Any]:
    place = f"{run.name}: {path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "sha256" in content:
            content = read_sealed(path)
    except FileNotFoundError:
        run.missing.append(place)
    except (ValueError, RecursionError) as error:
        run.missing.append(f"{place} (not readable: {error})")
    else:
        if isinstance(content, dict):
            return content
        run.missing.append(f"{place} (expected an object, got {type(content).__name__})")
    return {}


def _read_jsonl(path: Path, run: SeedRun) -> list[dict[str, Any]]:
    place = f"{run.name}: {path.parent.name}/{path.name}"
    try:
        # At newlines alone: answers may hold U+2028, at which splitlines() cuts.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        run.missing.append(place)
        return []
    rows = []
    broken = 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a run stopped in the middle of a line
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        run.missing.append(f"{place} ({broken} unreadable line{'s' * (broken > 1)} left out)")
    return rows


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Metric -> curve; a step logged twice (resumed training) counts as logged last."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for metric, value in row.items():
            if metric != "step" and isinstance(value, int | float) and isinstance(row.get("step"), int):
                points.setdefault(metric, {})[row["step"]] = float(value)
    return {metric: sorted(by_step.items()) for metric, by_step in points.items()}


def curves_by_metric(runs: Sequence[SeedRun]) -> dict[str, dict[str, list[Curve]]]:
    """Metric -> phase -> a curve of each seed; the warm-up reads something else than the arms and stands apart."""
    by_metric: dict[str, dict[str, list[Curve]]] = {}
    for run in runs:
        for phase, curves in run.curves.items():
            for metric, curve in curves.items():
                name = f"{WARMUP}/{metric}" if phase == WARMUP else metric
                by_metric.setdefault(name, {}).setdefault(phase, []).append(curve)
    return by_metric
