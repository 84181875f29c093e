"""A run directory with what every stage needs of it: configuration, data, mesh, model shapes, initial weights.

``RUN/config.yaml data/ arms/PHASE/ index/NAME/ eval/ timing.json report.*``
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jmlr_jax import config_io
from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig, RetrieverConfig
from jmlr_jax.data.batches import CARD, Prepared
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import local_path, read_sealed, write_sealed
from jmlr_jax.hf.follow import followed
from jmlr_jax.hf.load import load_generator, load_retriever
from jmlr_jax.nn import lora
from jmlr_jax.nn.abstract import abstract_adapters, abstract_weights
from jmlr_jax.nn.copying import favour_copying
from jmlr_jax.nn.functional import init_colbert, init_llama
from jmlr_jax.parallel.distributed import DistributedError, check_same, gather, is_first, on_first
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.retrieval.bm25 import BM25
from jmlr_jax.retrieval.vectors import drawn_rows
from jmlr_jax.run.artifact import ArtifactError, Recipe, check_files, refuse
from jmlr_jax.run.recipes import data_recipe
from jmlr_jax.seeds import derived

Weights = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One seed's run; see the module docstring for its directory."""

    cfg: Config
    directory: Path
    prepared: Prepared
    mesh: Mesh

    @classmethod
    def open(cls, cfg: Config) -> Run:
        """Opens a prepared run directory; several processes open the same one together.

        Raises:
          DistributedError: they were started with different configurations, or do not see the same directory.
          FileNotFoundError: `jmlr prepare` has not run.
          ArtifactError: the data were prepared with other values or from other files.
          ShardingError: the mesh does not fit the devices.
        """
        directory, cfg = local_path(cfg.run_dir), followed(cfg)
        check_same("the configuration", config_io.to_yaml(cfg), "start the same command in every process")
        on_first(lambda: _check_data(cfg, directory / "data"))
        sees = gather((directory / "data" / CARD).is_file())
        if not all(sees):
            raise DistributedError(
                f"{directory}: process {sees.index(False)} does not see the data that process 0 sees; a run directory "
                "is one folder that all processes share (docs/tpu.md)"
            )
        return cls(cfg, directory, Prepared.open(directory / "data"), make_mesh(cfg.mesh))

    def seed(self, *purpose: str | int) -> int:
        """The run's seed for one purpose; see :func:`jmlr_jax.seeds.derived`."""
        return derived(self.cfg.seed, *purpose)

    def _key(self, purpose: str) -> jax.Array:
        return jax.random.key(self.seed("first weights", purpose))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the prepared data, by name, for recipes."""
        found: dict[str, str] = self.prepared.card["fingerprints"]
        return found

    @cached_property
    def retriever(self) -> RetrieverConfig:
        """The retriever's shape with its vocabulary resolved."""
        return self._initial[0]

    @cached_property
    def llama(self) -> LlamaConfig:
        """The generator's shape with its vocabulary resolved."""
        return self._initial[1]

    @cached_property
    def lexical(self) -> BM25:
        """BM25 over the passages."""
        return BM25([f"{passage.title} {passage.text}" for passage in self.prepared.passages])

    @cached_property
    def dev_rows(self) -> np.ndarray:
        """Rows of the dev questions that checkpoints are compared on, int64.

        Drawn: files are often sorted by source or kind, and the first of them would speak for one kind.
        """
        return drawn_rows(len(self.prepared.questions("dev")), self.cfg.train.dev_questions, self.seed("dev questions"))

    def initial_weights(self) -> Weights:
        """``retriever``, ``generator`` and, under adapters, ``base``, placed on the mesh.

        The trees are the caller's, the arrays the run's own: what gives arrays away (a step its state) copies them.
        """
        return jax.tree.map(lambda x: x, self._initial[2])

    def retriever_adapters(self) -> Weights:
        """Adapters of ``retriever.lora`` that change nothing yet, placed on the mesh.

        A phase that trains the retriever adds them to the weights it starts from and ends with plain weights again.
        """
        retriever = self.retriever
        assert retriever.lora is not None
        with jax.set_mesh(self.mesh):
            made = lora.init_lora(retriever.lora, retriever, self._key("adapters of the retriever"))
            shapes = abstract_adapters(retriever.lora, retriever, self.mesh)
            return jax.device_put(made, jax.tree.map(lambda x: x.sharding, shapes))

    @cached_property
    def _initial(self) -> tuple[RetrieverConfig, LlamaConfig, Weights]:
        """Shapes and weights before any training, from Hugging Face directories or from the seed alone."""
        cfg, mesh, ids = self.cfg, self.mesh, self.prepared
        weights: Weights = {}
        retriever_key = self._key("retriever")
        with jax.set_mesh(mesh):
            if cfg.retriever.source == "scratch":
                bert = cfg.retriever.bert.model_copy(update={"vocab_size": ids.retriever_ids.vocab_size})
                retriever = cfg.retriever.model_copy(update={"bert": bert})
                weights["retriever"] = init_colbert(retriever, retriever_key)
            else:
                retriever, weights["retriever"] = load_retriever(
                    cfg.retriever.source, cfg.retriever, retriever_key, mesh, tokens=ids.retriever_ids.vocab_size
                )
            if retriever.lora is not None:
                lora.abstract_lora(retriever.lora, retriever)  # a wrong name is told before anything trains
            if cfg.generator.source == "scratch":
                llama = cfg.generator.llama.model_copy(update={"vocab_size": ids.generator_ids.vocab_size})
                base = init_llama(llama, self._key("generator"))
                base = favour_copying(base, llama, cfg.generator.copy_init, self._key("copying heads"))
            else:
                llama, base = load_generator(
                    cfg.generator.source, cfg.generator.llama, mesh, tokens=ids.generator_ids.vocab_size
                )
            if cfg.generator.lora is None:
                weights["generator"] = base
            else:
                weights["base"] = base
                weights["generator"] = lora.init_lora(cfg.generator.lora, llama, self._key("adapters of the generator"))
        shapes = abstract_weights(retriever, llama, cfg.generator.lora, mesh)
        return retriever, llama, jax.device_put(weights, jax.tree.map(lambda x: x.sharding, shapes))

    def abstract(self, names: tuple[str, ...]) -> Weights:
        """Shape, dtype and sharding of the named parts of the weights, for restoring them from disk."""
        shapes = abstract_weights(self.retriever, self.llama, self.cfg.generator.lora, self.mesh)
        return {name: shapes[name] for name in names}

    def gold(self, split: str) -> list[list[int]]:
        """Rows of the gold passages of each question, for metrics alone."""
        table = self.prepared.tokens(f"{split}.gold")
        return [table.row(row).tolist() for row in range(len(table))]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``timing.json`` under `name` and "total"; process 0's are kept."""
        path, start = self.directory / "timing.json", time.monotonic()
        on_first(lambda: read_sealed(path))  # a damaged one is told before anything is done
        try:
            yield
        finally:
            if is_first():
                _add_seconds(path, (name, "total"), time.monotonic() - start)


def _check_data(cfg: Config, folder: Path) -> None:
    """Refuses prepared data that are damaged, or not those of the configuration."""
    made = Recipe.read(folder)
    if made is None:
        Prepared.open(folder)  # says that there are none
        raise ArtifactError(f"{folder}: prepared by an earlier version of jmlr; run `jmlr prepare` again")
    check_files(folder)
    asked = data_recipe(cfg, folder, made)
    refuse(
        asked,
        asked.differences(made),
        f"give the values that the data were prepared with ({folder.parent / config_io.RESOLVED_NAME} has them all: "
        "leave out --config), or run `jmlr prepare` with these",
    )


def _add_seconds(path: Path, names: tuple[str, ...], more: float) -> None:
    seconds = read_sealed(path)
    for name in names:
        seconds[name] = round(seconds.get(name, 0.0) + more, 3)
    write_sealed(path, seconds)


class DataError(JmlrError):
    """The prepared data cannot serve what was asked of it."""
