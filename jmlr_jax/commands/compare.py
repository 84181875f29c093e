"""``jmlr compare RUN OTHER``: how much better each arm of one run answers than the same arm of another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.figures import arm_name
from jmlr_jax.evaluation.intervals import Sample, seeds_difference
from jmlr_jax.evaluation.seed_run import ARMS, SeedRun, read_run, seed_folders
from jmlr_jax.evaluation.summary import identity, worlds_of
from jmlr_jax.files import local_path, write_text
from jmlr_jax.parallel import distributed

Pair = tuple[SeedRun, SeedRun]
RESAMPLES = 2000


class NotComparable(JmlrError):
    """Two runs that were not asked the same questions, or not on the same split."""


def run(one: str, other: str, split: str, json_path: str | None) -> None:
    """Prints a table of the differences, and writes them as JSON if asked to.

    Raises:
      NotComparable: the reason, and what would mend it.
      ArtifactError: evaluations of one run that do not belong together.
    """
    found = compare(one, other, split)
    console = distributed.console(out=True)
    table = Table(title=f"{one} − {other}, {split}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("arm", "first", "second", "difference", "95%", "p", "questions"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm, row in found["arms"].items():
        points = [f"{100 * row[name]:+.1f}" for name in ("mean", "low", "high")]
        first, second = (f"{100 * row[name]:.1f}" for name in ("first", "second"))
        asked = f"{row['n']} of {row['asked'][0]}, {row['asked'][1]}"
        table.add_row(arm_name(arm), first, second, points[0], f"{points[1]} to {points[2]}", f"{row['p']:.4f}", asked)
    console.print(table)
    if json_path is not None:
        write_text(json_path, json.dumps(found, indent=1) + "\n")


def compare(one: str, other: str, split: str) -> dict[str, Any]:
    """Paired differences on the questions that both runs answered, seed by seed.

    Returns:
      ``split``, ``seeds`` (pairs of names) and ``arms``: for each arm that both evaluated ``first second`` (accuracy by
      option likelihood), ``mean low high p`` of first minus second, ``n`` questions in common over all seeds, and
      ``asked``, how many either run answered.

    Raises:
      NotComparable, ArtifactError: see :func:`run`.
    """
    pairs = _pairs(one, other, split)
    arms = [arm for arm in ARMS if all(arm in a.rows and arm in b.rows for a, b in pairs)]
    if not arms:
        have = [sorted({arm for pair in pairs for arm in pair[i].rows}) for i in (0, 1)]
        raise NotComparable(
            f"no arm of {one} ({', '.join(have[0]) or 'none'}) and {other} ({', '.join(have[1]) or 'none'}) was "
            f"evaluated on {split} in both; run `jmlr eval eval.split={split}` there, or give another --split"
        )
    return {
        "split": split,
        "seeds": [[a.name, b.name] for a, b in pairs],
        "arms": {arm: _difference(arm, pairs) for arm in arms},
    }


def _pairs(one: str, other: str, split: str) -> list[Pair]:
    """Seeds of the two runs, by name; of runs with a seed each, these."""
    sides: list[dict[str, SeedRun]] = []
    for root in map(local_path, (one, other)):
        if not root.is_dir():
            raise NotComparable(f"{root}: no such run directory")
        sides.append({folder.name: read_run(folder, folder.name, split) for folder in seed_folders(root)})
    if all(len(side) == 1 for side in sides):
        ((a,), (b,)) = (side.values() for side in sides)
        return [(a, b)]
    names = [name for name in sides[0] if name in sides[1]]
    if not names:
        shown = [", ".join(side) for side in sides]
        raise NotComparable(
            f"{one} has {shown[0]}, {other} has {shown[1]}: no seed in common; name two of these folders"
        )
    return [(sides[0][name], sides[1][name]) for name in names]


def _difference(arm: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    worlds = worlds_of([a for a, _ in pairs])
    samples, accuracies, asked = [], [], [0, 0]
    for a, b in pairs:
        both = _common(arm, a, b)
        right = np.array([[float(row["correct"]) for row in pair] for pair in both])
        groups = [row["group"] for row, _ in both]
        samples.append(Sample(right[:, 0] - right[:, 1], groups, worlds[a.name]))
        accuracies.append(right.mean(axis=0))
        asked = [n + len(run.rows[arm]) for n, run in zip(asked, (a, b), strict=True)]
    first, second = np.mean(accuracies, axis=0)
    found = seeds_difference(samples, resamples=RESAMPLES)._asdict()
    count = sum(len(np.asarray(sample.values)) for sample in samples)
    return {"first": float(first), "second": float(second), **found, "n": count, "asked": asked}


def _common(arm: str, one: SeedRun, other: SeedRun) -> Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Rows of the questions that both answered; the same id must be the same question."""
    known = {row["id"]: row for row in other.rows[arm]}
    both = [(row, known[row["id"]]) for row in one.rows[arm] if row["id"] in known]
    for a, b in both:
        if identity(a) != identity(b):
            raise NotComparable(
                f"question {a['id']} of {arm} is not the same in {one.name} and {other.name}: text, options or right "
                "answer differ; compare runs on the same questions (and of the embedded world the same seed)"
            )
    if not both:
        raise NotComparable(f"{arm}: {one.name} and {other.name} have no question in common; their ids are others")
    return both
