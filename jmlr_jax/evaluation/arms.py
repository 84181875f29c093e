"""Evaluates the trained arms of a run, and how its retrievers rank, into ``eval/SPLIT/ARM``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.evaluation.evaluate import SUMMARY, Probe, evaluate_arm
from jmlr_jax.evaluation.probes import Judged, conditions, orders, passages_alone, pooled
from jmlr_jax.evaluation.ranking import ranking_summary
from jmlr_jax.evaluation.reading import Reader
from jmlr_jax.files import write_text
from jmlr_jax.nn import lora
from jmlr_jax.parallel import distributed
from jmlr_jax.parallel.distributed import on_first
from jmlr_jax.run.artifact import Recipe, artifact, changes
from jmlr_jax.run.candidates import bm25_search, fixed_table
from jmlr_jax.run.index import pair_scores
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES, PassageSource, trained_retriever
from jmlr_jax.run.recipes import evaluation_recipe, retrieval_recipe
from jmlr_jax.run.weights import INITIAL, digests, retriever_of, trained


def evaluate_arms(run: Run, arms: Sequence[str]) -> None:
    """Evaluates arms on ``eval.split``, and the retriever that they began with; what is there already is left alone.

    Raises:
      DataError: an arm has not been trained to its end.
      ArtifactError: its weights do not belong to the run as it is now.
    """
    cfg, split = run.cfg, run.cfg.eval.split
    if any(run.gold(split)):
        made = retrieval_recipe(cfg, run.fingerprints, split, INITIAL)
        unless_made(run, made, partial(_initial, run))
    for arm in arms:
        made = evaluation_recipe(cfg, run.fingerprints, split, arm, digests(run, arm))
        unless_made(run, made, partial(_arm, run, arm))


def unless_made(run: Run, recipe: Recipe, measure: Callable[[], Callable[[Path], None]]) -> None:
    """Measures in all processes, and writes in the first, unless an equal recipe has made it."""
    console = distributed.console()
    if changes(recipe) == []:
        console.print(f"{recipe.folder}: evaluated already, from the same")
        return
    with jax.set_mesh(run.mesh), run.timed("eval"):
        write = measure()
        on_first(lambda: artifact(recipe, write, console.print))


def _arm(run: Run, arm: str) -> Callable[[Path], None]:
    """How an arm answers and retrieves; the result writes it into a folder."""
    cfg = run.cfg
    reader = reader_of(run, trained(run, arm, "generator"))
    source, retriever = passages_of(run, arm)
    retrieval, ranked = _ranking(run, source, retriever)
    read = cfg.train.read_passages
    # Of chance passages the first of many are not those of few; and of equal scores an index may return any.
    table = ranked[:, :read] if source == "bm25" else fixed_table(run, source, cfg.eval.split, read, retriever)
    probes = _probes(run, arm, source, retriever, table)
    result = evaluate_arm(arm, reader, run.prepared, cfg.eval.split, table, cfg, mesh=run.mesh, probes=probes)
    return result.with_retrieval(retrieval).save


def passages_of(run: Run, arm: str) -> tuple[PassageSource, object]:
    """Where an arm's passages come from when it is evaluated, and the weights of the retriever that finds them."""
    phase = PHASES[arm]
    source: PassageSource = "retriever" if phase.passages == "live" else phase.passages
    return source, retriever_of(run, trained_retriever(arm)) if source == "retriever" else None


def reader_of(run: Run, generator: Any) -> Reader:
    """A generator of the run ready to read; `generator` is what a phase trained, whole or adapters."""
    adapters = run.cfg.generator.lora
    tokenizer = load_tokenizer(run.prepared.tokenizer_dir("generator"))
    return Reader(
        params=generator if adapters is None else lora.complete(run.initial_weights()["base"], generator),
        cfg=run.llama,
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        adapters=None if adapters is None else lora.bind(generator, adapters),
    )


def _probes(run: Run, arm: str, source: PassageSource, retriever: Any, table_NxK: np.ndarray) -> list[Probe]:
    """The further readings that the configuration asks for."""
    cfg, split = run.cfg, run.cfg.eval.split
    probes: list[Probe] = []
    if cfg.eval.conditions:
        read = cfg.train.read_passages
        tables = {"gold": padded(run.gold(split))[:, :read], "random": fixed_table(run, "random", split, read)}
        probes.append(conditions({name: tables[name] for name in cfg.eval.conditions}))
    if cfg.eval.permutations:
        probes.append(orders)
    if cfg.eval.judge_passages and source != "none":
        probes.append(passages_alone(_judged(run, arm, source, retriever, table_NxK)))
    return probes


def _judged(run: Run, arm: str, source: PassageSource, retriever: Any, table_NxK: np.ndarray) -> Judged:
    """The passages that an arm reads, and for a trained retriever those it would have read before training, with the
    scores of both retrievers: either ranks what the other found too."""
    cfg, split, rows = run.cfg, run.cfg.eval.split, np.arange(len(table_NxK))
    if source != "retriever":
        read = cfg.train.read_passages
        scores = bm25_search(run, split, read)[1] if source == "bm25" else np.full(table_NxK.shape, np.nan)
        return Judged(table_NxK, {"score": scores})
    pool, named = table_NxK, {"score": retriever}
    if trained_retriever(arm) is not None:
        named["score_before"] = first = retriever_of(run, None)
        pool = pooled([table_NxK, fixed_table(run, source, split, table_NxK.shape[1], first)])
    return Judged(pool, {name: pair_scores(run, each, split, rows, pool) for name, each in named.items()})


def _initial(run: Run) -> Callable[[Path], None]:
    """How the retriever ranks before any training."""
    retrieval, _ = _ranking(run, "retriever", retriever_of(run, None))
    text = json.dumps({"arm": INITIAL, "split": run.cfg.eval.split, "retrieval": retrieval}, indent=1)
    return lambda folder: write_text(folder / SUMMARY, text + "\n")


def _ranking(run: Run, source: Any, retriever: Any) -> tuple[dict[str, float] | None, np.ndarray]:
    """Ranking metrics of a source of passages, None where nothing is retrieved or judged, and the ranking."""
    cfg, gold = run.cfg, run.gold(run.cfg.eval.split)
    depth = max(10, cfg.train.read_passages, *cfg.eval.hit_at)
    ranked = fixed_table(run, source, cfg.eval.split, depth, retriever)
    if source == "none" or not any(gold):
        return None, ranked
    return ranking_summary(ranked, padded(gold), cfg.eval.hit_at), ranked


def padded(gold: list[list[int]]) -> np.ndarray:
    """Gold rows as int32 [N, G], -1 padding."""
    table = np.full((len(gold), max(1, *(len(g) for g in gold))), -1, np.int32)
    for i, rows in enumerate(gold):
        table[i, : len(rows)] = rows
    return table
