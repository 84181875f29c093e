"""The programs that a plan compiles, with arguments that are shapes alone: the joint step, encoding, evaluation.

Each is the function that a run calls, of the same builder, at the widths of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jmlr_jax.config import Config
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation.reading import evaluate_batch
from jmlr_jax.nn import lora
from jmlr_jax.nn.abstract import abstract_weights
from jmlr_jax.nn.functional import encode_passages
from jmlr_jax.parallel.placement import replicated, rows_shape
from jmlr_jax.parallel.sharding import check_rows, partition_spec
from jmlr_jax.retrieval.encode import encode_batch
from jmlr_jax.run.phases import PHASES
from jmlr_jax.training.program import batch_shapes, phase_program

CHAT_OPENING = 4  # tokens that Gemma's chat template opens with; a plan reads no template
OPTIONS = 5  # continuations of a question in evaluation: four options and the right answer
BOS, EOS, PAD = 1, 2, 0  # of a tokenizer that a plan does not read; which ids they are changes no cost


class PlanError(JmlrError):
    """A plan cannot be made; the message names the setting."""


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


def resolved(cfg: Config) -> Config:
    """The configuration with vocabulary sizes where a trained tokenizer decides them.

    Raises:
        PlanError: a size that is 0 with a published tokenizer.
    """
    llama, bert = cfg.generator.llama, cfg.retriever.bert
    sizes = {}
    for key, half, shape in (("generator", cfg.generator, llama), ("retriever", cfg.retriever, bert)):
        sizes[key] = shape.vocab_size or (half.tokenizer_vocab if half.tokenizer_place is None else 0)
        if not sizes[key]:
            field = "generator.llama" if key == "generator" else "retriever.bert"
            place = half.tokenizer_place
            raise PlanError(f"{field}.vocab_size=0: a plan reads no tokenizer; set it to that of {place}")
    llama = llama.model_copy(update={"vocab_size": sizes["generator"]})
    bert = bert.model_copy(update={"vocab_size": sizes["retriever"]})
    generator = cfg.generator.model_copy(update={"llama": llama})
    return cfg.model_copy(update={"generator": generator, "retriever": cfg.retriever.model_copy(update={"bert": bert})})


def step_program(cfg: Config, mesh: Mesh) -> Source:
    """The joint step of the ``jmlr`` phase, as :mod:`jmlr_jax.training.loop` runs it."""
    cfg = resolved(cfg)
    program = phase_program(cfg, PHASES["jmlr"], cfg.retriever, cfg.generator.llama, _ids(cfg), cfg.train.steps, mesh)
    batch = batch_shapes(cfg, PHASES["jmlr"], mesh)
    arguments = program.state, program.frozen, batch
    return Source(partial(_lower, mesh, program.step.lower), arguments, program.state["opt"], batch)


def encode_program(cfg: Config, mesh: Mesh) -> Source:
    """One batch of the corpus through the retriever, as a refresh runs it."""
    cfg = resolved(cfg)
    retriever, whole = cfg.retriever, replicated(mesh)
    count = -(-cfg.index.encode_batch // mesh.size) * mesh.size
    spread = NamedSharding(mesh, partition_spec(("encoder_batch",), "encoded rows"))
    ids = jax.ShapeDtypeStruct((count, retriever.passage_length), jnp.int32, sharding=spread)
    length = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=spread)
    skip_V = jax.ShapeDtypeStruct((retriever.bert.vocab_size,), jnp.bool_, sharding=whole)
    params = abstract_weights(retriever, cfg.generator.llama, cfg.generator.lora, mesh)["retriever"]
    lower = partial(encode_batch.lower, encode=encode_passages, cfg=retriever, replicated=whole)
    return Source(partial(_lower, mesh, lower), (params, ids, length, skip_V), (), (ids, length))


def evaluate_program(cfg: Config, mesh: Mesh) -> Source:
    """One batch of evaluation: likelihoods of the options with and without passages, and a generated answer."""
    cfg = resolved(cfg)
    llama, g, B = cfg.generator.llama, cfg.generator, cfg.eval.batch_size
    check_rows(mesh, B, "eval.batch_size")
    rows, N = partial(rows_shape, mesh), cfg.train.read_passages
    weights = abstract_weights(cfg.retriever, llama, g.lora, mesh)
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
        evaluate_batch.lower, cfg=llama, ids=_ids(cfg), max_length=g.max_length, replicated=replicated(mesh)
    )
    return Source(partial(_lower, mesh, lower), (params, adapters, batch), (), batch)


def _ids(cfg: Config) -> GeneratorIds:
    head = (BOS,) * CHAT_OPENING if cfg.generator.chat else ()
    return GeneratorIds(BOS, EOS, PAD, cfg.generator.llama.vocab_size, head)


def _lower(mesh: Mesh, lower: Callable[..., Any], *arguments: Any) -> Any:
    with jax.set_mesh(mesh):
        return lower(*arguments)
