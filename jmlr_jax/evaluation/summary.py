"""What ``report.json`` holds: rows and summaries of one seed or several, added up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jmlr_jax.evaluation.effects import SeedRows, against, measure, probed
from jmlr_jax.evaluation.intervals import Sample, seeds_difference
from jmlr_jax.evaluation.seed_run import ARMS, SeedRun
from jmlr_jax.evaluation.trust import trust
from jmlr_jax.run.phases import chain

CLOSED_BOOK = "closed_book"


def summarise(
    runs: Sequence[SeedRun], resamples: int = 2000, split: str = "test", max_risk: float = 0.2
) -> dict[str, Any]:
    """The content of ``report.json``; intervals are 95% bootstraps over seeds and clusters of questions.

    ``arms``: for each evaluated arm ``accuracy`` (mean over seeds), ``low high``, ``n`` and ``unparsed`` (sums over
    seeds), ``generation_accuracy`` with its interval, ``nll`` and ``nll_gain`` (of reading passages over none),
    ``by_kind``, ``per_seed``. ``differences``: JMLR minus each other arm on the questions both answered, paired, with
    ``low high p``. ``effects``: arm -> what its passages did to answers, beside the closed book
    (:func:`jmlr_jax.evaluation.effects.against`) and by further readings (``probed``). ``trust``: arm ->
    :func:`jmlr_jax.evaluation.trust.trust`. ``cost``: arm -> ``flops seconds`` of training, the ``phases`` it starts
    from included. ``retriever``: metric -> ``before after``, and ``retriever_by_arm``. ``seeds``, ``split``,
    ``seconds`` (means over seeds), ``chance``, ``missing``.
    """
    missing = [line for run in runs for line in run.missing]
    arms, worlds = {}, worlds_of(runs)
    for arm in ARMS:
        seeds = [run for run in runs if arm in run.summaries or arm in run.rows]
        if seeds:
            arms[arm] = _arm(arm, seeds, worlds, resamples)
    chances = [s["chance"] for run in runs for s in run.summaries.values() if s.get("chance") is not None]
    seconds = {key: _mean(run.timing.get(key) for run in runs) for key in ("train", "total")}
    return {
        "arms": arms,
        "retriever": _retriever(runs),
        "retriever_by_arm": _mean_tree([_retrieval(run) for run in runs]),
        "seeds": len(runs),
        "split": split,
        "seconds": seconds,
        "differences": _differences(runs, worlds, resamples),
        "effects": _present({arm: _effects(arm, runs, worlds, resamples) for arm in arms}),
        "trust": _present({arm: trust(arm, runs, split, max_risk) for arm in arms}),
        "cost": _present({arm: _cost(arm, runs) for arm in arms}),
        "chance": _mean(chances),
        "missing": missing,
    }


def worlds_of(runs: Sequence[SeedRun]) -> dict[str, int]:
    """A number for each run's set of questions, by the run's name; equal where at least half of them are the same."""
    known: list[set[Any]] = []
    numbers = {}
    for run in runs:
        asked = {identity(row) for rows in run.rows.values() for row in rows}
        same = [i for i, other in enumerate(known) if 2 * len(asked & other) >= max(1, min(len(asked), len(other)))]
        numbers[run.name] = same[0] if same else len(known)
        if not same:
            known.append(asked)
    return numbers


def identity(row: Mapping[str, Any]) -> Any:
    """What makes two questions the same one."""
    return row["id"], row.get("question"), tuple(row.get("option_texts", ())), row.get("answer")


def _rows(arm: str, runs: Sequence[SeedRun], worlds: Mapping[str, int]) -> list[SeedRows]:
    return [SeedRows(run.rows[arm], worlds[run.name]) for run in runs if run.rows.get(arm)]


def _arm(arm: str, runs: Sequence[SeedRun], worlds: Mapping[str, int], resamples: int) -> dict[str, Any]:
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
    if rows:
        for prefix, key in (("", "correct"), ("generation_", "generated_correct")):
            found = measure(_rows(arm, runs, worlds), partial(_number_of, key), resamples)
            assert found is not None
            result |= {f"{prefix}low": found["low"], f"{prefix}high": found["high"]}
            result |= {"generation_accuracy": found["mean"]} if prefix else {}
        result |= {"n": len(rows), "unparsed": sum(row["parsed"] is None and row["options"] > 0 for row in rows)}
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


def _differences(runs: Sequence[SeedRun], worlds: Mapping[str, int], resamples: int) -> dict[str, dict[str, float]]:
    """JMLR minus every other arm, question by question within a seed."""
    result = {}
    for arm in ARMS[1:]:
        samples = []
        for run in runs:
            other = {row["id"]: row for row in run.rows.get(arm, [])}
            pairs = [(row, other[row["id"]]) for row in run.rows.get("jmlr", []) if row["id"] in other]
            if pairs:
                differ = [float(a["correct"]) - float(b["correct"]) for a, b in pairs]
                samples.append(Sample(differ, [a["group"] for a, _ in pairs], worlds[run.name]))
        if samples:
            count = sum(len(np.asarray(sample.values)) for sample in samples)
            result[arm] = {**seeds_difference(samples, resamples=resamples)._asdict(), "n": count}
    return result


def _present(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Without the arms of which nothing is known."""
    return {arm: part for arm, part in parts.items() if part}


def _number_of(key: str, row: Mapping[str, Any]) -> float:
    return float(row[key])


def _effects(arm: str, runs: Sequence[SeedRun], worlds: Mapping[str, int], resamples: int) -> dict[str, Any]:
    """What passages did to an arm's answers; empty where nothing of it was measured."""
    both = [run for run in runs if run.rows.get(arm) and run.rows.get(CLOSED_BOOK)]
    beside = None
    if arm != CLOSED_BOOK and both:
        beside = against(_rows(arm, both, worlds), _rows(CLOSED_BOOK, both, worlds), resamples)
    return {**(beside or {}), **probed(_rows(arm, runs, worlds), resamples)}


def _cost(arm: str, runs: Sequence[SeedRun]) -> dict[str, Any] | None:
    """Means over seeds of what training an arm took, from the first phase that it starts from."""
    found = []
    for run in runs:
        phases = [phase.name for phase in chain(arm, warmup="warmup" in run.phases)]
        costs = [run.costs.get(name) for name in phases]
        known = [cost for cost in costs if cost]
        if len(known) == len(phases):
            flops = sum(sum(cost["flops"].values()) for cost in known)
            found.append((phases, flops, sum(cost["seconds"] for cost in known)))
    if not found:
        return None
    return {"phases": found[0][0], "flops": _mean(f for _, f, _ in found), "seconds": _mean(s for *_, s in found)}


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
