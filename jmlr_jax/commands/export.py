"""``jmlr export``: the trained pair of a run as directories that other tools load, with a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jmlr_jax.answering.carried import write_carried
from jmlr_jax.answering.home import some_questions
from jmlr_jax.answering.trust import trust_of
from jmlr_jax.config import Config
from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.report import summarise
from jmlr_jax.evaluation.seed_run import read_run
from jmlr_jax.files import AnyPath, absolute, any_path, check_local, local_path
from jmlr_jax.hf.card import copy_legal_files, model_card
from jmlr_jax.hf.config import text_of
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
    "colbert": ("the retriever", "colbert-ai, `sentence_transformers.MultiVectorEncoder`"),
    "pylate": ("the same retriever", "`pylate.models.ColBERT`, `sentence_transformers.MultiVectorEncoder`"),
}


def export_run(cfg: Config, dst: str | os.PathLike[str], *, arm: str = "jmlr", with_index: bool = False) -> None:
    """Writes the weights that an arm ended with, as ``DST/{generator,adapters,colbert,pylate}`` and ``DST/README.md``.

    ``adapters`` is there after training with LoRA on a published base; ``colbert`` and ``pylate`` if the arm retrieves.
    `dst` appears whole or not at all.

    Args:
        cfg: the run's configuration; its mesh may be another one than it was trained on.
        dst: a new directory.
        arm: whose weights.
        with_index: adds passages and index, so that ``jmlr ask`` and ``jmlr serve`` work from `dst` alone.

    Raises:
        JmlrError: no such run, or several seeds in one directory, or a program of several hosts; with an index, a `dst`
            that is not of this machine, or an arm that reads passages of chance.
        DataError: the arm has not been trained to its end.
        HFError: `dst` exists, or Hugging Face cannot express what was trained.
    """
    _check_run(cfg.run_dir)
    if with_index:
        check_local(os.fspath(dst))
        if PHASES[arm].passages == "random":
            raise JmlrError(
                f"--with-index --arm {arm}: passages drawn by chance answer nothing; leave out --with-index"
            )
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
        if with_index:
            write_carried(run, arm, trust_of(run, arm), some_questions(run), Path(folder))
        card = _card(run, arm, {name: text for name, text in FOLDERS.items() if name in written})
        for place in (folder, *(folder / name for name in written)):
            (place / "README.md").write_text(card)


def _check_run(run_dir: str) -> None:
    folder = local_path(run_dir)
    if not folder.is_dir():
        raise JmlrError(f"{run_dir}: no such run directory")
    seeds = sorted(path.name for path in folder.iterdir() if path.name.startswith("seed_"))
    if seeds and not (folder / "arms").exists():
        raise JmlrError(f"{run_dir}: holds the runs {', '.join(seeds)}; name one of them")
    if jax.process_count() > 1:
        raise JmlrError("export runs on one host: start it on one machine that reads the run directory")


def _write_generator(run: Run, folder: AnyPath, weights: Any, console: Console) -> set[str]:
    """Folders ``generator`` and, where there are adapters to a published base, ``adapters``; returns their names."""
    cfg, prepared = run.cfg.generator, run.prepared
    lora = None if cfg.lora is None else Lora(cfg.lora, weights)
    params = weights if lora is None else run.initial_weights()["base"]
    outer, tokenizer = _described(cfg.source), prepared.tokenizer_dir("generator")
    like = None if outer is None else text_of(outer, cfg.source)
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
            base, rows, nested = absolute(cfg.source), like["vocab_size"], like is not outer
            write_adapters(_made(folder, "adapters"), run.llama, lora, base, rows, tokenizer, nested=nested)
            written.add("adapters")
    _copy_legal(cfg.source, folder, list(written))
    return written


def _described(source: str) -> Mapping[str, Any] | None:
    """config.json of the checkpoint that training began from; None if it began from random weights."""
    return None if source == "scratch" else read_json(any_path(source) / "config.json")


def _made(folder: AnyPath, name: str) -> AnyPath:
    (folder / name).mkdir()
    return folder / name


def _copy_legal(source: str, folder: AnyPath, names: list[str]) -> None:
    for name in names if source != "scratch" else ():
        copy_legal_files(source, folder / name)


def _card(run: Run, arm: str, folders: Mapping[str, tuple[str, str]]) -> str:
    """The model card, from the files of the run."""
    recorded = read_run(run.directory, run.directory.name, "test")
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
