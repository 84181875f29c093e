"""Asks the trained arms of a run a published set of questions, into ``eval/SUITE/ARM``; see ``data/suites.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jmlr_jax.data.schema import InputError
from jmlr_jax.data.suites import PASSAGES, SUITES, Suite, read_card, suite_digest, write_suite
from jmlr_jax.evaluation.arms import padded, passages_of, reader_of, unless_made
from jmlr_jax.evaluation.evaluate import SUMMARY, evaluate_arm
from jmlr_jax.evaluation.suite_summary import deviations, misfit_row, shown, summarise_tasks
from jmlr_jax.parallel import distributed
from jmlr_jax.parallel.distributed import check_same, from_first, on_first
from jmlr_jax.retrieval.vectors import drawn_rows
from jmlr_jax.run.artifact import artifact
from jmlr_jax.run.candidates import fixed_table
from jmlr_jax.run.open import Run
from jmlr_jax.run.recipes import questions_recipe, suite_recipe
from jmlr_jax.run.weights import digests, trained
from jmlr_jax.seeds import derived


def evaluate_suite(run: Run, name: str, path: str, arms: Sequence[str]) -> None:
    """Evaluates arms on a suite and prints their tables; what is there already, from the same, is left alone.

    Args:
      name: of :data:`jmlr_jax.data.suites.SUITES`.
      path: the file of its questions.

    Raises:
      InputError, RecordError: a file that is not the suite's; nothing is written then.
      DataError: an arm has not been trained to its end.
      ArtifactError: its weights do not belong to the run as it is now.
    """
    suite, console = SUITES[name], distributed.console()
    check_same("the suite", [name, path, list(arms)], "start the same command in every process")
    weights = {arm: digests(run, arm) for arm in arms}
    content = from_first(lambda: suite_digest(suite, path))
    questions = questions_recipe(run.cfg, run.fingerprints, name, path, content)
    on_first(lambda: artifact(questions, partial(write_suite, run.cfg, run.prepared, suite, path), console.print))
    card = read_card(questions.folder)
    own = bool(suite.given)
    run = replace(run, prepared=run.prepared.with_suite(name, questions.folder, card["max_options"], own_passages=own))
    for arm in arms:
        made = suite_recipe(run.cfg, run.fingerprints, arm, weights[arm], questions)
        unless_made(run, made, partial(_arm, run, suite, card, arm))

    def tell() -> None:
        found = [json.loads((questions.folder.parent / arm / SUMMARY).read_text(encoding="utf-8")) for arm in arms]
        distributed.console(out=True).print(shown(suite, found))

    on_first(tell)


def _arm(run: Run, suite: Suite, card: dict[str, Any], arm: str) -> Callable[[Path], None]:
    """How an arm answers; the result writes it into a folder."""
    cfg = run.cfg
    asked = {task: _asked(suite, task, places, cfg.eval.max_questions) for task, places in card["tasks"].items()}
    rows = np.array([row for task, places in asked.items() for p in places if (row := card["tasks"][task][p]) >= 0])
    if not len(rows):
        raise InputError(
            f"{suite.title}: not one of the questions that were drawn fits into the lengths of the run; raise "
            "eval.max_questions, or prepare and train with longer ones"
        )
    source, retriever = passages_of(run, arm)
    reader = reader_of(run, trained(run, arm, "generator"))
    if suite.given and source != "none":
        # The last is the best, so that they are read in their order.
        table = padded([passages[::-1] for passages in run.gold(suite.name)])
    else:
        table = fixed_table(run, source, suite.name, PASSAGES, retriever, rows)
    result = evaluate_arm(arm, reader, run.prepared, suite.name, table, cfg, mesh=run.mesh, rows=rows)
    misfits = [
        misfit_row(task, **card["misfits"][task][str(place)])
        for task, places in asked.items()
        for place in places
        if card["tasks"][task][place] < 0
    ]
    lines = [{**row, "task": suite.task(row["kind"])} for row in result.rows] + misfits
    summary = {
        "suite": suite.name,
        "arm": arm,
        **summarise_tasks(suite, lines, cfg.eval.bootstrap, cfg.seed),
        "deviations": deviations(run, suite, card, source, lines),
        "others": dict(suite.others),
        "seconds": result.summary["seconds"],
    }
    return replace(result, summary=summary, rows=lines).save


def _asked(suite: Suite, task: str, places: Sequence[int], most: int) -> list[int]:
    """Places of a task's questions that are asked: all, or as many as are drawn; the same in every run."""
    count = len(places)
    drawn: list[int] = drawn_rows(count, most or count, derived(0, "questions of", suite.name, task)).tolist()
    return drawn
