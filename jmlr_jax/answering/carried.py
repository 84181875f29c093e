"""What `jmlr export --with-index` adds to an export so that it can be asked on another machine.

``DST/answering.json`` (who answers, how sure, examples), ``config.yaml``, ``data/`` (passages, their tokens, the
tokenizers; no training questions) and ``index/NAME/``, beside ``generator/`` and ``pylate/``, which are the models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from pydantic import BaseModel, ConfigDict, ValidationError

from jmlr_jax import config_io
from jmlr_jax.answering.trust import Trust
from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig, RetrieverConfig
from jmlr_jax.data import batches
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.schema import SPLITS, Question
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.reading import Reader
from jmlr_jax.files import write_text
from jmlr_jax.hf.load import load_generator, load_retriever
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.retrieval.bm25 import BM25
from jmlr_jax.retrieval.shards import Shards
from jmlr_jax.retrieval.store import IndexUnusable, params_fingerprint
from jmlr_jax.run.index import index_home
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES, PassageSource, trained_retriever
from jmlr_jax.run.weights import INITIAL

CARD = "answering.json"
TABLES = ("passages", "references")
KEPT = ("lengths", "retriever_ids", "generator_ids", "augment_queries", "max_options")  # of data/prepare.json


class CarriedError(JmlrError):
    """An exported folder that cannot be asked; the message names the file."""


class Card(BaseModel):
    """Who answers in an exported folder: the content of ``answering.json``.

    ``source`` is where the arm's passages come from: retriever, bm25, none. ``passages`` is the fingerprint of the
    tokenised corpus that the index was built of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    format: int = 1
    arm: str
    source: PassageSource
    passages: str
    trust: Trust
    examples: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Carried:
    """An exported folder, opened; what :class:`jmlr_jax.run.open.Run` is for a run."""

    cfg: Config
    directory: Path
    prepared: Prepared
    mesh: Mesh
    card: Card

    @classmethod
    def open(cls, directory: Path, cfg: Config) -> Carried:
        """Opens what :func:`write_carried` wrote.

        Raises:
          CarriedError: the card is not readable, or of another version.
        """
        path = directory / CARD
        try:
            card = Card.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise CarriedError(f"{path}: not readable ({str(error).splitlines()[0]}); export the run again") from None
        if card.format != 1:
            raise CarriedError(f"{path}: of format {card.format}, another version of jmlr; export the run again")
        return cls(cfg, directory, Prepared.open(directory / "data"), make_mesh(cfg.mesh), card)

    @cached_property
    def _generator(self) -> tuple[LlamaConfig, Any]:
        asked, tokens = self.cfg.generator.llama, self.prepared.generator_ids.vocab_size
        return load_generator(str(self.directory / "generator"), asked, self.mesh, tokens=tokens)

    @cached_property
    def _retriever(self) -> tuple[RetrieverConfig, Any]:
        cfg, tokens = self.cfg.retriever, self.prepared.retriever_ids.vocab_size
        # Nothing is drawn: the projection is in the folder.
        return load_retriever(str(self.directory / "pylate"), cfg, jax.random.key(0), self.mesh, tokens=tokens)

    @property
    def llama(self) -> LlamaConfig:
        """Shape of the generator."""
        return self._generator[0]

    @property
    def retriever(self) -> RetrieverConfig:
        """Shape of the retriever."""
        return self._retriever[0]

    @property
    def retriever_params(self) -> Any:
        """Weights of the retriever."""
        return self._retriever[1]

    @cached_property
    def reader(self) -> Reader:
        """The generator, adapters merged."""
        tokenizer = load_tokenizer(self.prepared.tokenizer_dir("generator"))
        llama, params = self._generator
        return Reader(params, llama, lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)))

    @cached_property
    def lexical(self) -> BM25:
        """BM25 over the passages."""
        return BM25([f"{passage.title} {passage.text}" for passage in self.prepared.passages])

    def open_index(self) -> Shards | None:
        """The index of the retriever; None where the arm does not retrieve.

        Raises:
          IndexUnusable: it is damaged, or not of these weights.
        """
        if self.card.source != "retriever":
            return None
        fingerprint = params_fingerprint(jax.device_get(self.retriever_params))
        return Shards.open(self.directory / "index", fingerprint, self.card.passages, len(self.prepared.passages))


def write_carried(run: Run, arm: str, trust: Trust, examples: Sequence[Question], folder: Path) -> None:
    """Adds what makes an export of `arm` askable.

    Args:
      trust: of the arm; `examples`: questions to offer.
      folder: the export, on this machine.

    Raises:
      IndexUnusable: the arm retrieves, and its index is not there whole.
    """
    passages = PHASES[arm].passages
    source: PassageSource = "retriever" if passages in ("live", "retriever") else passages
    if source == "retriever":
        home = index_home(run, trained_retriever(arm) or INITIAL)
        if not (home / "card.json").is_file():
            raise IndexUnusable(f"{home}: no whole index here to carry along; run `jmlr index` in one process")
        shutil.copytree(home, folder / "index")
    data = folder / "data"
    (data / "tokens").mkdir(parents=True)
    for name in ("corpus", "tokenizers"):
        shutil.copytree(run.prepared.directory / name, data / name)
    tokens = run.prepared.directory / "tokens"
    for name in (*(f"{table}.{part}.npy" for table in TABLES for part in ("ids", "offsets")), "skip.npy"):
        shutil.copyfile(tokens / name, data / "tokens" / name)
    kept = {name: run.prepared.card[name] for name in KEPT}
    write_text(data / batches.CARD, json.dumps(kept, indent=1) + "\n")
    # Where the questions lay is nobody's business elsewhere; the folder's own place is said when it is opened.
    nowhere = {f"{name}_path": None for name in (*SPLITS, "corpus")}
    cfg = run.cfg.model_copy(update={"run_dir": ".", "data": run.cfg.data.model_copy(update=nowhere)})
    config_io.save_resolved(cfg, folder / config_io.RESOLVED_NAME)
    asked = tuple(Question(q.id, q.question, q.options, q.answer, q.answer_index) for q in examples)
    card = Card(arm=arm, source=source, passages=run.fingerprints["passages"], trust=trust, examples=asked)
    write_text(folder / CARD, card.model_dump_json(indent=1) + "\n")
