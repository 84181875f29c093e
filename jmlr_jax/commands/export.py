"""``jmlr export``: the trained pair of a run as directories that other tools load, with a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console

from jmlr_jax.config import Config
from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.report import summarise
from jmlr_jax.evaluation.seed_run import read_run
from jmlr_jax.files import is_address
from jmlr_jax.hf.card import copy_legal_files, model_card
from jmlr_jax.hf.export import Lora, write_adapters, write_colbert, write_generator, write_pylate
from jmlr_jax.hf.io import read_json, whole_directory
from jmlr_jax.parallel import distributed
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES, trained_retriever
from jmlr_jax.run.weights import INITIAL, retriever_of, trained

# folder -> (what it is, what loads it); the card lists those that were written
FOLDERS = {
    "generator": ("the language model, adapters merged", "`transformers.AutoModelForCausalLM`"),
    "adapters": ("the adapters alone, for the base model they were trained on", "`peft.PeftModel`"),
    "colbert": ("the retriever", "colbert-ai"),
    "pylate": ("the same retriever", "`pylate.models.ColBERT`"),
}


def export_run(cfg: Config, dst: str | os.PathLike[str], *, arm: str = "jmlr") -> None:
    """Writes the weights that an arm ended with, as ``DST/{generator,adapters,colbert,pylate}`` and ``DST/README.md``.

    ``adapters`` is there after training with LoRA on a published base; ``colbert`` and ``pylate`` if the arm retrieves.
    `dst` appears whole or not at all.

    Args:
        cfg: the run's configuration; its mesh may be another one than it was trained on.
        dst: a new directory.
        arm: whose weights.

    Raises:
        JmlrError: no such run, or several seeds in one directory, or a program of several hosts.
        DataError: the arm has not been trained to its end.
        HFError: `dst` exists, or Hugging Face cannot express what was trained.
    """
    _check_run(cfg.run_dir)
    run, console = Run.open(cfg), distributed.console()
    with jax.set_mesh(run.mesh), whole_directory(dst) as folder:
        weights = trained(run, arm, "generator")
        written = _write_generator(run, folder, weights, console)
        if PHASES[arm].passages in ("live", "retriever"):
            params = retriever_of(run, trained_retriever(arm))
            like, tokenizer = _described(cfg.retriever.source), run.prepared.tokenizer_dir("retriever")
            writers: dict[str, Callable[..., None]] = {"pylate": write_pylate}
            if cfg.retriever.augment_queries:
                writers["colbert"] = write_colbert
            else:
                console.print("colbert is left out: colbert-ai has no form for retriever.augment_queries=false")
            for name, write in writers.items():
                write(_made(folder, name), run.retriever, params, tokenizer, like=like)
            _copy_legal(cfg.retriever.source, folder, list(writers))
            written |= writers.keys()
        card = _card(run, arm, {name: text for name, text in FOLDERS.items() if name in written})
        for place in (folder, *(folder / name for name in written)):
            (place / "README.md").write_text(card)


def _check_run(run_dir: str) -> None:
    folder = epath.Path(run_dir)
    if not folder.is_dir():
        raise JmlrError(f"{run_dir}: no such run directory")
    seeds = sorted(path.name for path in folder.iterdir() if path.name.startswith("seed_"))
    if seeds and not (folder / "arms").exists():
        raise JmlrError(f"{run_dir}: holds the runs {', '.join(seeds)}; name one of them")
    if jax.process_count() > 1:
        raise JmlrError("export runs on one host: start it on one machine that reads the run directory")


def _write_generator(run: Run, folder: epath.Path, weights: Any, console: Console) -> set[str]:
    """Folders ``generator`` and, where there are adapters to a published base, ``adapters``; returns their names."""
    cfg, prepared = run.cfg.generator, run.prepared
    lora = None if cfg.lora is None else Lora(cfg.lora, weights)
    params = weights if lora is None else run.initial_weights()["base"]
    like, tokenizer = _described(cfg.source), prepared.tokenizer_dir("generator")
    write_generator(
        _made(folder, "generator"),
        run.llama,
        params,
        prepared.generator_ids,
        tokenizer,
        lora=lora,
        like=like,
        max_new=cfg.answer_length,
    )
    written = {"generator"}
    if lora is not None and like is not None:
        if lora.cfg.whole:
            console.print(f"adapters are left out: generator.lora.whole={list(lora.cfg.whole)} changes the base itself")
        elif prepared.generator_ids.vocab_size > like["vocab_size"]:
            console.print(
                f"adapters are left out: the tokenizer has {prepared.generator_ids.vocab_size} tokens, more than the "
                f"{like['vocab_size']} rows of {cfg.source}; `jmlr import` can add rows to a base before training"
            )
        else:
            base = cfg.source if is_address(cfg.source) else os.path.abspath(cfg.source)
            write_adapters(_made(folder, "adapters"), run.llama, lora, base, like["vocab_size"], tokenizer)
            written.add("adapters")
    _copy_legal(cfg.source, folder, list(written))
    return written


def _described(source: str) -> Mapping[str, Any] | None:
    """config.json of the checkpoint that training began from; None if it began from random weights."""
    return None if source == "scratch" else read_json(epath.Path(source) / "config.json")


def _made(folder: epath.Path, name: str) -> epath.Path:
    (folder / name).mkdir()
    return folder / name


def _copy_legal(source: str, folder: epath.Path, names: list[str]) -> None:
    for name in names if source != "scratch" else ():
        copy_legal_files(source, folder / name)


def _card(run: Run, arm: str, folders: Mapping[str, tuple[str, str]]) -> str:
    """The model card, from the files of the run."""
    recorded = read_run(epath.Path(run.directory), run.directory.name, "test")
    summary = summarise([recorded], run.cfg.eval.bootstrap)
    index = run.directory / "index" / (trained_retriever(arm) or INITIAL) / "card.json"
    retrieves = PHASES[arm].passages in ("live", "retriever")
    return model_card(
        run.cfg,
        arm,
        run.llama,
        run.retriever,
        prepare=recorded.prepare,
        results=summary["arms"],
        chance=summary["chance"],
        index=json.loads(index.read_text()) if retrieves and index.exists() else None,
        folders=folders,
    )
