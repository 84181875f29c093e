"""How well an arm answers: by option likelihood and by generation, always both, with intervals (method.md, Evaluation).

Every question is read once with its passages and once without. The prompt's keys and values are computed once and
shared by the right answer and all options, each of which then costs its own few tokens only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.batches import Batch, Prepared
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.evaluation.metrics import bootstrap_interval, exact_match, parse_answer, token_f1
from jmlr_jax.files import write_text
from jmlr_jax.method.losses import answer_nll
from jmlr_jax.method.prompt import read_prompt, reading_width
from jmlr_jax.nn.functional import init_cache, llama_cached, llama_logits
from jmlr_jax.nn.generate import generate
from jmlr_jax.nn.layers import Adapters, Params
from jmlr_jax.parallel.placement import place_batch, replicated
from jmlr_jax.parallel.progress import Stage
from jmlr_jax.parallel.sharding import check_rows

SUMMARY, QUESTIONS = "summary.json", "questions.jsonl"  # of an evaluated arm
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Reader:
    """A generator ready to be evaluated.

    Attributes:
      params: weights of the decoder, on the mesh if there is one.
      cfg: their shape, vocabulary size resolved.
      decode: token ids to text, special tokens left out.
      adapters: from :func:`jmlr_jax.nn.lora.bind` without a dropout key.
    """

    params: Params
    cfg: LlamaConfig
    decode: Callable[[Sequence[int]], str]
    adapters: Adapters | None = None


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
) -> ArmResult:
    """Evaluates one arm on a split.

    Args:
      arm: its name; names the files.
      table_NxK: int32, a row for each question of the split: the passages to read, best first, -1 where there is none.
        A closed-book arm has -1 everywhere.
      cfg: ``eval`` and the prompt lengths matter, and ``seed`` for the resampling.
      mesh: devices; the batch is spread over its data and fsdp axes.

    Returns:
      Rows with ``id question kind group options option_texts answer`` (index of the right option, -1 for free text),
      ``prediction prediction_sum`` (option with the highest mean and highest summed log-likelihood over its tokens),
      ``correct`` (of the former; for free text, exact match of the generated text), ``correct_sum``,
      ``option_nll`` (mean, nats per token), ``nll nll_none`` (of the right answer, with and without the passages),
      ``generated parsed generated_correct f1``, ``passages`` (ids, best first) and ``dropped`` (how many of them did
      not fit into the prompt).

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
    chosen = _chosen(len(questions), cfg.eval.max_questions)
    rows: Rows = []
    with Stage(f"evaluating {arm}", len(chosen), "questions") as stage:
        for place_B, count in _batches(chosen, cfg.eval.batch_size):
            found = _run(reader, prepared, split, place_B, table[place_B], cfg, mesh)
            for i in range(count):
                place = int(place_B[i])
                one = {name: values[i] for name, values in found.items()}
                rows.append(_row(questions[place], one, reader, prepared, table[place]))
            stage.update(len(rows))
    summary = {"arm": arm, "split": split, **summarise_rows(rows, cfg.eval.bootstrap, cfg.seed)}
    return ArmResult(arm, {**summary, "seconds": time.monotonic() - started}, rows)


def summarise_rows(rows: Rows, resamples: int, seed: int = 0) -> dict[str, Any]:
    """What ``summary.json`` says about rows of :func:`evaluate_arm`; intervals are 95% cluster bootstraps by group.

    ``n``, ``groups``, ``accuracy low high`` (mean log-likelihood), ``accuracy_sum`` (summed log-likelihood), ``chance``
    (guessing; null without options), ``generation`` (``accuracy low high unparsed exact_match f1``; ``unparsed`` is a
    number of questions),
    ``nll`` (``with_passages without_passages gain low high``, the interval being that of the gain), ``by_kind``
    (kind -> ``n accuracy generation_accuracy``), ``dropped_passages``.
    """
    groups = [row["group"] for row in rows]

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    interval = partial(bootstrap_interval, groups=groups, seed=seed, resamples=resamples)
    likelihood = interval([float(row["correct"]) for row in rows])
    generation = interval([float(row["generated_correct"]) for row in rows])
    gain = interval([row["nll_none"] - row["nll"] for row in rows])
    chances = [1 / row["options"] for row in rows if row["options"]]
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
    }


def continuation_nll(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: Array,
    length_B: Array,
    ids_BxOxA: Array,
    len_BxO: Array,
    *,
    adapters: Adapters | None = None,
) -> Array:
    """Mean negative log-likelihood of each continuation of a prompt, ``nll_BxO`` float32, nats per token.

    Equal to scoring prompt and continuation together, but the prompt is computed once. 0 where a length is 0.
    """
    B, T = prompt_BxT.shape
    A = ids_BxOxA.shape[-1]
    cache = init_cache(cfg, B, T + A)
    start_B = jnp.zeros_like(length_B)
    hidden, cache = llama_cached(params, cfg, prompt_BxT, start_B, length_B, cache, adapters=adapters)
    last_Bx1xD = jnp.take_along_axis(hidden, (length_B - 1)[:, None, None], axis=1)

    def one(option: tuple[Array, Array]) -> Array:
        ids_BxA, len_B = option
        after, _ = llama_cached(params, cfg, ids_BxA, length_B, length_B + len_B, cache, adapters=adapters)
        before_BxAxD = jnp.concatenate([last_Bx1xD, after[:, :-1]], axis=1)  # token a is predicted one position earlier
        return answer_nll(llama_logits(params, cfg, before_BxAxD, adapters=adapters), ids_BxA, len_B)

    # One option at a time: logits of A x V for every option at once would outgrow the model's own memory.
    return jax.lax.map(one, (jnp.swapaxes(ids_BxOxA, 0, 1), len_BxO.T)).T


@partial(jax.jit, static_argnames=("cfg", "ids", "max_length", "replicated"))
def evaluate_batch(
    params: Params,
    adapters: Adapters | None,
    batch: dict[str, Array],
    *,
    cfg: LlamaConfig,
    ids: GeneratorIds,
    max_length: int,
    replicated: NamedSharding | None,
) -> dict[str, Array]:
    """Everything about a batch: likelihoods with and without passages, and generated tokens.

    Args:
      max_length: T, tokens of a prompt with its answer, at most.
    """
    A = batch["option_ids_BxOxA"].shape[-1]
    total = reading_width(batch, max_length, A) - A
    prompt_BxT, length_B, dropped_B = read_prompt(batch, total=total, bos_id=ids.bos, pad_id=ids.pad)
    score = partial(continuation_nll, params, cfg, adapters=adapters)
    nll_BxO = score(prompt_BxT, length_B, batch["option_ids_BxOxA"], batch["option_len_BxO"])
    bare = {
        **batch,
        "reader_ids_BxKxL": batch["reader_ids_BxKxL"][:, :0],
        "reader_len_BxK": batch["reader_len_BxK"][:, :0],
    }
    bare_BxT, bare_len_B, _ = read_prompt(
        bare, total=1 + batch["question_ids_BxS"].shape[1], bos_id=ids.bos, pad_id=ids.pad
    )
    answer_Bx1xA, answer_len_Bx1 = batch["option_ids_BxOxA"][:, :1], batch["option_len_BxO"][:, :1]
    none_Bx1 = score(bare_BxT, bare_len_B, answer_Bx1xA, answer_len_Bx1)
    tokens_BxA, made_B = generate(params, cfg, prompt_BxT, length_B, max_new=A, eos_id=ids.eos, adapters=adapters)
    found = {"nll": nll_BxO, "nll_none": none_Bx1[:, 0], "tokens": tokens_BxA, "made": made_B, "dropped": dropped_B}
    # On every device, so that each host of a pod can read all of them.
    return found if replicated is None else jax.lax.with_sharding_constraint(found, replicated)


def _run(
    reader: Reader,
    prepared: Prepared,
    split: str,
    place_B: np.ndarray,
    table_BxK: np.ndarray,
    cfg: Config,
    mesh: Mesh | None,
) -> Batch:
    """Results of one batch as numpy arrays; the right answer stands before the options on axis O."""
    lengths, ids = prepared.card["lengths"], prepared.generator_ids
    batch: Batch = {}
    batch["reader_ids_BxKxL"], batch["reader_len_BxK"] = prepared.tokens("references").padded(
        table_BxK, lengths["reference"], ids.pad
    )
    batch["question_ids_BxS"], batch["question_len_B"] = prepared.tokens(f"{split}.questions").padded(
        place_B, lengths["question"], ids.pad
    )
    answer_ids, answer_len = prepared.tokens(f"{split}.answers").padded(place_B, lengths["answer"], ids.pad)
    option_ids, option_len = prepared.option_tokens(split, place_B)
    batch["option_ids_BxOxA"] = np.concatenate([answer_ids[:, None], option_ids], axis=1)
    batch["option_len_BxO"] = np.concatenate([answer_len[:, None], option_len], axis=1)
    whole = np.arange(len(place_B))
    on_device = batch if mesh is None else place_batch(mesh, batch, whole, len(whole))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = evaluate_batch(
            reader.params,
            reader.adapters,
            on_device,
            cfg=reader.cfg,
            ids=ids,
            max_length=cfg.generator.max_length,
            replicated=None if mesh is None else replicated(mesh),
        )
    return {**{name: np.asarray(value) for name, value in found.items()}, "option_len": option_len}


def _row(
    question: Any, found: dict[str, Any], reader: Reader, prepared: Prepared, table_K: np.ndarray
) -> dict[str, Any]:
    """One line of ``questions.jsonl``."""
    eos = prepared.generator_ids.eos
    made = [int(token) for token in found["tokens"][: int(found["made"])]]
    text = reader.decode([token for token in made if token != eos]).strip()
    count = len(question.options)
    nll, length = found["nll"][1 : 1 + count], found["option_len"][:count]
    prediction, by_sum = (int(np.argmin(nll)), int(np.argmin(nll * length))) if count else (-1, -1)
    parsed = parse_answer(text, question.options)
    matched = exact_match(text, question.answer)
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
        "correct": prediction == question.answer_index if count else matched,
        "correct_sum": by_sum == question.answer_index if count else matched,
        "option_nll": [float(x) for x in nll],
        "nll": float(found["nll"][0]),
        "nll_none": float(found["nll_none"]),
        "generated": text,
        "parsed": parsed,
        "generated_correct": parsed == question.answer_index if count else matched,
        "exact_match": matched,
        "f1": token_f1(text, question.answer),
        "passages": [prepared.passages[int(p)].id for p in table_K if p >= 0],
        "dropped": int(found["dropped"]),
    }


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


def _batches(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows [size], how many of them count): all of one size, so that one compilation serves; the last is filled up."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.full(size - len(part), part[0])]), len(part)
