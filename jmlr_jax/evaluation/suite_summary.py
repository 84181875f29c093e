"""What is said of an arm on a published set of questions: tasks, their mean, how it was asked otherwise than its makers
do, and what others have published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jmlr_jax.data.suites import PASSAGES, Suite, question_only
from jmlr_jax.evaluation.evaluate import chance
from jmlr_jax.evaluation.figures import arm_name
from jmlr_jax.evaluation.intervals import Sample, bootstrap_interval, strata_interval
from jmlr_jax.run.open import Run

Rows = Sequence[Mapping[str, Any]]
MEASURED = {"accuracy": "correct", "written": "generated_correct"}  # figure -> field of a row


def misfit_row(task: str, id: str, why: str) -> dict[str, Any]:
    """The line of a question that does not fit into the run's lengths: answered wrong."""
    wrong = {"correct": False, "generated_correct": False, "parsed": None}
    return {"id": id, "task": task, "group": id, **wrong, "misfit": why}


def summarise_tasks(suite: Suite, rows: Rows, resamples: int, seed: int) -> dict[str, Any]:
    """``tasks`` and ``mean`` of a summary; intervals are 95% bootstraps over the questions of each task.

    Of a task: ``n``, ``accuracy low high`` (option of the highest mean log-likelihood), ``written`` (``accuracy low
    high unparsed`` of generated answers), ``chance``, ``misfits`` (questions that do not fit, counted as wrong),
    ``retrieved`` and ``read`` (passages a question, means; null where nothing that was drawn fits). ``mean``:
    ``accuracy low high`` and ``written`` over the tasks, each of them weighing the same however many questions it has;
    null of a single task.
    """
    by_task = {task: [row for row in rows if row["task"] == task] for task in suite.tasks}
    tasks = {}
    for task, some in by_task.items():
        found = {
            name: bootstrap_interval(
                [float(row[key]) for row in some], groups=[row["group"] for row in some], seed=seed, resamples=resamples
            )
            for name, key in MEASURED.items()
        }
        there = [row for row in some if "misfit" not in row]
        tasks[task] = {
            "n": len(some),
            **_named(found["accuracy"]),
            "written": {**_named(found["written"]), "unparsed": sum(row["parsed"] is None for row in some)},
            "chance": _average([chance(row) for row in there]),
            "misfits": len(some) - len(there),
            "retrieved": _average([len(row["passages"]) for row in there]),
            "read": _average([len(row["passages"]) - row["dropped"] for row in there]),
        }
    return {"tasks": tasks, "mean": _mean(by_task, resamples, seed) if len(tasks) > 1 else None}


def _mean(by_task: Mapping[str, Rows], resamples: int, seed: int) -> dict[str, Any]:
    def over(key: str) -> dict[str, float]:
        strata = [Sample([float(r[key]) for r in rows], [r["group"] for r in rows]) for rows in by_task.values()]
        return _named(strata_interval(strata, seed=seed, resamples=resamples))

    return {**over(MEASURED["accuracy"]), "written": over(MEASURED["written"])}


def deviations(run: Run, suite: Suite, card: Mapping[str, Any], source: str, rows: Rows) -> list[str]:
    """How the arm was asked otherwise than the suite's makers ask, a sentence each.

    Args:
      card: of :func:`jmlr_jax.data.suites.write_suite`.
      source: of the arm's passages.
      rows: the lines of its questions.
    """
    cfg, there = run.cfg, [row for row in rows if "misfit" not in row]
    said = [*_counted(suite, card, rows), *suite.protocol]
    said.append(
        "accuracy is of the option with the highest mean log-likelihood; beside it, as `written`, what the generator "
        f"writes itself, at most {cfg.generator.answer_length} tokens without reasoning"
    )
    said += _passages(run, suite, source, there)
    asked = {row["id"] for row in rows}
    trained = len(asked & set(card["in_training"]))
    count = len(run.prepared.questions("train"))
    said.append(
        f"no examples stand in the prompt, but the models were trained on {count:,} questions of the run, {trained:,} "
        "of those asked among them (the same text)"
    )
    said.append(
        "prompts are the run's own templates, as in training: passages, question, lettered options, no instruction"
    )
    if left := len(rows) - len(there):
        first = next(row["misfit"] for row in rows if "misfit" in row)
        said.append(f"{left:,} questions do not fit into the run's lengths and count as wrong; the first: {first}")
    lengths = {"questions": "generator.question_length", "queries": "retriever.query_length"}
    for table, key in lengths.items():
        if table == "queries" and (source != "retriever" or suite.given):
            continue
        if cut := card["cuts"][f"{suite.name}.{table}"]["cut"]:
            end = "beginning" if table == "questions" else "end"
            limit = cfg.generator.question_length if table == "questions" else cfg.retriever.query_length
            said.append(f"{cut:,} {table} of the file lose their {end}: longer than {key}={limit}")
    same = sum(bool(row["correct"]) and row["prediction"] != row["answer"] for row in there)
    if same:
        said.append(f"{same:,} answers are right by an option that says the same as the right one")
    return said


def _counted(suite: Suite, card: Mapping[str, Any], rows: Rows) -> list[str]:
    """Where not every published question is asked."""
    said = []
    for task, published in suite.tasks.items():
        held, asked = len(card["tasks"][task]), sum(row["task"] == task for row in rows)
        drawn = f"{asked:,} of the file's {held:,} questions, drawn (eval.max_questions)" if asked != held else ""
        other = f"the file has {held:,} questions, {published:,} were published" if published not in (0, held) else ""
        if drawn or other:
            said.append(f"{task}: {'; '.join(filter(None, (drawn, other)))}")
    return said


def _passages(run: Run, suite: Suite, source: str, rows: Rows) -> list[str]:
    """What is read, and who finds it."""
    cfg, read = run.cfg, float(np.mean([len(row["passages"]) - row["dropped"] for row in rows]))
    if source == "none":
        return ["no passages are read: the arm is closed book"]
    if suite.given:
        lost = sum(row["dropped"] for row in rows)
        over = f"; {lost:,} of its passages did not fit into generator.max_length={cfg.generator.max_length}"
        return [f"read is {suite.given}, and nothing is retrieved" + (over if lost else "")]
    count = len(run.prepared.passages)
    finds = {"retriever": "the arm's retriever finds", "bm25": "BM25 finds", "random": "chance draws"}[source]
    said = [f"passages are those that {finds} in the run's corpus of {count:,}"]
    if read < PASSAGES:
        found = float(np.mean([len(row["passages"]) for row in rows]))
        said.append(
            f"{read:.1f} passages are read on average, not {PASSAGES}: of {found:.1f} found, those that fit into "
            f"generator.max_length={cfg.generator.max_length}; in training it read {cfg.train.read_passages}"
        )
    if source == "retriever" and "{options}" in cfg.retriever.query_template:
        said.append(
            f"the retriever is asked {question_only(cfg)!r}, without the options that it was trained with "
            f"({cfg.retriever.query_template!r})"
        )
    return said


def shown(suite: Suite, summaries: Sequence[Mapping[str, Any]]) -> Group:
    """Summaries of one or several arms as the terminal shows them."""
    parts: list[Any] = [_table(suite, summary) for summary in summaries]
    if suite.others:
        parts.append(Text(f"Means that others have published for {suite.title}, of other models, corpora and prompts:"))
        parts += [Text(f"  {mean:.2f}  {model}") for model, mean in suite.others.items()]
    alike = [line for line in summaries[0]["deviations"] if all(line in s["deviations"] for s in summaries)]
    parts.append(Text(f"Not as the makers of {suite.title} ask:"))
    parts += [Text(f"  - {line}") for line in alike]
    for summary in summaries:
        own = [line for line in summary["deviations"] if line not in alike]
        parts += [Text(f"  - {arm_name(summary['arm'])}: {line}") for line in own]
    return Group(*parts)


def _table(suite: Suite, summary: Mapping[str, Any]) -> Table:
    title = f"{suite.title}: {arm_name(summary['arm'])}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "questions", "chance", "accuracy", "95%", "written", "unread", "read"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, found in summary["tasks"].items():
        more = (f"{found['written']['unparsed']:,}", "" if found["read"] is None else f"{found['read']:.1f}")
        table.add_row(task, f"{found['n']:,}", _percent(found["chance"]), *_figures(found), *more)
    if summary["mean"] is not None:
        table.add_section()
        table.add_row(f"mean of {len(suite.tasks)}", "", "", *_figures(summary["mean"]))
    return table


def _figures(found: Mapping[str, Any]) -> tuple[str, str, str]:
    interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    return f"{100 * found['accuracy']:.2f}", interval, _percent(found["written"]["accuracy"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _average(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _named(found: Any) -> dict[str, float]:
    return {"accuracy": found.mean, "low": found.low, "high": found.high}
