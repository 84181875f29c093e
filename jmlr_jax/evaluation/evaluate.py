"""How well an arm answers: by option likelihood and by generation, always both, with intervals (method.md, Evaluation).

Every question is read once with its passages and once without; probes read it in further ways.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jmlr_jax.config import Config
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.schema import Question
from jmlr_jax.evaluation.answers import exact_match, first_equal, parse_answer, token_f1
from jmlr_jax.evaluation.effects import SeedRows, probed
from jmlr_jax.evaluation.intervals import bootstrap_interval
from jmlr_jax.evaluation.reading import Reader, Setting, batches, evaluate_batch, question_batch, read_batch
from jmlr_jax.files import write_text
from jmlr_jax.parallel.progress import Stage
from jmlr_jax.parallel.sharding import check_rows

SUMMARY, QUESTIONS = "summary.json", "questions.jsonl"  # of an evaluated arm
Rows = list[dict[str, Any]]
Probe = Callable[[Setting, np.ndarray, np.ndarray], Sequence[Mapping[str, Any]]]
"""``(setting, place_n, table_nxK)``, the evaluated questions and what they read, to what is added to each row."""


@dataclass(frozen=True)
class ArmResult:
    """``summary`` is the content of ``summary.json``, ``rows`` the lines of ``questions.jsonl``; see the functions
    :func:`summarise_rows` and :func:`evaluate_arm`."""

    arm: str
    summary: dict[str, Any]
    rows: Rows

    def with_retrieval(self, retrieval: dict[str, float] | None) -> ArmResult:
        """The same with ranking metrics of what the arm retrieved, as ``retrieval`` in the summary."""
        return replace(self, summary={**self.summary, "retrieval": retrieval})

    def save(self, folder: Path) -> None:
        """Writes both files, the summary last."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        summary = json.dumps(self.summary, indent=1, allow_nan=False) + "\n"
        for name, text in ((QUESTIONS, lines), (SUMMARY, summary)):
            write_text(folder / name, text)


def evaluate_arm(
    arm: str,
    reader: Reader,
    prepared: Prepared,
    split: str,
    table_NxK: np.ndarray,
    cfg: Config,
    *,
    mesh: Mesh | None = None,
    rows: np.ndarray | None = None,
    probes: Sequence[Probe] = (),
) -> ArmResult:
    """Evaluates one arm on a split.

    Args:
      arm: its name; names the files.
      table_NxK: int32, a row for each question of the split: the passages to read, best first, -1 where there is none.
        A closed-book arm has -1 everywhere.
      cfg: ``eval`` and the prompt lengths matter, and ``seed`` for the resampling.
      mesh: devices; the batch is spread over its data and fsdp axes.
      rows: of the questions to evaluate; None: ``eval.max_questions`` of them, spread evenly over the split.
      probes: further readings of the same questions, see :mod:`jmlr_jax.evaluation.probes`.

    Returns:
      Rows with ``id question kind group options option_texts answer`` (index of the right option, -1 for free text),
      ``prediction prediction_sum`` (option with the highest mean and highest summed log-likelihood over its tokens),
      ``correct`` (of the former; for free text, exact match of the generated text), ``correct_sum``,
      ``option_nll`` (mean, nats per token), ``nll nll_none`` (of the right answer, with and without the passages),
      ``generated parsed generated_correct f1``, ``passages`` (ids, best first) and ``dropped`` (how many of them did
      not fit into the prompt), and what the probes add. An option that says the same as the right one is right.

    Raises:
      ValueError: the table does not have a row for each question, or the split is empty.
    """
    questions = prepared.questions(split)
    table = np.asarray(table_NxK, np.int32)
    if table.ndim != 2 or len(table) != len(questions):
        raise ValueError(f"table of shape {table.shape} for the {len(questions)} questions of split {split!r}")
    if not len(questions):
        raise ValueError(f"split {split!r} has no questions to evaluate")
    if mesh is not None:
        check_rows(mesh, cfg.eval.batch_size, "eval.batch_size")
    # Where a column holds no passage of any question (of a closed-book arm none does), there is nothing to read.
    table = table[:, (table >= 0).any(axis=0)]
    started = time.monotonic()
    setting = Setting(reader, prepared, split, cfg, mesh)
    chosen = _chosen(len(questions), cfg.eval.max_questions) if rows is None else rows
    lines: Rows = []
    with Stage(f"evaluating {arm}", len(chosen), "questions") as stage:
        for place_B, count in batches(chosen, cfg.eval.batch_size):
            batch = question_batch(setting, place_B, table[place_B])
            found = read_batch(evaluate_batch, setting, place_B, batch) | {"option_len": batch["option_len_BxO"][:, 1:]}
            for i in range(count):
                place = int(place_B[i])
                one = {name: values[i] for name, values in found.items()}
                lines.append(_row(questions[place], one, reader, prepared, table[place]))
            stage.update(len(lines))
    for probe in probes:
        for row, more in zip(lines, probe(setting, chosen, table[chosen]), strict=True):
            row.update(more)
    summary = {"arm": arm, "split": split, **summarise_rows(lines, cfg.eval.bootstrap, cfg.seed)}
    return ArmResult(arm, {**summary, "seconds": time.monotonic() - started}, lines)


def summarise_rows(rows: Rows, resamples: int, seed: int = 0) -> dict[str, Any]:
    """What ``summary.json`` says about rows of :func:`evaluate_arm`; intervals are 95% cluster bootstraps by group.

    ``n``, ``groups``, ``accuracy low high`` (mean log-likelihood), ``accuracy_sum`` (summed log-likelihood), ``chance``
    (guessing; null without options), ``generation`` (``accuracy low high unparsed exact_match f1``; ``unparsed`` is a
    number of questions),
    ``nll`` (``with_passages without_passages gain low high``, the interval being that of the gain), ``by_kind``
    (kind -> ``n accuracy generation_accuracy``), ``dropped_passages``, and :func:`jmlr_jax.evaluation.effects.probed`.
    """
    groups = [row["group"] for row in rows]

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    interval = partial(bootstrap_interval, groups=groups, seed=seed, resamples=resamples)
    likelihood = interval([float(row["correct"]) for row in rows])
    generation = interval([float(row["generated_correct"]) for row in rows])
    gain = interval([row["nll_none"] - row["nll"] for row in rows])
    chances = [chance(row) for row in rows if row["options"]]
    kinds = sorted({row["kind"] for row in rows})
    return {
        "n": len(rows),
        "groups": len(set(groups)),
        "accuracy": likelihood.mean,
        "low": likelihood.low,
        "high": likelihood.high,
        "accuracy_sum": mean("correct_sum"),
        "chance": float(np.mean(chances)) if chances else None,
        "generation": {
            "accuracy": generation.mean,
            "low": generation.low,
            "high": generation.high,
            "unparsed": sum(row["parsed"] is None for row in rows if row["options"]),
            "exact_match": mean("exact_match"),
            "f1": mean("f1"),
        },
        "nll": {
            "with_passages": mean("nll"),
            "without_passages": mean("nll_none"),
            "gain": gain.mean,
            "low": gain.low,
            "high": gain.high,
        },
        "by_kind": {kind: _kind([row for row in rows if row["kind"] == kind]) for kind in kinds},
        "dropped_passages": sum(row["dropped"] for row in rows),
        **probed([SeedRows(rows)], resamples, seed),
    }


def _row(
    question: Question, found: dict[str, Any], reader: Reader, prepared: Prepared, table_K: np.ndarray
) -> dict[str, Any]:
    """One line of ``questions.jsonl``."""
    ends = prepared.generator_ids.ends
    made = [int(token) for token in found["tokens"][: int(found["made"])]]
    text = reader.decode([token for token in made if token not in ends]).strip()
    count = len(question.options)
    nll, length = found["nll"][1 : 1 + count], found["option_len"][:count]
    prediction, by_sum = (int(np.argmin(nll)), int(np.argmin(nll * length))) if count else (-1, -1)
    parsed = parse_answer(text, question.options)
    matched = exact_match(text, question.answer)

    def right(option: int | None) -> bool:
        return is_right(question, option) if count else matched

    return {
        "id": question.id,
        "question": question.question,
        "kind": question.kind,
        "group": question.meta.get("group", question.id),
        "options": count,
        "option_texts": list(question.options),
        "answer": question.answer_index,
        "prediction": prediction,
        "prediction_sum": by_sum,
        "correct": right(prediction),
        "correct_sum": right(by_sum),
        "option_nll": [float(x) for x in nll],
        "nll": float(found["nll"][0]),
        "nll_none": float(found["nll_none"]),
        "generated": text,
        "parsed": parsed,
        "generated_correct": right(parsed),
        "exact_match": matched,
        "f1": token_f1(text, question.answer),
        "passages": [prepared.passages[int(p)].id for p in table_K if p >= 0],
        "dropped": int(found["dropped"]),
    }


def is_right(question: Question, option: int | None) -> bool:
    """Whether the chosen option, None for none, says what the right one says."""
    first = first_equal(question.options)
    return option is not None and first[option] == first[question.answer_index]


def chance(row: Mapping[str, Any]) -> float:
    """How often guessing is right."""
    first = first_equal(row["option_texts"])
    return first.count(first[row["answer"]]) / len(first)


def _kind(rows: Rows) -> dict[str, Any]:
    return {
        "n": len(rows),
        "accuracy": float(np.mean([row["correct"] for row in rows])),
        "generation_accuracy": float(np.mean([row["generated_correct"] for row in rows])),
    }


def _chosen(count: int, most: int) -> np.ndarray:
    """Rows of questions to evaluate: all, or `most` of them spread evenly over the split."""
    if not most or most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(int)
