"""Further readings of evaluated questions: after gold or random passages, with options in every cyclic order, and after
each passage alone. Each is a pass or more over all questions, so each is asked for in ``eval``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import Question
from jmlr_jax.data.tokenise import tokenise_questions
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.evaluation.evaluate import Probe, is_right
from jmlr_jax.evaluation.reading import Setting, option_losses

Added = list[dict[str, Any]]


def conditions(tables: Mapping[str, np.ndarray]) -> Probe:
    """The same reader after other passages.

    Args:
      tables: name -> int32, a row for each question of the split: passages, best first, -1 where there is none.

    Returns:
      A probe that adds ``conditions``: name -> ``prediction correct nll`` (of the right answer), or null where there is
      nothing to read. Without options there is a loss alone.
    """

    def probe(setting: Setting, place_n: np.ndarray, table_nxK: np.ndarray) -> Added:
        questions = setting.prepared.questions(setting.split)
        added: Added = [{"conditions": dict.fromkeys(tables)} for _ in place_n]
        for name, table_NxK in tables.items():
            some = np.flatnonzero((table_NxK[place_n] >= 0).any(axis=1))
            if not len(some):
                continue
            nll = option_losses(setting, f"reading {name} passages", place_n[some], table_NxK[place_n[some]])
            for i, nll_O in zip(some, nll, strict=True):
                added[i]["conditions"][name] = _answered(questions[int(place_n[i])], nll_O)
        return added

    return probe


def _answered(question: Question, nll_O: np.ndarray) -> dict[str, Any]:
    count = len(question.options)
    chosen = int(np.argmin(nll_O[1 : 1 + count])) if count else None
    correct = None if chosen is None else is_right(question, chosen)
    return {"prediction": chosen, "correct": correct, "nll": float(nll_O[0])}


def orders(setting: Setting, place_n: np.ndarray, table_nxK: np.ndarray) -> Added:
    """A probe that adds ``orders``: which option, as numbered in the question, is the likeliest when the options stand
    in each cyclic order, the first being their own; null where a question does not fit in that order.

    A question of O options is read O times.
    """
    prepared, cfg, split = setting.prepared, setting.cfg, setting.split
    engine = encoder(load_tokenizer(prepared.tokenizer_dir("generator")), continues=True)
    prompts = Prompts(cfg.retriever, cfg.generator)
    questions = [prepared.questions(split)[int(place)] for place in place_n]
    found: list[list[int | None]] = [[] for _ in place_n]
    for shift in range(max((len(question.options) for question in questions), default=0)):
        some = np.array([i for i, question in enumerate(questions) if len(question.options) > shift])
        turned = [_turned(questions[i], shift) for i in some]
        asked, _, misfits = tokenise_questions(engine, prompts, turned, prepared.generator_ids.tail)
        nll = option_losses(setting, f"options turned by {shift}", place_n[some], table_nxK[some], questions=asked)
        left_out = {misfit.row for misfit in misfits}
        for row, (i, nll_O) in enumerate(zip(some, nll, strict=True)):
            count = len(questions[i].options)
            best = int(np.argmin(nll_O[1 : 1 + count]))
            # Where answers are letters, what was scored are places in the order read.
            best = (best + shift) % count if cfg.generator.answer_form == "letter" else best
            found[i].append(None if row in left_out else best)
    return [{"orders": each} for each in found]


def _turned(question: Question, shift: int) -> Question:
    """The same question with its options in another cyclic order, the option at `shift` first."""
    options = question.options[shift:] + question.options[:shift]
    place = (question.answer_index - shift) % len(options)
    return replace(question, options=options, answer_index=place)


@dataclass(frozen=True)
class Judged:
    """Passages to be read alone, and how a retriever scores them.

    Attributes:
      table_NxK: int32, a row for each question of the split, -1 where there is none.
      scores: name -> float [N, K]; NaN where there is no passage, or no score.
    """

    table_NxK: np.ndarray
    scores: Mapping[str, np.ndarray]


def passages_alone(judged: Judged) -> Probe:
    """The reader after each passage alone, one pass for each column of the table.

    Returns:
      A probe that adds ``judged``: for each passage ``id``, ``nll`` of the right answer after it, ``read`` (whether it
      is among those that the arm reads) and its scores (null where there is none).
    """

    def probe(setting: Setting, place_n: np.ndarray, table_nxK: np.ndarray) -> Added:
        added: Added = [{"judged": []} for _ in place_n]
        table = judged.table_NxK[place_n]
        for k in range(table.shape[1]):
            some = np.flatnonzero(table[:, k] >= 0)
            if not len(some):
                continue
            what = f"judging passage {k + 1} of {table.shape[1]}"
            nll = option_losses(setting, what, place_n[some], table[some, k : k + 1], answer_alone=True)
            for i, nll_O in zip(some, nll, strict=True):
                scores = {name: _number(values[place_n[i], k]) for name, values in judged.scores.items()}
                passage = int(table[i, k])
                one = {"id": setting.prepared.passages[passage].id, "nll": float(nll_O[0])}
                added[i]["judged"].append({**one, "read": passage in table_nxK[i], **scores})
        return added

    return probe


def pooled(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Passages of several tables, int32 [N, K]: each once, in the order of the tables, -1 on the right."""
    rows = [list(dict.fromkeys(int(p) for p in row if p >= 0)) for row in np.concatenate(tables, axis=1)]
    pool = np.full((len(rows), max(1, *map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        pool[i, : len(row)] = row
    return pool


def _number(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None
