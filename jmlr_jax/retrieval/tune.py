"""How many hits to score, and how many of these in full: ANN recall of every choice, and the cheapest good enough."""

from __future__ import annotations

import io
import time

import numpy as np
from pydantic import BaseModel, ConfigDict

from jmlr_jax.parallel.progress import track
from jmlr_jax.retrieval.scann import ScannIndex
from jmlr_jax.retrieval.tokens import BATCHES, best_of

GRID = 1.25  # ratio of neighbouring numbers of hits
SPARES = (1, 2, 4, 8, 16)  # one hit in so many is scored in full
FULL_COST = 12  # of scoring a hit in full, where scoring its centroids is 1; on a CPU (docs/benchmarks.md)
SCAN_COST = 0.01  # of comparing a passage's encoding, a tree's two copies together
LEAF_FRACTIONS = (16, 8, 4, 2, 1)  # a tree is tried with one in so many of its leaves


class Point(BaseModel):
    """One setting of the search: ``ann_recall`` of the exact best ``k``, and what a question costs.

    ScaNN compares about ``scanned`` encodings. ``scored`` of the hits, one in ``spare``, are scored in full, the others
    by their centroids alone. ``ms`` is measured at the most hits, search and scoring apart, and goes linearly with the
    hits between.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    hits: int
    leaves: int | None
    spare: int
    scanned: int
    scored: int
    ann_recall: float
    ms: float


class Curve(BaseModel):
    """What was tried and what was chosen.

    Attributes:
      k: ANN recall is of the exact best k passages.
      target: the ANN recall asked for; None: the most hits were asked for as they are.
      questions: over how many.
      chosen: the cheapest point that reaches the target, else the one of highest ANN recall.
      points: all of them, by leaves and hits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    k: int
    target: float | None
    questions: int
    chosen: Point
    points: list[Point]


def ann_recall(want_NxK: np.ndarray, got_NxK: np.ndarray) -> float:
    """Mean fraction of the exact best rows of a question that were found; -1 on the right of a row is padding.

    >>> ann_recall(np.array([[4, 2], [7, -1]]), np.array([[2, 9], [7, 1]]))
    0.75
    """
    found = [np.isin(want[want >= 0], got).mean() for want, got in zip(want_NxK, got_NxK, strict=True)]
    return float(np.mean(found))


def tune(
    index: ScannIndex, q_NxQxC: np.ndarray, exact_NxK: np.ndarray, most: int, target: float | None
) -> tuple[ScannIndex, Curve]:
    """The index with the hits and leaves of least work that reach the target, and the curve it was read from.

    Args:
      index: as built.
      q_NxQxC: sample questions, at least one.
      exact_NxK: their best rows by exact MaxSim, -1 padding on the right.
      most: hits at most.
      target: ANN recall to reach; None: take ``most`` as it is.
    """
    k = exact_NxK.shape[1]
    most = max(k, min(most, len(index)))
    how = index.parts[0].how
    tree: list[int | None] = [None]
    if how.leaves is not None:
        tree = list(dict.fromkeys(-(-how.leaves // one_in) for one_in in LEAF_FRACTIONS))
    points = [point for leaves in tree for point in _points(index.tuned(most, leaves), q_NxQxC, exact_NxK, most)]
    if target is None:
        scored = index.tuned(most, None).kept(most, k)
        good = [point for point in points if (point.hits, point.scored) == (most, scored)]
        chosen = max(good, key=lambda point: (point.ann_recall, -(point.leaves or 0)))
        chosen = chosen.model_copy(update={"spare": index.spare})  # of several that score as many for this k
    else:
        chosen = cheapest(points, target)
    curve = Curve(k=k, target=target, questions=len(q_NxQxC), chosen=chosen, points=points)
    return index.tuned(chosen.hits, chosen.leaves, chosen.spare), curve


def cheapest(points: list[Point], target: float) -> Point:
    """The point of least work that reaches the target, else the one of highest ANN recall.

    Work, not the clock, decides: the same data give the same index.
    """
    good = [point for point in points if point.ann_recall >= target]
    return min(good, key=_work) if good else max(points, key=lambda point: (point.ann_recall, -point.hits))


def _work(point: Point) -> tuple[float, int]:
    rough = point.hits if point.scored < point.hits else 0
    return rough + FULL_COST * point.scored + SCAN_COST * point.scanned, point.hits


def _points(index: ScannIndex, q_NxQxC: np.ndarray, exact_NxK: np.ndarray, most: int) -> list[Point]:
    """ANN recall at every number of hits, from one search for the most: fewer hits are its first ones."""
    k, rows, scores, rough = exact_NxK.shape[1], [], [], []
    scanned = round(len(index) * (index.leaves or 1) / (index.parts[0].how.leaves or 1))
    nearest_s = rough_s = score_s = 0.0
    name = "tuning the index" + ("" if index.leaves is None else f" with {index.leaves} leaves")
    starts = range(0, len(q_NxQxC), BATCHES[-1])
    for first in track(starts, len(q_NxQxC), name, "questions", each=BATCHES[-1]):
        q = q_NxQxC[first : first + BATCHES[-1]]
        start = time.perf_counter()
        row_NxH, _ = index.nearest(q, most)
        middle = time.perf_counter()
        rows.append(row_NxH)
        scores.append(index.score(q, row_NxH))
        end = time.perf_counter()
        # The last batch's time is kept: the first one's is compilation.
        nearest_s, score_s = (middle - start) / len(q), (end - middle) / len(q)
        if index.code is not None:
            rough.append(index.rough_score(q, row_NxH))
            rough_s = (time.perf_counter() - end) / len(q)
    row_NxH, score_NxH = np.concatenate(rows), np.concatenate(scores)
    rough_NxH = np.concatenate(rough) if rough else score_NxH
    points = []
    for hits in grid(k, row_NxH.shape[1]):
        order = np.lexsort((row_NxH[:, :hits], -rough_NxH[:, :hits]))  # as a search does: best by centroids first
        row, score = (np.take_along_axis(x, order, 1) for x in (row_NxH, score_NxH))
        tried: set[int] = set()
        for spare in SPARES if index.code is not None else (1,):
            scored = index.tuned(hits, index.leaves, spare).kept(hits, k)
            if scored in tried:
                continue
            tried.add(scored)
            got, _ = best_of(row[:, :scored], score[:, :scored], k)
            rough_hits = hits if scored < hits else 0
            ms = 1000 * (nearest_s + (score_s * scored + rough_s * rough_hits) / row_NxH.shape[1])
            found = round(ann_recall(exact_NxK, got), 5)
            points.append(
                Point(
                    hits=hits,
                    leaves=index.leaves,
                    spare=spare,
                    scanned=scanned,
                    scored=scored,
                    ann_recall=found,
                    ms=round(ms, 3),
                )
            )
    return points


def grid(least: int, most: int) -> list[int]:
    """Numbers of hits that are tried.

    >>> grid(10, 30)
    [10, 12, 16, 20, 24, 30]
    """
    found, at = [], float(least)
    while round(at) < most:
        found.append(round(at))
        at = max(at * GRID, at + 1)
    return [*found, most]


def picture(curve: Curve) -> bytes:
    """The curve as PNG: ANN recall over hits, a line for each number of leaves, the chosen point and the target."""
    from matplotlib.figure import Figure  # a third of a second that training does not need

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for leaves, spare in dict.fromkeys((point.leaves, point.spare) for point in curve.points):
        line = [point for point in curve.points if (point.leaves, point.spare) == (leaves, spare)]
        label = f"1 in {spare} scored in full" + ("" if leaves is None else f", {leaves} leaves")
        axes.plot([p.hits for p in line], [p.ann_recall for p in line], marker=".", label=label)
    axes.plot([curve.chosen.hits], [curve.chosen.ann_recall], "o", mfc="none", ms=12, color="black", label="chosen")
    if curve.target is not None:
        axes.axhline(curve.target, ls="--", lw=1, color="grey")
    axes.set(xscale="log", xlabel="hits", ylabel=f"ANN recall@{curve.k}")
    axes.set_title(
        f"{curve.questions} questions; chosen: {curve.chosen.hits} hits, {curve.chosen.scored} in full, "
        f"{curve.chosen.ms:.1f} ms a question"
    )
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
