"""The stages in order: prepare, index, train, evaluate, report, for one seed or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jmlr_jax.config import Config
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.evaluation.evaluate import Reader, evaluate_arm
from jmlr_jax.evaluation.metrics import ranking_summary
from jmlr_jax.evaluation.report import report
from jmlr_jax.files import write_text
from jmlr_jax.nn import lora
from jmlr_jax.parallel import distributed
from jmlr_jax.parallel.distributed import from_first, gather, on_first, shows_progress
from jmlr_jax.run.candidates import fixed_table
from jmlr_jax.run.index import index_folder, retrieve, retriever_index
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES, chain, trained_retriever
from jmlr_jax.run.weights import INITIAL, load_weights, phase_weights, retriever_of, weights_folder
from jmlr_jax.training.loop import train_phase


def prepare_data(cfg: Config, console: Console | None = None) -> None:
    """``data/`` of a run directory; of several processes the first makes it for all."""
    on_first(lambda: prepare(cfg, Path(cfg.run_dir) / "data", console))


def index(cfg: Config) -> None:
    """Builds and saves the index of the initial retriever and of every trained one, in ``index/NAME``."""
    run, console = Run.open(cfg), distributed.console()
    trained = from_first(lambda: [p.name for p in PHASES.values() if p.rank and weights_folder(run, p.name).exists()])
    for name in (None, *trained):
        with jax.set_mesh(run.mesh), run.timed("index"):
            built = retriever_index(run, retriever_of(run, name), progress=shows_progress(console), keep=True)
            folder = index_folder(run, name or INITIAL)
            built.save(folder)
            gather(None)  # what process 0 reports is there of all
        card = built.card
        found = ", ".join(f"recall@{k} {r:.3f} of the exact index" for k, r in card.recall.items())
        console.print(
            f"{folder}: {card.kind} index of {card.passages:,} passages, {card.build_seconds:.1f} s"
            + (f", updated {card.updates} times since" if card.updates else "")
            + (found and f", {found}")
        )


def train(cfg: Config, arm: str) -> None:
    """Trains an arm and the phases it starts from; finished phases are left alone, an interrupted one continues."""
    run = Run.open(cfg)
    for phase in chain(arm, warmup=cfg.train.warmup.steps > 0):
        train_phase(run, phase, distributed.console())


def evaluate(cfg: Config, arms: Sequence[str]) -> None:
    """Evaluates trained arms on ``eval.split`` and their retrievers, into ``eval/``."""
    run = Run.open(cfg)
    on_first(lambda: run.directory.joinpath("eval").mkdir(exist_ok=True))
    for arm in arms:
        with jax.set_mesh(run.mesh), run.timed("eval"):
            _evaluate(run, arm)
    if any(run.gold(cfg.eval.split)):
        with jax.set_mesh(run.mesh), run.timed("eval"):
            _evaluate_retrievers(run, arms)


def run_all(cfg: Config, seeds: int) -> None:
    """The whole experiment for so many seeds from ``cfg.seed`` on, each in ``run_dir/seed_N``, and its report."""
    console = distributed.console()
    for seed in range(cfg.seed, cfg.seed + seeds):
        one = cfg.model_copy(update={"seed": seed, "run_dir": str(Path(cfg.run_dir) / f"seed_{seed}")})
        console.rule(f"seed {seed}")
        prepare_data(one, console)
        index(one)
        for arm in one.eval.arms:
            train(one, arm)
        index(one)
        evaluate(one, one.eval.arms)
    write_report(cfg)


def write_report(cfg: Config) -> None:
    """The report of a run directory; of several processes the first writes it."""
    on_first(lambda: report(cfg.run_dir, resamples=cfg.eval.bootstrap))


def _evaluate(run: Run, arm: str) -> None:
    cfg, phase = run.cfg, PHASES[arm]
    weights = phase_weights(run, phase)
    weights["generator"] = load_weights(
        weights_folder(run, arm) / "generator", run.abstract(("generator",))["generator"]
    )
    adapters = cfg.generator.lora
    reader = Reader(
        params=weights["generator"] if adapters is None else lora.complete(weights["base"], weights["generator"]),
        cfg=run.llama,
        decode=_decoder(run),
        adapters=None if adapters is None else lora.bind(weights["generator"], adapters),
    )
    source = "retriever" if phase.passages == "live" else phase.passages
    table = fixed_table(run, source, cfg.eval.split, cfg.train.read_passages, retriever_of(run, trained_retriever(arm)))
    progress = shows_progress(distributed.console())
    result = evaluate_arm(arm, reader, run.prepared, cfg.eval.split, table, cfg, mesh=run.mesh, progress=progress)
    on_first(lambda: result.save(run.directory / "eval"))


def _evaluate_retrievers(run: Run, arms: Sequence[str]) -> None:
    """``eval/retriever.json``: ranking metrics of the initial, the trained and each arm's way to find passages."""
    cfg, split = run.cfg, run.cfg.eval.split
    rows, depth = np.arange(len(run.prepared.questions(split))), max(10, *cfg.eval.recall_at)
    gold_NxG = _padded(run.gold(split))

    def summary(phase: str | None) -> dict[str, float]:
        weights = retriever_of(run, phase)
        table = retrieve(run, retriever_index(run, weights), weights, split, rows, depth)
        return ranking_summary(table, gold_NxG, cfg.eval.recall_at)

    found: dict[str, object] = {"before": summary(None), "arms": {}}
    by_arm: dict[str, dict[str, float]] = {}
    for arm in arms:
        if arm in ("bm25", "random"):
            by_arm[arm] = ranking_summary(
                fixed_table(run, PHASES[arm].passages, split, depth), gold_NxG, cfg.eval.recall_at
            )
        elif arm != "closed_book":
            by_arm[arm] = summary(trained_retriever(arm))
    found["arms"] = by_arm
    if "jmlr" in by_arm:
        found["after"] = by_arm["jmlr"]
    on_first(lambda: write_text(run.directory / "eval" / "retriever.json", json.dumps(found, indent=1) + "\n"))


def _padded(gold: list[list[int]]) -> np.ndarray:
    """Gold rows as int32 [N, G], -1 padding."""
    table = np.full((len(gold), max(1, *(len(g) for g in gold))), -1, np.int32)
    for i, rows in enumerate(gold):
        table[i, : len(rows)] = rows
    return table


def _decoder(run: Run):  # type: ignore[no-untyped-def]  # the tokenizer's own signature
    tokenizer = load_tokenizer(run.prepared.tokenizer_dir("generator"))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
