"""From the files of a run to ``report.json``, figures and one self-contained page."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.figures import accuracy_figure, arm_name, retriever_figure, training_figure
from jmlr_jax.evaluation.intervals import bootstrap_interval, paired_bootstrap
from jmlr_jax.evaluation.seed_run import ARMS, SeedRun, curves_by_metric, read_run, seed_folders
from jmlr_jax.files import replacing, write_text
from jmlr_jax.parallel import distributed

PathLike = str | os.PathLike[str]
_EXAMPLES = 12


def report(run_dir: PathLike, split: str = "test", *, resamples: int = 2000, quiet: bool = False) -> epath.Path:
    """Writes ``report.json``, ``report.html`` and the figures into the run directory and prints the table of arms.

    Args:
      run_dir: a run directory, or one that holds several as ``seed_*``. Local or ``gs://``.
      split: which evaluations, ``dev`` or ``test``.
      resamples: bootstrap samples of every interval.
      quiet: prints nothing.

    Returns:
      Path of ``report.html``.

    Raises:
      JmlrError: the directory does not exist.
      ArtifactError: evaluations that do not belong together: of other questions, or of weights that are gone.
    """
    root = epath.Path(run_dir)
    if not root.is_dir():
        raise JmlrError(f"{root}: no such run directory; `jmlr run --run-dir {root}` makes one")
    runs = [read_run(folder, folder.name, split) for folder in seed_folders(root)]
    summary = summarise(runs, resamples, split)
    figures = {
        "accuracy.png": accuracy_figure(summary["arms"], summary.get("chance")) if summary["arms"] else None,
        "training.png": training_figure(curves_by_metric(runs)),
        "retriever.png": retriever_figure(summary["retriever"]),
    }
    for name, png in figures.items():
        if png is not None:
            with replacing(root / name) as file:
                file.write(png)
    write_text(root / "report.json", json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")
    page = render(summary, runs, {name: png for name, png in figures.items() if png is not None})
    write_text(root / "report.html", page)
    if not quiet:
        _print(summary, distributed.console(out=True))
    return root / "report.html"


def summarise(runs: Sequence[SeedRun], resamples: int = 2000, split: str = "test") -> dict[str, Any]:
    """The content of ``report.json``.

    ``arms``: for each evaluated arm ``accuracy`` (mean over seeds), ``low high`` (95% cluster bootstrap over the
    pooled questions), ``n`` and ``unparsed`` (sums over seeds), ``generation_accuracy`` with its interval, ``nll`` and
    ``nll_gain`` (of reading passages over none), ``by_kind``, ``per_seed``. ``differences``: JMLR minus each other arm
    on the questions both answered, paired, with ``low high p``. ``retriever``: metric -> ``before after``, and
    ``retriever_by_arm``. ``seeds``, ``split``, ``seconds`` (means over seeds), ``chance``, ``missing``.
    """
    missing = [line for run in runs for line in run.missing]
    arms = {}
    for arm in ARMS:
        seeds = [run for run in runs if arm in run.summaries or arm in run.rows]
        if seeds:
            arms[arm] = _arm(arm, seeds, resamples)
    chances = [s["chance"] for run in runs for s in run.summaries.values() if s.get("chance") is not None]
    seconds = {key: _mean(run.timing.get(key) for run in runs) for key in ("train", "total")}
    return {
        "arms": arms,
        "retriever": _retriever(runs),
        "retriever_by_arm": _mean_tree([_retrieval(run) for run in runs]),
        "seeds": len(runs),
        "split": split,
        "seconds": seconds,
        "differences": _differences(runs, resamples),
        "chance": _mean(chances),
        "missing": missing,
    }


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
    return environment.get_template("report.html").render(
        summary=summary,
        figures={name: base64.b64encode(png).decode("ascii") for name, png in figures.items()},
        kinds={kind: row["n"] for arm in summary["arms"].values() for kind, row in arm["by_kind"].items()},
        runs=runs,
        statistics=[(run.name, _flat(run.prepare)) for run in runs if run.prepare],
        examples=_examples(runs),
    )


# --- adding up -------------------------------------------------------------------------------------------------


def _arm(arm: str, runs: Sequence[SeedRun], resamples: int) -> dict[str, Any]:
    summaries = [run.summaries.get(arm, {}) for run in runs]
    rows = [row for run in runs for row in run.rows.get(arm, [])]
    per_seed = [_seed_accuracy(run, arm) for run in runs]
    result: dict[str, Any] = {
        "accuracy": _mean(per_seed),
        "low": _mean(s.get("low") for s in summaries),
        "high": _mean(s.get("high") for s in summaries),
        "n": sum(s.get("n", 0) for s in summaries),
        "unparsed": sum(s.get("generation", {}).get("unparsed", 0) for s in summaries),
        "generation_accuracy": _mean(s.get("generation", {}).get("accuracy") for s in summaries),
        "generation_low": _mean(s.get("generation", {}).get("low") for s in summaries),
        "generation_high": _mean(s.get("generation", {}).get("high") for s in summaries),
        "accuracy_sum": _mean(s.get("accuracy_sum") for s in summaries),
        "nll": _mean(s.get("nll", {}).get("with_passages") for s in summaries),
        "nll_gain": _mean(s.get("nll", {}).get("gain") for s in summaries),
        "by_kind": _kinds(rows),
        "per_seed": per_seed,
    }
    if rows:  # pooled questions: seeds share them, so one condition is one cluster over all seeds
        groups = [row["group"] for row in rows]
        for prefix, key in (("", "correct"), ("generation_", "generated_correct")):
            interval = bootstrap_interval([float(row[key]) for row in rows], groups=groups, resamples=resamples)
            result |= {f"{prefix}low": interval.low, f"{prefix}high": interval.high}
        result |= {"n": len(rows), "unparsed": sum(row["parsed"] is None and row["options"] > 0 for row in rows)}
        result["generation_accuracy"] = float(np.mean([row["generated_correct"] for row in rows]))
    return result


def _seed_accuracy(run: SeedRun, arm: str) -> float:
    if rows := run.rows.get(arm):
        return float(np.mean([row["correct"] for row in rows]))
    return float(run.summaries[arm]["accuracy"])


def _kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind") or "all", []).append(row)
    return {
        kind: {
            "n": len(members),
            "accuracy": float(np.mean([row["correct"] for row in members])),
            "generation_accuracy": float(np.mean([row["generated_correct"] for row in members])),
        }
        for kind, members in sorted(kinds.items())
    }


def _differences(runs: Sequence[SeedRun], resamples: int) -> dict[str, dict[str, float]]:
    """JMLR minus every other arm, question by question within a seed."""
    result = {}
    for arm in ARMS[1:]:
        pairs = []
        for run in runs:
            other = {row["id"]: row for row in run.rows.get(arm, [])}
            pairs += [(row, other[row["id"]]) for row in run.rows.get("jmlr", []) if row["id"] in other]
        if pairs:
            a, b = ([float(pair[i]["correct"]) for pair in pairs] for i in (0, 1))
            difference = paired_bootstrap(a, b, groups=[row["group"] for row, _ in pairs], resamples=resamples)
            result[arm] = {**difference._asdict(), "n": len(pairs)}
    return result


def _retriever(runs: Sequence[SeedRun]) -> dict[str, dict[str, float]]:
    """metric -> {before, after}, means over the seeds that have it."""
    found = {"before": [run.initial.get("retrieval") or {} for run in runs]}
    found["after"] = [_retrieval(run).get("jmlr", {}) for run in runs]
    means = {when: _mean_tree(trees) for when, trees in found.items()}
    metrics = [m for m in dict.fromkeys([*means["before"], *means["after"]]) if m != "n"]
    return {metric: {when: means[when][metric] for when in means if metric in means[when]} for metric in metrics}


def _retrieval(run: SeedRun) -> dict[str, dict[str, float]]:
    """arm -> ranking metrics of what it retrieved."""
    return {arm: found for arm, summary in run.summaries.items() if (found := summary.get("retrieval"))}


def _mean(values: Any) -> float | None:
    present = [float(v) for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(present)) if present else None


def _mean_tree(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested mappings averaged leaf by leaf over the trees that have the leaf."""
    result: dict[str, Any] = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        found = [tree[key] for tree in trees if key in tree]
        result[key] = _mean_tree(found) if isinstance(found[0], Mapping) else _mean(found)
    return result


# --- showing ---------------------------------------------------------------------------------------------------


def _examples(runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """Questions of the first seed, evenly spread over the file, with what each arm that has rows said."""
    rows = {arm: {row["id"]: row for row in found} for arm, found in runs[0].rows.items()} if runs else {}
    if not rows:
        return []
    first = next(iter(rows.values()))
    ids = list(first)[:: max(1, len(first) // _EXAMPLES)][:_EXAMPLES]
    return [{**first[id_], "said": [(arm, found[id_]) for arm, found in rows.items() if id_ in found]} for id_ in ids]


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
