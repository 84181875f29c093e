"""From the files of a run to ``report.json``, figures and one self-contained page."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.figures import accuracy_figure, arm_name, retriever_figure, training_figure
from jmlr_jax.evaluation.seed_run import SeedRun, curves_by_metric, read_run, seed_folders
from jmlr_jax.evaluation.summary import summarise
from jmlr_jax.evaluation.trust_figures import cost_figure, reliability_figure, risk_figure
from jmlr_jax.files import local_path, replacing, write_text
from jmlr_jax.parallel import distributed

PathLike = str | os.PathLike[str]
_EXAMPLES = 12


def report(
    run_dir: PathLike,
    split: str = "test",
    *,
    out: PathLike | None = None,
    resamples: int = 2000,
    max_risk: float = 0.2,
    quiet: bool = False,
) -> Path:
    """Writes ``report.json``, ``report.html`` and the figures and prints the table of arms.

    Args:
      run_dir: a run directory, or one that holds several as ``seed_*``; it is only read where `out` is given.
      split: which evaluations, ``dev`` or ``test``.
      out: where to write, made if it is not there; the run directory if not given.
      resamples: bootstrap samples of every interval.
      max_risk: fraction of given answers that may be wrong, for the threshold of abstention.
      quiet: prints nothing.

    Returns:
      Path of ``report.html``.

    Raises:
      JmlrError: the directory does not exist.
      ArtifactError: evaluations that do not belong together: of other questions, or of weights that are gone.
    """
    root = local_path(run_dir)
    place = root if out is None else local_path(out)
    if not root.is_dir():
        raise JmlrError(f"{root}: no such run directory; `jmlr run --run-dir {root}` makes one")
    runs = [read_run(folder, folder.name, split) for folder in seed_folders(root)]
    summary = summarise(runs, resamples, split, max_risk)
    figures = {
        "accuracy.png": accuracy_figure(summary["arms"], summary.get("chance")) if summary["arms"] else None,
        "training.png": training_figure(curves_by_metric(runs)),
        "retriever.png": retriever_figure(summary["retriever"]),
        "cost.png": cost_figure(summary["arms"], summary["cost"]),
        "reliability.png": reliability_figure(summary["trust"]),
        "risk.png": risk_figure(summary["trust"]),
    }
    for name, png in figures.items():
        if png is not None:
            with replacing(place / name) as file:
                file.write(png)
    write_text(place / "report.json", json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")
    page = render(summary, runs, {name: png for name, png in figures.items() if png is not None})
    write_text(place / "report.html", page)
    if not quiet:
        _print(summary, distributed.console(out=True))
    return place / "report.html"


def render(summary: Mapping[str, Any], runs: Sequence[SeedRun], figures: Mapping[str, bytes]) -> str:
    """The page; every text that comes from data is escaped, images are part of it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jmlr_jax", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.1f}%"
    environment.filters["points"] = lambda x: "–" if x is None else f"{100 * x:+.1f}"
    environment.filters["number"] = _number
    environment.filters["arm"] = arm_name
    environment.filters["at"] = _at
    return environment.get_template("report.html").render(
        summary=summary,
        figures={name: base64.b64encode(png).decode("ascii") for name, png in figures.items()},
        kinds={kind: row["n"] for arm in summary["arms"].values() for kind, row in arm["by_kind"].items()},
        runs=runs,
        statistics=[(run.name, _flat(run.prepare)) for run in runs if run.prepare],
        examples=_examples(runs),
    )


def _examples(runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """Questions of the first seed, evenly spread over the file, with what each arm that has rows said."""
    rows = {arm: {row["id"]: row for row in found} for arm, found in runs[0].rows.items()} if runs else {}
    if not rows:
        return []
    first = next(iter(rows.values()))
    ids = list(first)[:: max(1, len(first) // _EXAMPLES)][:_EXAMPLES]
    return [{**first[id_], "said": [(arm, found[id_]) for arm, found in rows.items() if id_ in found]} for id_ in ids]


def _at(tree: Any, keys: str) -> Any:
    """What stands under dotted keys; None where there is nothing."""
    for key in keys.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested content as (dotted key, text) rows; long lists are shortened to their beginning and length."""
    if isinstance(tree, Mapping):
        return [row for key, value in tree.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(tree, list):
        shown = ", ".join(str(value) for value in tree[:5])
        return [(prefix, shown if len(tree) <= 5 else f"{shown}, … ({len(tree)} in all)")]
    return [(prefix, _number(tree) if isinstance(tree, float) else str(tree))]


def _number(x: float | None, digits: int = 3) -> str:
    if x is None:
        return "–"
    return f"{x:,.0f}" if abs(x) >= 1000 or float(x).is_integer() else f"{x:.{digits}f}"


def _plain(tree: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become null."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _print(summary: Mapping[str, Any], console: Console) -> None:
    seeds = f"{summary['seeds']} seed{'s' * (summary['seeds'] > 1)}"
    table = Table(title=f"Accuracy by arm in %, {seeds}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("arm", "accuracy", "95%", "by gen.", "unparsed", "n", "JMLR −", "p"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm, row in summary["arms"].items():
        difference = summary["differences"].get(arm)
        table.add_row(
            arm_name(arm),
            f"{100 * row['accuracy']:.1f}",
            "–" if row["low"] is None else f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
            "–" if row["generation_accuracy"] is None else f"{100 * row['generation_accuracy']:.1f}",
            str(row["unparsed"]),
            str(row["n"]),
            f"{100 * difference['mean']:+.1f}" if difference else "",
            f"{difference['p']:.3f}" if difference else "",
        )
    console.print(table)
    if summary["retriever"]:
        pairs = [f"{m} {_number(p.get('before'))} → {_number(p.get('after'))}" for m, p in summary["retriever"].items()]
        console.print("retriever before → after: " + ", ".join(pairs))
    for line in summary["missing"]:
        console.print(f"missing: {line}")
