"""Figures of a report, as PNG bytes. One colour per arm in all of them, labels beside the marks instead of legends."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a second at every command's start that only a report needs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WARMUP = "warmup"  # the phase that all arms share
ARM_COLOURS = {  # told apart with colour-blind eyes too
    "jmlr": "#0072B2",
    "separate": "#009E73",
    "separate_retriever": "#6BBF9F",
    "frozen": "#D55E00",
    "bm25": "#B5528F",
    "random": "#8A8A8A",
    "closed_book": "#3A3A3A",
}
ARM_NAMES = {
    "jmlr": "JMLR (joint)",
    "separate": "separately trained",
    "separate_retriever": "its retriever's stage",
    "frozen": "frozen retriever",
    "bm25": "BM25",
    "random": "random passages",
    "closed_book": "closed book",
    WARMUP: "all arms",
}
OTHER_COLOUR = "#A08020"
_INK, GRID = "#222222", "#E4E4E4"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}

PANELS = {  # metric in metrics.jsonl or speed.jsonl -> (title, unit or how to read it)
    f"{WARMUP}/loss/answer": ("Answer loss in the warm-up", "nats per token, one passage read at a time"),
    "loss/answer": ("Answer loss", "nats per token, lower is better"),
    "dev/loss": ("Answer loss on dev questions", "nats per token, at each checkpoint"),
    "loss/rank": ("Rank loss", "lower is better"),
    "rank/pair_accuracy": ("Pair accuracy", "passage pairs ordered as the generator judges; 0.5 is chance"),
    "rank/entropy": ("Sampling entropy", "nats; falls as the retriever commits itself"),
    "recall/candidates": ("Gold passages among the candidates", "recall"),
    "recall/top1": ("Gold passage first", "recall@1, whole corpus"),
    "index/staleness": ("Candidates replaced by a refresh", "fraction of the table"),
    "speed/questions_per_s": ("Questions", "per second"),
    "speed/tokens_per_s": ("Tokens read", "per second"),
    "speed/refresh_fraction": ("A refresh at work beside the steps", "fraction of the time"),
    "speed/refresh_wait_fraction": ("Steps waiting for a refresh", "fraction of the time"),
}

Curve = Sequence[tuple[int, float]]
"""(step, value), steps rising."""


def arm_name(arm: str) -> str:
    """Readable name of an arm; arms not known here keep their own."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def accuracy_figure(arms: Mapping[str, Mapping[str, Any]], chance: float | None) -> bytes:
    """Accuracy of each arm with its interval, best on top, and the line of guessing.

    Args:
      arms: by name, with ``accuracy low high`` and optionally ``per_seed`` (list of accuracies), all in [0, 1].
      chance: accuracy of guessing, None if unknown.
    """
    with style():
        order = sorted(arms, key=lambda arm: arms[arm]["accuracy"])
        figure, ((axes,),) = grid(1, 1, 7.5, 1.3 + 0.5 * len(order))
        for y, arm in enumerate(order):
            row, colour = arms[arm], ARM_COLOURS.get(arm, OTHER_COLOUR)
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
            seeds = row.get("per_seed", [])
            if len(seeds) > 1:
                axes.plot(seeds, [y] * len(seeds), "|", color=colour, markersize=11, alpha=0.8)
            axes.plot(row["accuracy"], y, "o", color=colour, markersize=8)
            axes.annotate(
                f"{100 * row['accuracy']:.1f}%",
                (row["accuracy"], y),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontweight="bold",
            )
        axes.set_yticks(range(len(order)), [arm_name(arm) for arm in order])
        axes.tick_params(axis="y", length=0)
        for label, arm in zip(axes.get_yticklabels(), order, strict=True):
            label.set_color(ARM_COLOURS.get(arm, OTHER_COLOUR))
        if chance is not None:
            axes.axvline(chance, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            axes.annotate(
                f"guessing {100 * chance:.0f}%",
                (chance, 0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 4),
                textcoords="offset points",
                color="#666666",
                fontsize=9,
            )
        axes.set(title="Accuracy by arm", xlim=(0, 1.02), ylim=(-0.8, len(order) - 0.3))
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
        axes.set_xlabel("option likelihood, 95% interval" + (" and single seeds" if _several_seeds(arms) else ""))
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        return png(figure)


def training_figure(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> bytes | None:
    """Small panels of what training logged, a line for each arm: smoothed mean over seeds, raw values behind it.

    Args:
      curves: metric -> arm -> one curve for each seed.

    Returns:
      PNG bytes; None when no metric of :data:`PANELS` was logged.
    """
    shown = [metric for metric in PANELS if any(_points(c) for c in curves.get(metric, {}).values())]
    if not shown:
        return None
    with style():
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure, panels = grid(rows, columns, 5.6 * columns, 2.9 * rows)
        for axes, metric in zip(panels.flat, shown, strict=False):
            _training_panel(axes, metric, curves[metric])
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        return png(figure)


def retriever_figure(scores: Mapping[str, Mapping[str, float]]) -> bytes | None:
    """Ranking quality before and after training, one row per metric.

    Args:
      scores: metric -> ``before`` and ``after``, each in [0, 1].

    Returns:
      PNG bytes; None when there is nothing to show.
    """
    shown = [metric for metric, pair in scores.items() if {"before", "after"} <= pair.keys()]
    if not shown:
        return None
    with style():
        figure, ((axes,),) = grid(1, 1, 7.5, 1.5 + 0.45 * len(shown))
        for y, metric in enumerate(reversed(shown)):
            before, after = scores[metric]["before"], scores[metric]["after"]
            axes.plot([before, after], [y, y], color=ARM_COLOURS["jmlr"], linewidth=2, alpha=0.4, zorder=1)
            axes.plot(before, y, "o", markersize=8, markerfacecolor="white", markeredgecolor="#777777", zorder=2)
            axes.plot(after, y, "o", markersize=8, color=ARM_COLOURS["jmlr"], zorder=3)
            outward = 1 if after >= before else -1  # labels stand outside the pair
            for x, side, colour in ((before, -outward, "#666666"), (after, outward, ARM_COLOURS["jmlr"])):
                axes.annotate(
                    f"{x:.2f}",
                    (x, y),
                    xytext=(9 * side, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    color=colour,
                )
        axes.set_yticks(range(len(shown)), list(reversed(shown)))
        axes.tick_params(axis="y", length=0)
        axes.set(title="Retriever before (hollow) and after training (filled)", xlim=(-0.08, 1.08))
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        return png(figure)


def _several_seeds(arms: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(len(row.get("per_seed", [])) > 1 for row in arms.values())


def _training_panel(axes: Axes, metric: str, by_arm: Mapping[str, Sequence[Curve]]) -> None:
    title, unit = PANELS[metric]
    ends: list[tuple[float, float, str]] = []
    everything: list[float] = []
    for arm in sorted(by_arm, key=lambda arm: arm != "jmlr", reverse=True):  # JMLR last, on top
        points = _points(by_arm[arm])
        if not points:
            continue
        steps = np.array(sorted(points))
        means = np.array([np.mean(points[step]) for step in steps])
        smooth = _smooth(means)
        colour = ARM_COLOURS.get(arm, OTHER_COLOUR)
        if len(steps) > 10:
            axes.plot(steps, means, color=colour, linewidth=0.8, alpha=0.25)
        axes.plot(steps, smooth, color=colour, linewidth=2, marker="o" if len(steps) == 1 else "")
        ends.append((float(steps[-1]), float(smooth[-1]), arm))
        everything += [*means, *smooth]
    low, high = min(everything), max(everything)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.set_title(title, pad=18)
    axes.annotate(unit, (0, 1), xytext=(0, 5), textcoords="offset points", xycoords="axes fraction", fontsize=8.5)
    axes.set_xlabel("step")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Names at the right edge, at the height of each line's end, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.085 * (top - bottom)
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _ in ordered:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    # The stack grew upwards only: centre it on the ends it names, as far as the panel reaches.
    drift = float(np.mean([height - y for height, (_, y, _) in zip(heights, ordered, strict=True)]))
    down = max(min(drift, heights[0] - bottom), heights[-1] - top)
    heights = [height - down for height in heights]
    for (_, y, arm), height in zip(ordered, heights, strict=True):
        axes.annotate(
            arm_name(arm),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            color=ARM_COLOURS.get(arm, OTHER_COLOUR),
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def _points(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """step -> finite values of the seeds."""
    points: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if np.isfinite(value):
                points.setdefault(step, []).append(value)
    return points


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a tenth of the curve; towards the ends the window shrinks on both sides."""
    most, last = len(values) // 20, len(values) - 1
    halves = [min(most, i, last - i) for i in range(len(values))]
    return np.array([values[i - half : i + half + 1].mean() for i, half in enumerate(halves)])


def style() -> AbstractContextManager[None]:
    """How all figures look, while it is open."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches with panels [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
