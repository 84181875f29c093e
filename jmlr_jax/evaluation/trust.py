"""How far an arm's answers are to be trusted, over seeds: calibrated on dev, measured on the split of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jmlr_jax.evaluation.calibration import (
    Sure,
    calibration_error,
    fit_temperature,
    options_of,
    reliability,
    risk_coverage,
    sureness,
    threshold,
)
from jmlr_jax.evaluation.seed_run import SeedRun

POINTS = 100  # of a curve that is kept


def trust(arm: str, runs: Sequence[SeedRun], split: str, max_risk: float) -> dict[str, Any] | None:
    """What a report says of an arm's probabilities; None where it has answered no question with options.

    Every seed has a temperature and a threshold of its own, fitted on its own dev questions; the answers of all seeds
    are then taken together. Without a dev evaluation of every seed nothing is calibrated, and ``uncalibrated`` says so.

    Returns:
      ``n``, ``calibration_error`` (expected, ten bins) and ``calibration_error_raw`` (at temperature 1), ``bins``
      (``n confidence accuracy``), ``risk_coverage`` ([coverage, risk] points, the surest answers first),
      ``mean_risk`` (area under that curve), ``uncalibrated`` (why; null if calibrated), ``dev_questions``,
      ``temperature`` and ``threshold`` (a list over seeds), ``max_risk`` and ``given``: the ``coverage`` and ``risk``
      that the thresholds lead to; null where no threshold keeps the risk on dev.
    """
    seeds = [run for run in runs if any(row["options"] for row in run.rows.get(arm, ()))]
    if not seeds:
        return None
    asked = [options_of(run.rows[arm]) for run in seeds]
    raw = _together([sureness(options) for options in asked])
    dev = [options_of(run.dev.get(arm, ())) for run in seeds]
    without = [run.name for run, options in zip(seeds, dev, strict=True) if not len(options.right_N)]
    found: dict[str, Any] = {"n": len(raw.correct_N), "calibration_error_raw": calibration_error(raw)}
    if split == "dev" or without:
        why = "these are the dev questions" if split == "dev" else f"no dev evaluation of {', '.join(without)}"
        nothing = dict.fromkeys(("temperature", "threshold", "given"))
        return {**found, "uncalibrated": why, "dev_questions": 0, **nothing, "max_risk": max_risk, **_curves(raw)}
    temperatures = [fit_temperature(options) for options in dev]
    each = [sureness(options, t) for options, t in zip(asked, temperatures, strict=True)]
    on_dev = [sureness(options, t) for options, t in zip(dev, temperatures, strict=True)]
    least = [threshold(sure, max_risk) for sure in on_dev]
    return {
        **found,
        "uncalibrated": None,
        "dev_questions": sum(len(sure.correct_N) for sure in on_dev),
        "temperature": temperatures,
        "threshold": least,
        "given": _given(each, least),
        "max_risk": max_risk,
        **_curves(_together(each)),
    }


def _together(each: Sequence[Sure]) -> Sure:
    return Sure(np.concatenate([one.confidence_N for one in each]), np.concatenate([one.correct_N for one in each]))


def _curves(sure: Sure) -> dict[str, Any]:
    coverage_N, risk_N = risk_coverage(sure)
    kept = np.unique(np.linspace(0, len(risk_N) - 1, POINTS).round().astype(int))
    return {
        "calibration_error": calibration_error(sure),
        "bins": reliability(sure),
        "risk_coverage": [[float(coverage_N[i]), float(risk_N[i])] for i in kept],
        "mean_risk": float(risk_N.mean()),
    }


def _given(each: Sequence[Sure], least: Sequence[float | None]) -> dict[str, float] | None:
    """Of the answers at least so sure: what share of all they are, and how many of them are wrong."""
    given = [one.confidence_N >= (np.inf if t is None else t) for one, t in zip(each, least, strict=True)]
    answers = sum(int(g.sum()) for g in given)
    if not answers:
        return None
    wrong = sum(int((~one.correct_N[g]).sum()) for one, g in zip(each, given, strict=True))
    return {"coverage": answers / sum(map(len, given)), "risk": wrong / answers}
