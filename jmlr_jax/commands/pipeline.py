"""The stages in order: prepare, index, train, evaluate, report, for one seed or several."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax

from jmlr_jax import config_io
from jmlr_jax.config import Config
from jmlr_jax.data.prepare import prepare
from jmlr_jax.evaluation.arms import evaluate_arms
from jmlr_jax.evaluation.report import report
from jmlr_jax.hf.follow import followed
from jmlr_jax.parallel import distributed
from jmlr_jax.parallel.distributed import gather, on_first
from jmlr_jax.run.artifact import Recipe, artifact, check_files, refuse
from jmlr_jax.run.cpu import slow_dtype, tell
from jmlr_jax.run.index import index_folder, keep_index
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES, chain
from jmlr_jax.run.recipes import data_recipe
from jmlr_jax.run.weights import INITIAL, is_trained, retriever_of
from jmlr_jax.training.loop import train_phase
from jmlr_jax.training.memory import ask_memory


def prepare_data(cfg: Config, like: Path | None = None) -> None:
    """``data/`` of a run directory, and the record of what was asked, ``config.yaml``; the first process makes both.

    Data are made again when anything they are made from differs. Once an arm was trained on them, its tokenizers stay,
    and what it reads them by (lengths, templates, vocabularies) must stay too; corpus and questions may change.

    Args:
      like: prepared data of another seed, taken over where they are made from the same.

    Raises:
      ArtifactError: an arm was trained on data of other lengths, templates or tokenizers.
      InputError and others: see :func:`jmlr_jax.data.prepare.prepare`; the run is as it was.
    """
    cfg = followed(cfg)
    console, folder = distributed.console(), Path(cfg.run_dir).absolute() / "data"

    def make() -> None:
        recipe, made = data_recipe(cfg, folder), Recipe.read(folder)
        if made is not None:
            check_files(folder)
        arms = sorted(path.parent.name for path in folder.parent.glob("arms/*/made_from.json"))
        keep = folder if made is not None and arms else None
        if keep is not None and made is not None:
            text = [line for line in recipe.differences(made) if line.startswith(("retriever.", "generator.", "seed"))]
            remedy = f"arms were trained on these data ({', '.join(arms)}): give the values they were prepared with, "
            refuse(recipe, text, f"{remedy}or a new directory (--run-dir)")
        twin = None if like is None else Recipe.read(like)

        def fill(part: Path) -> None:
            if keep is None and twin is not None and like is not None and twin.digest == recipe.digest:
                check_files(like)
                shutil.copytree(like, part, dirs_exist_ok=True, copy_function=_link)
            else:
                prepare(cfg, part, console, keep)

        if not artifact(recipe, fill, console.print):
            console.print(f"{folder}: prepared already, from the same")
        _record(cfg, folder.parent)

    on_first(make)


def _record(cfg: Config, folder: Path) -> None:
    """Writes what was asked into a run directory, for commands that name it without --config."""
    config_io.save_resolved(config_io.with_absolute_paths(cfg), folder / config_io.RESOLVED_NAME)


def _link(source: str, target: str) -> None:
    """The same file under another name where the disk allows it: prepared data are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def index(run: Run) -> None:
    """Builds and saves the index of the initial retriever and of every trained one, in ``index/NAME``."""
    console = distributed.console()
    names = [phase.name for phase in PHASES.values() if phase.rank and is_trained(run, phase.name)]
    for name in (None, *names):
        with jax.set_mesh(run.mesh), run.timed("index"):
            retriever = retriever_of(run, name)
            kept = keep_index(run, name or INITIAL, retriever, console.print)
            gather(None)  # what process 0 reports is there of all
        card = kept.card
        found = ", ".join(f"ANN recall@{k} {r:.3f}" for k, r in card.ann_recall.items())
        console.print(
            f"{index_folder(run, name or INITIAL)}: {card.kind} index of {card.passages:,} passages, "
            f"{card.build_seconds:.1f} s"
            + (f", updated {card.updates} times since" if card.updates else "")
            + (found and f", {found}")
        )


def train(run: Run, arm: str) -> None:
    """Trains an arm and the phases it starts from; finished phases are left alone, an interrupted one continues.

    Raises:
      MemoryShort: a step of one of them needs more memory than there is; nothing has been trained then.
    """
    phases = chain(arm, warmup=run.cfg.train.warmup.steps > 0)
    if not all(is_trained(run, phase.name) for phase in phases) and (slow := slow_dtype(run.cfg)):
        tell(slow)
    ask_memory(run, phases)
    for phase in phases:
        train_phase(run, phase, distributed.console())


def run_all(cfg: Config, seeds: int) -> None:
    """The whole experiment for so many seeds from ``cfg.seed`` on, each in ``run_dir/seed_N``, and its report."""
    cfg = followed(cfg)
    console, root, like = distributed.console(), Path(cfg.run_dir), None
    for seed in range(cfg.seed, cfg.seed + seeds):
        one = cfg.model_copy(update={"seed": seed, "run_dir": str(root / f"seed_{seed}")})
        console.rule(f"seed {seed}")
        prepare_data(one, like)
        on_first(lambda: _record(cfg, root))
        like = Path(one.run_dir).absolute() / "data"
        run = Run.open(one)
        index(run)
        for arm in one.eval.arms:
            train(run, arm)
        index(run)
        evaluate_arms(run, one.eval.arms)
    write_report(cfg)


def write_report(cfg: Config, out: str | None = None) -> None:
    """The report of a run directory, in it or in `out`; of several processes the first writes it."""
    ask = cfg.eval
    on_first(lambda: report(cfg.run_dir, ask.split, out=out, resamples=ask.bootstrap, max_risk=ask.max_risk))
