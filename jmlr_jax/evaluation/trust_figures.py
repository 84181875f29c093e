"""Figures of what answers cost and how far they are to be trusted, as PNG bytes; see :mod:`.figures`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jmlr_jax.evaluation.figures import ARM_COLOURS, GRID, OTHER_COLOUR, arm_name, grid, png, style

COLUMNS = 3


def cost_figure(arms: Mapping[str, Mapping[str, Any]], costs: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """Accuracy of each arm with its interval over the FLOPs of its training; None where no cost is known.

    Args:
      arms: by name, with ``accuracy low high`` in [0, 1].
      costs: by name, with ``flops``.
    """
    shown = [arm for arm in costs if arm in arms]
    if not shown:
        return None
    with style():
        figure, ((axes,),) = grid(1, 1, 7.5, 4.4)
        for arm in shown:
            row, x, colour = arms[arm], costs[arm]["flops"], ARM_COLOURS.get(arm, OTHER_COLOUR)
            axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot(x, row["accuracy"], "o", color=colour, markersize=8)
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(arm_name(arm), (x, row["accuracy"]), color=colour, fontsize=9, **place)
        axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.set(title="Accuracy over the cost of training", xlabel="FLOPs, the phases an arm starts from included")
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        return png(figure)


def reliability_figure(trust: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """How often answers of a probability are right, a panel for each arm; None without arms.

    Args:
      trust: by arm, with ``bins calibration_error uncalibrated``.
    """
    if not trust:
        return None
    with style():
        columns = min(COLUMNS, len(trust))
        rows = -(-len(trust) // columns)
        figure, panels = grid(rows, columns, 3.1 * columns, 3.2 * rows)
        for axes, (arm, found) in zip(panels.flat, trust.items(), strict=False):
            colour = ARM_COLOURS.get(arm, OTHER_COLOUR)
            bins = found["bins"]
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)))
            x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
            share = np.array([one["n"] for one in bins]) / found["n"]
            axes.plot(x, y, color=colour, linewidth=1.5, alpha=0.6)
            axes.scatter(x, y, s=20 + 200 * share, color=colour, zorder=3)
            word = "not calibrated" if found["uncalibrated"] else "calibrated on dev"
            axes.set_title(f"{arm_name(arm)}", pad=18)
            note = f"{word}, error {100 * found['calibration_error']:.1f}"
            axes.annotate(note, (0, 1), xytext=(0, 5), textcoords="offset points", xycoords="axes fraction", fontsize=8)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the answer", ylabel="share right")
            axes.grid(color=GRID)
            axes.set_axisbelow(True)
        for axes in panels.flat[len(trust) :]:
            axes.set_visible(False)
        return png(figure)


def risk_figure(trust: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """Share of wrong answers over the share of questions answered, the surest first; a line for each arm.

    Args:
      trust: by arm, with ``risk_coverage`` and ``given`` (a mark at what the thresholds of dev lead to).
    """
    if not trust:
        return None
    with style():
        figure, ((axes,),) = grid(1, 1, 7.5, 4.4)
        for arm, found in trust.items():
            colour = ARM_COLOURS.get(arm, OTHER_COLOUR)
            coverage, risk = zip(*found["risk_coverage"], strict=True)
            axes.plot(coverage, risk, color=colour, linewidth=2, label=arm_name(arm))
            if found["given"]:
                axes.plot(found["given"]["coverage"], found["given"]["risk"], "o", color=colour, markersize=9)
        most = next(iter(trust.values()))["max_risk"]
        axes.axhline(most, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set(title="Risk over coverage", xlim=(0, 1.01), ylim=(0, None))
        axes.set(xlabel="share of questions answered, the surest first", ylabel="share of them wrong")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        return png(figure)
