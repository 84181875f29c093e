"""What a phase computes, compiled: the one builder of its first state, its step and its dev loss.

The loop runs these programs and ``jmlr plan`` compiles them from shapes. Arms whose phases differ in nothing that a
step reads (where their passages come from, which weights they start with) get the very same jitted functions, so
that each program is traced and compiled once in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jmlr_jax.config import Config, OptimizerConfig
from jmlr_jax.config_models import LlamaConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.method.step import State, StepSpec, Weights, init_state, judge_probe, make_step, reading_loss
from jmlr_jax.nn.abstract import abstract_adapters, abstract_weights, put
from jmlr_jax.parallel.placement import replicated, rows_shape
from jmlr_jax.parallel.sharding import check_rows
from jmlr_jax.run.phases import Phase
from jmlr_jax.training.optimizer import make_optimizer, state_shardings

KEPT = 8  # programs: those of all arms are five


@dataclass(frozen=True, eq=False)
class PhaseProgram:
    """The functions of a phase; run them under ``jax.set_mesh``.

    Attributes:
      spec: what is static in them.
      state, frozen: what the step takes, as shapes with their places on the mesh.
      start: jitted ``(params, key=) -> state``, the state before the first step; `params` are copied.
      step: jitted ``(state, frozen, batch) -> (state, metrics)``; it gives `state` away and lays out the next alike.
      dev: jitted ``(params, frozen, batch) -> nll_B``, the answer loss of held-out questions.
      probe: jitted ``(params, frozen, batch) -> nll_BxK``, judgements of all candidates.
    """

    spec: StepSpec
    state: State
    frozen: Weights
    start: Callable[..., State]
    step: Any  # the jitted function, whose `lower` plans use
    dev: Callable[..., jax.Array]
    probe: Callable[..., jax.Array]


def phase_program(
    cfg: Config, phase: Phase, retriever: RetrieverConfig, llama: LlamaConfig, ids: GeneratorIds, steps: int, mesh: Mesh
) -> PhaseProgram:
    """The program of a phase; equal ones are the same object.

    Args:
      cfg: ``train`` and ``generator`` matter; shapes are those of the next two.
      retriever, llama: shapes with their vocabulary sizes resolved.
      ids: of the generator's tokenizer.
      steps: of the phase, which its learning rates are spread over.

    Raises:
      ShardingError: a microbatch or a weight does not divide over the mesh.
    """
    train = cfg.train
    check_rows(mesh, train.batch_size // train.accumulate, "train.batch_size / train.accumulate")
    spec = StepSpec(
        retriever=retriever,
        llama=llama,
        lora=cfg.generator.lora,
        rank=phase.rank,
        read=phase.read,
        sampled=train.sampled,
        passages=phase.passages_read(train.read_passages),
        rank_loss=train.rank_loss,
        help_margin=train.help_margin,
        rank_weight=train.rank_weight,
        accumulate=train.accumulate,
        judge_decay=train.judge_decay if phase.rank and phase.read else 0.0,
        judge_int8=train.judge_int8 and phase.rank,
        pack=train.pack,
        max_length=cfg.generator.max_length,
        bos_id=ids.begin,
        pad_id=ids.pad,
    )
    rate = train.generator
    if phase.name == "warmup":
        rate = OptimizerConfig(learning_rate=train.warmup.learning_rate)
    return _program(spec, train.retriever, rate, train.importance, steps, mesh)


def batch_shapes(cfg: Config, phase: Phase, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that a phase's step takes (:func:`jmlr_jax.data.batches.assemble`), as shapes with their places."""
    retriever, g, B = cfg.retriever, cfg.generator, cfg.train.batch_size
    K = cfg.train.candidates if phase.passages == "live" else max(1, phase.passages_read(cfg.train.read_passages))
    rows = partial(rows_shape, mesh)
    return {
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


def divide(spec: StepSpec, weights: Weights, adapters: Callable[[], Weights]) -> tuple[Weights, Weights]:
    """What a phase trains, and what its step reads but never changes.

    Args:
      weights: ``retriever``, ``generator`` and, under adapters, ``base``: arrays or shapes.
      adapters: makes those of the retriever, for a phase that trains it by adapters.
    """
    halves = (["retriever"] if spec.rank else []) + (["generator"] if spec.read else [])
    params = {name: weights[name] for name in halves}
    frozen = {name: tree for name, tree in weights.items() if name not in halves}
    if spec.rank and spec.retriever.lora is not None:
        frozen["retriever_base"], params["retriever"] = params["retriever"], adapters()
    return params, frozen


@lru_cache(maxsize=KEPT)
def _program(
    spec: StepSpec,
    retriever: OptimizerConfig,
    generator: OptimizerConfig,
    importance: OptimizerConfig,
    steps: int,
    mesh: Mesh,
) -> PhaseProgram:
    optimizer, whole = make_optimizer(retriever, generator, importance, steps), replicated(mesh)

    def adapters() -> Weights:
        assert spec.retriever.lora is not None
        return abstract_adapters(spec.retriever.lora, spec.retriever, mesh)

    weights = abstract_weights(spec.retriever, spec.llama, spec.lora, mesh)
    params, frozen = divide(spec, weights, adapters)
    begin = partial(init_state, optimizer=optimizer, judge_decay=spec.judge_decay)
    shapes = jax.eval_shape(begin, params, key=jax.ShapeDtypeStruct((2,), jnp.uint32))
    layout: dict[str, Any] = dict.fromkeys(shapes, whole)
    layout["params"] = jax.tree.map(lambda x: x.sharding, params)
    if "judge" in layout:
        layout["judge"] = layout["params"]["generator"]
    layout["opt"] = state_shardings(optimizer, params, layout["params"], whole)
    skip_V = jax.ShapeDtypeStruct((spec.retriever.bert.vocab_size,), jnp.bool_, sharding=whole)
    return PhaseProgram(
        spec=spec,
        state=put(shapes, layout),
        frozen=frozen | {"skip_V": skip_V},
        start=jax.jit(begin, out_shardings=layout),
        # Pinned output layout: a step whose own output came back laid out otherwise would compile a second time.
        step=jax.jit(make_step(spec, optimizer), donate_argnums=0, out_shardings=(layout, None)),
        dev=jax.jit(partial(reading_loss, spec=spec), out_shardings=whole),
        probe=jax.jit(partial(judge_probe, spec=spec), out_shardings=whole),
    )
