"""``jmlr plan``: does it fit, how long does a step take, what does an epoch cost, asked of the TPU's own compiler.

The programs that training runs (the joint step, the encoding of a corpus, the evaluation) are compiled from shapes
alone, by libtpu, for a slice that need not be there. No data, weights or prepared directory are read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.config import Config, MeshConfig
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.evaluate import evaluate_batch
from jmlr_jax.method.step import StepSpec, init_state, make_step
from jmlr_jax.nn import lora
from jmlr_jax.nn.functional import abstract_params, encode_passages, logical_axes
from jmlr_jax.parallel.libtpu import set_flags
from jmlr_jax.parallel.sharding import (
    ShardingError,
    batch_sharding,
    check_rows,
    make_mesh,
    partition_spec,
    replicated_report,
    shardings,
)
from jmlr_jax.planning.estimate import Estimate, estimate
from jmlr_jax.planning.flops import CHIPS, GIB, Chip, Work, step_work
from jmlr_jax.planning.hlo import parse
from jmlr_jax.retrieval.encode import encode_batch
from jmlr_jax.training.optimizer import make_optimizer, state_shardings

SPARE = 0.05  # share of the memory that a plan should leave: the compiler's count is not the runtime's
OPTIONS = 5  # continuations of a question in evaluation: four options and the right answer
MEDQA_QUESTIONS = 10_178
LARGE = 2**20  # bytes: arrays of at least this size should not stand whole on every chip
_OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm"
    r"|temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


class PlanError(JmlrError):
    """A plan cannot be made; the message names the setting."""


@dataclass(frozen=True)
class Program:
    """What the compiler said of one program; memory in bytes per chip.

    Attributes:
      parts: memory by what it holds; they add up to `used`.
      estimate: None where the program does not fit, since then there is no program.
    """

    parts: dict[str, float]
    used: float
    available: float
    estimate: Estimate | None

    @property
    def fits(self) -> bool:
        """Whether it compiled."""
        return self.estimate is not None

    @property
    def spare(self) -> float:
        """Share of the memory that is left."""
        return 1 - self.used / self.available


@dataclass(frozen=True)
class Plan:
    """A configuration on a slice.

    Attributes:
      replicated: weights and moments of at least LARGE bytes that every chip holds whole, with their bytes.
      encode, evaluate: None where only the step was asked for.
    """

    cfg: Config
    topology: str
    chip: Chip
    mesh: dict[str, int]
    work: Work
    replicated: list[tuple[str, int]]
    step: Program
    encode: Program | None = None
    evaluate: Program | None = None

    @property
    def chips(self) -> int:
        """Of the slice."""
        return math.prod(self.mesh.values())

    @property
    def seconds(self) -> float | None:
        """Of one step, estimated."""
        return self.step.estimate.total if self.step.estimate else None

    @property
    def mfu(self) -> float | None:
        """FLOPs that METHOD needs over those the chips could have done in the time."""
        if self.seconds is None:
            return None
        return self.work.total * self.cfg.train.batch_size / (self.seconds * self.chips * self.chip.peak)

    @property
    def epoch_hours(self) -> float | None:
        """Training steps for every question of MedQA once; refreshes and evaluations are not in it."""
        if self.seconds is None:
            return None
        return math.ceil(MEDQA_QUESTIONS / self.cfg.train.batch_size) * self.seconds / 3600


def make_plan(cfg: Config, topology: str | None = None, *, whole: bool = True) -> Plan:
    """Compiles a configuration for a slice; minutes for a large model.

    Args:
        topology: generation and shape in chips, as ``v5e:4x4``; None takes ``mesh.topology``.
        whole: the encoding and evaluation programs too, not the joint step alone.

    Raises:
        PlanError: no topology, an unknown one, or a vocabulary size that only the data would tell.
        ShardingError: the mesh, the batch or a weight does not divide over the chips.
    """
    name = topology or cfg.mesh.topology
    if name is None:
        raise PlanError("which slice? give --topology, e.g. --topology v5e:4x4, or set mesh.topology")
    chip, devices = slice_of(name)
    mesh = make_mesh(cfg.mesh, devices)
    check_rows(mesh, cfg.train.batch_size // cfg.train.accumulate, "train.batch_size / train.accumulate")
    programs = {"step": step_program} | ({"encode": encode_program, "evaluate": evaluate_program} if whole else {})
    window = cfg.generator.llama.sliding_window
    sources = {key: make(cfg, mesh) for key, make in programs.items()}
    state, frozen, _ = sources["step"].arguments
    replicated = replicated_report({"state": state, "frozen": frozen}, LARGE)
    compiled = {key: _compile(source, chip, window) for key, source in sources.items()}
    return Plan(cfg, name, chip, dict(mesh.shape), step_work(resolved(cfg)), replicated, **compiled)


def search(cfg: Config, topology: str | None = None) -> Iterator[Plan]:
    """Plans of the joint step for every mesh of the slice and every number of microbatches that divides, one by one.

    Meshes whose weights and optimizer alone exceed the memory are left out. Errors as :func:`make_plan`.
    """
    name = topology or cfg.mesh.topology
    if name is None:
        raise PlanError("which slice? give --topology, e.g. --topology v5e:4x4, or set mesh.topology")
    chip, devices = slice_of(name)
    count = len(devices)
    for tensor in (t for t in range(1, count + 1) if count % t == 0):
        for data in (d for d in range(1, count // tensor + 1) if count // tensor % d == 0):
            sizes = MeshConfig(data=data, fsdp=count // tensor // data, tensor=tensor, topology=name)
            for accumulate in (a for a in range(1, cfg.train.batch_size + 1) if cfg.train.batch_size % a == 0):
                train = cfg.train.model_copy(update={"accumulate": accumulate})
                one = cfg.model_copy(update={"mesh": sizes, "train": train})
                try:
                    mesh = make_mesh(sizes, devices)
                    arguments = step_program(one, mesh).arguments
                    check_rows(mesh, train.batch_size // accumulate, "train.batch_size")
                except ShardingError:
                    continue
                if shard_bytes(arguments) < chip.hbm:
                    yield make_plan(one, name, whole=False)


def slice_of(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice, as the TPU compiler describes it.

    Raises:
        PlanError: libtpu is not installed, or it knows no such slice.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise PlanError(f"topology {topology!r}: generation {generation!r} is not one of {', '.join(CHIPS)}")
    # libtpu looks for a TPU's metadata unless it is told that there is none.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for key, value in (quiet | {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(key, value)
    set_flags()
    from jax.experimental import topologies

    more = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # whatever libtpu raises: the user's to mend in any case
        hint = "" if "libtpu" not in str(error) else "; pip install 'jmlr_jax[plan]' brings the TPU compiler"
        raise PlanError(f"topology {topology!r}: {str(error).splitlines()[0]}{hint}") from error
    return CHIPS[generation], list(found.devices)


def resolved(cfg: Config) -> Config:
    """The configuration with vocabulary sizes where a trained tokenizer decides them.

    Raises:
        PlanError: a size that is 0 with a published tokenizer.
    """
    llama, bert = cfg.generator.llama, cfg.retriever.bert
    sizes = {}
    for key, half, shape in (("generator", cfg.generator, llama), ("retriever", cfg.retriever, bert)):
        sizes[key] = shape.vocab_size or (half.tokenizer_vocab if half.tokenizer == "train" else 0)
        if not sizes[key]:
            field = "generator.llama" if key == "generator" else "retriever.bert"
            raise PlanError(f"{field}.vocab_size=0: a plan reads no tokenizer; set it to that of {half.tokenizer}")
    llama = llama.model_copy(update={"vocab_size": sizes["generator"]})
    bert = bert.model_copy(update={"vocab_size": sizes["retriever"]})
    generator = cfg.generator.model_copy(update={"llama": llama})
    return cfg.model_copy(update={"generator": generator, "retriever": cfg.retriever.model_copy(update={"bert": bert})})


class Source(NamedTuple):
    """A program before it is compiled.

    Attributes:
      lower: of its arguments, gives what can be compiled.
      arguments: shapes with their places.
      optimizer: the part of them that is moments; the rest but `batch` is weights.
    """

    lower: Callable[..., Any]
    arguments: tuple[Any, ...]
    optimizer: Any
    batch: Any


def step_program(cfg: Config, mesh: Mesh) -> Source:
    """The joint step of the ``jmlr`` phase as :mod:`jmlr_jax.training.loop` compiles it, with abstract arguments."""
    cfg = resolved(cfg)
    llama, retriever, train, g = cfg.generator.llama, cfg.retriever, cfg.train, cfg.generator
    weights = abstract_weights(cfg, mesh)
    params = {name: weights.pop(name) for name in ("retriever", "generator")}
    if retriever.lora is not None:
        adapters = lora.abstract_lora(retriever.lora, retriever)
        axes = lora.lora_axes(retriever.lora, retriever)
        weights["retriever_base"] = params["retriever"]
        params["retriever"] = jax.tree.map(_put, adapters, shardings(mesh, axes, adapters))
    placed = jax.tree.map(lambda x: x.sharding, params)
    optimizer = make_optimizer(train, train.steps)
    replicated = NamedSharding(mesh, PartitionSpec())
    counters = dict.fromkeys(("step", "key", "skipped", "skipped_in_row"), replicated)
    layout = {**counters, "params": placed, "opt": state_shardings(optimizer, params, placed, replicated)}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = jax.tree.map(_put, jax.eval_shape(partial(init_state, optimizer=optimizer), params, key=key), layout)
    skip_V = _put(jax.ShapeDtypeStruct((retriever.bert.vocab_size,), jnp.bool_), replicated)
    B, K, rows = train.batch_size, train.candidates, partial(_rows, mesh)
    batch = {
        "query_ids_BxQ": rows(B, retriever.query_length),
        "query_len_B": rows(B),
        "passage_ids_BxKxP": rows(B, K, retriever.passage_length),
        "passage_len_BxK": rows(B, K),
        "reader_ids_BxKxL": rows(B, K, g.passage_length),
        "reader_len_BxK": rows(B, K),
        "question_ids_BxS": rows(B, g.question_length),
        "question_len_B": rows(B),
        "answer_ids_BxA": rows(B, g.answer_length),
        "answer_len_B": rows(B),
        "valid_BxK": rows(B, K, dtype=jnp.bool_),
    }
    spec = StepSpec(retriever, llama, g.lora, train, g.max_length, 1, 0, True, True, train.read_passages)
    step = jax.jit(make_step(spec, optimizer), donate_argnums=0, out_shardings=(layout, None))
    return Source(partial(_lower, mesh, step.lower), (state, weights | {"skip_V": skip_V}, batch), state["opt"], batch)


def encode_program(cfg: Config, mesh: Mesh) -> Source:
    """One batch of the corpus through the retriever, as a refresh runs it."""
    cfg = resolved(cfg)
    retriever, replicated = cfg.retriever, NamedSharding(mesh, PartitionSpec())
    count = -(-cfg.index.encode_batch // mesh.size) * mesh.size
    spread = NamedSharding(mesh, partition_spec(("encoder_batch",), "encoded rows"))
    ids = jax.ShapeDtypeStruct((count, retriever.passage_length), jnp.int32, sharding=spread)
    length = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=spread)
    skip_V = jax.ShapeDtypeStruct((retriever.bert.vocab_size,), jnp.bool_, sharding=replicated)
    params = abstract_weights(cfg, mesh)["retriever"]
    lower = partial(encode_batch.lower, encode=encode_passages, cfg=retriever, replicated=replicated)
    return Source(partial(_lower, mesh, lower), (params, ids, length, skip_V), (), (ids, length))


def evaluate_program(cfg: Config, mesh: Mesh) -> Source:
    """One batch of evaluation: likelihoods of the options with and without passages, and a generated answer."""
    cfg = resolved(cfg)
    llama, g, B = cfg.generator.llama, cfg.generator, cfg.eval.batch_size
    check_rows(mesh, B, "eval.batch_size")
    rows, N = partial(_rows, mesh), cfg.train.read_passages
    weights = abstract_weights(cfg, mesh)
    params, adapters = weights["generator"], None
    if g.lora is not None:
        params, adapters = weights["base"], lora.bind(weights["generator"], g.lora)
    batch = {
        "reader_ids_BxKxL": rows(B, N, g.passage_length),
        "reader_len_BxK": rows(B, N),
        "question_ids_BxS": rows(B, g.question_length),
        "question_len_B": rows(B),
        "option_ids_BxOxA": rows(B, OPTIONS, g.answer_length),
        "option_len_BxO": rows(B, OPTIONS),
    }
    lower = partial(
        evaluate_batch.lower,
        cfg=llama,
        ids=GeneratorIds(1, 2, 0, llama.vocab_size),
        total=g.max_length - g.answer_length,
        replicated=NamedSharding(mesh, PartitionSpec()),
    )
    return Source(partial(_lower, mesh, lower), (params, adapters, batch), (), batch)


def abstract_weights(cfg: Config, mesh: Mesh) -> dict[str, Any]:
    """``retriever``, ``generator`` and, under adapters, ``base``, as shapes with their place on the mesh."""
    llama, retriever, adapters = cfg.generator.llama, cfg.retriever, cfg.generator.lora
    trees: dict[str, Any] = {"retriever": abstract_params(retriever), "base": abstract_params(llama)}
    axes: dict[str, Any] = {"retriever": logical_axes(retriever), "base": logical_axes(llama)}
    if adapters is None:
        trees["generator"], axes["generator"] = trees.pop("base"), axes.pop("base")
    else:
        trees["generator"] = lora.abstract_lora(adapters, llama)
        axes["generator"] = lora.lora_axes(adapters, llama)
    return jax.tree.map(_put, trees, shardings(mesh, axes, trees))


def shard_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _put(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _lower(mesh: Mesh, lower: Callable[..., Any], *arguments: Any) -> Any:
    with jax.set_mesh(mesh):
        return lower(*arguments)


def _compile(source: Source, chip: Chip, window: int | None) -> Program:
    """Memory by part and seconds of a program on its chips."""
    optimizer, batch = shard_bytes(source.optimizer), shard_bytes(source.batch)
    weights = shard_bytes(source.arguments) - optimizer - batch
    parts = {"weights": weights, "optimizer": optimizer, "batch": batch}
    try:
        compiled = source.lower(*source.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        alone = found[1] is None  # the compiler gave up on the temporaries before it had counted the rest
        used, available = (float(found[i]) * _UNITS[found[i + 1]] for i in ((5, 7) if alone else (1, 3)))
        used += sum(parts.values()) if alone else 0
        return Program(parts | {"temporaries": used - sum(parts.values())}, used, available, None)
    memory = compiled.memory_analysis()
    # Of arguments the compiler counts what it pads to its tiles, and not what the program never reads.
    parts["weights"] = memory.argument_size_in_bytes - optimizer - batch
    parts["temporaries"] = memory.temp_size_in_bytes
    parts["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts["code"] = memory.generated_code_size_in_bytes
    operations = parse(compiled.as_text()).operations()
    return Program(parts, sum(parts.values()), chip.hbm, estimate(operations, chip, window))
