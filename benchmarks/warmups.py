"""The jointly trained retriever beside the separately trained one, over lengths of the warm-up, at equal FLOPs.

    python benchmarks/warmups.py FOLDER [--warmups 400 800 1500 3000] [--seeds 3] [--config FILE] [key=value ...]

For each length FOLDER/warmup_N gets one `jmlr run` of the arms `jmlr` and `separate`, which goes on where it stopped.
Both begin with the same warm-up and train either half for the same number of steps, so that their FLOPs are about
equal; what they were is told. The result is printed, and lies in FOLDER (``warmups.json``, ``warmups.png``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from jmlr_jax.cli import main as jmlr

ARMS = {"jmlr": "JMLR", "separate": "separately trained"}


def row(run: Path, warmup: int) -> dict[str, Any]:
    """What a finished run says of both arms."""
    report = json.loads((run / "report.json").read_text())
    found: dict[str, Any] = {"warmup": warmup, "difference": report["differences"]["separate"]}
    for arm in ARMS:
        accuracy, cost = report["arms"][arm], report["cost"][arm]
        found[arm] = {name: accuracy[name] for name in ("accuracy", "low", "high", "n")}
        found[arm] |= {"tflop": cost["flops"] / 1e12, "seconds": cost["seconds"]}
        found[arm] |= {"retriever": report["retriever_by_arm"][arm]}
    return found


def drawn(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy over FLOPs, a point for each warm-up."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, label in ARMS.items():
        x, y = [one[arm]["tflop"] for one in rows], [100 * one[arm]["accuracy"] for one in rows]
        around = [[100 * abs(one[arm][side] - one[arm]["accuracy"]) for one in rows] for side in ("low", "high")]
        axes.errorbar(x, y, yerr=around, marker="o", capsize=3, label=label)
    for one in rows:
        axes.annotate(f"{one['warmup']:,}", (one["jmlr"]["tflop"], 100 * one["jmlr"]["accuracy"]))
    axes.set(xlabel="TFLOP of training, warm-up included", ylabel="accuracy, %", title="Steps of warm-up as marked")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmups", type=int, nargs="+", default=[400, 800, 1500, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", help="as of `jmlr run`")
    given, overrides = parser.parse_known_args()
    rows = []
    for steps in given.warmups:
        run = given.folder.absolute() / f"warmup_{steps}"
        words = [f"train.warmup.steps={steps}", "eval.arms=[jmlr,separate]", *overrides]
        config = ["--config", given.config] if given.config else []
        if jmlr(["run", *config, "--run-dir", str(run), "--seeds", str(given.seeds), *words]):
            raise SystemExit(f"the run in {run} failed")
        rows.append(row(run, steps))
        (given.folder / "warmups.json").write_text(json.dumps(rows, indent=1) + "\n")
    drawn(rows, given.folder / "warmups.png")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
