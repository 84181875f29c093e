"""The joint training step (method.md, One training step), a pure function compiled once.

What the step is made of stands above it, each piece small enough to hold against the paper; the step itself puts them
together, accumulates over microbatches of questions and applies one update to both halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jmlr_jax.config import RankLossName
from jmlr_jax.config_models import LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.method.losses import answer_nll, pair_accuracy, rank_loss, sampling_entropy
from jmlr_jax.method.prompt import Begin, read_prompt, reading_width
from jmlr_jax.method.scoring import maxsim, minmax, sample, top
from jmlr_jax.nn import lora
from jmlr_jax.nn.functional import encode_passages, encode_queries, llama_hidden, llama_logits
from jmlr_jax.nn.packing import in_fewest_places, learn_in_fewest_places

Batch = dict[str, Array]
Metrics = dict[str, Array]
State = dict[str, Any]
Weights = dict[str, Any]  # halves by name, and skip_V
StepFn = Callable[[State, Weights, Batch], tuple[State, Metrics]]

QUESTION_KEYS = ("question_ids_BxS", "question_len_B", "answer_ids_BxA", "answer_len_B")


@dataclass(frozen=True)
class StepSpec:
    """What is static in a step, and nothing else: phases of equal specs share one compiled step.

    Attributes:
      retriever, llama: shapes of the two models, vocabulary sizes resolved; the former with its adapters.
      lora: adapters on the generator; None trains all of it.
      rank: whether the retriever learns (method.md, steps 1 to 5); without it the first N of the table are read.
      read: whether the generator learns (method.md, step 6).
      sampled: M, how many passages are judged.
      passages: N, how many passages are read.
      rank_loss, help_margin, rank_weight: as in ``TrainConfig``.
      accumulate: microbatches a step.
      judge_decay: as in ``TrainConfig``; 0 where the generator does not learn.
      judge_int8, pack: as in ``TrainConfig``.
      max_length: T, tokens of a reading prompt with its answer, at most.
      bos_id, pad_id: of the generator's tokenizer; under a chat template the former is its whole opening.
    """

    retriever: RetrieverConfig
    llama: LlamaConfig
    lora: LoraConfig | None
    rank: bool
    read: bool
    sampled: int
    passages: int
    rank_loss: RankLossName
    help_margin: float
    rank_weight: float
    accumulate: int
    judge_decay: float
    judge_int8: bool
    pack: tuple[float, ...]
    max_length: int
    bos_id: Begin
    pad_id: int


def live_retriever(cfg: RetrieverConfig, weights: Weights) -> Weights:
    """The retriever as it retrieves. Where adapters train, their base, ``retriever_base``, is there too: then its
    weights are made whole of both, and gradients pass to the adapters."""
    base = weights.get("retriever_base")
    if base is None:
        return weights["retriever"]
    assert cfg.lora is not None
    return lora.merge(base, weights["retriever"], cfg.lora)


@jax.named_scope("encode")  # the names of the parts in profiles and plans
def candidate_scores(spec: StepSpec, weights: Weights, batch: Batch) -> Array:
    """method.md, steps 1 and 2: normalised MaxSim of the live retriever, ``score_BxK`` float32 in [-1, 1]."""
    B, K, P = batch["passage_ids_BxKxP"].shape
    retriever = live_retriever(spec.retriever, weights)
    q_BxQxC = encode_queries(retriever, spec.retriever, batch["query_ids_BxQ"], batch["query_len_B"])
    ids_NxP, length_N = batch["passage_ids_BxKxP"].reshape(B * K, P), batch["passage_len_BxK"].reshape(B * K)
    p_NxPxC, keep_NxP = encode_passages(retriever, spec.retriever, ids_NxP, length_N, weights["skip_V"])
    p_BxKxPxC, keep_BxKxP = p_NxPxC.reshape(B, K, P, -1), keep_NxP.reshape(B, K, P)
    return minmax(maxsim(q_BxQxC, p_BxKxPxC, keep_BxKxP), batch["valid_BxK"])


def choose(batch: Batch, index_BxN: Array, taken_BxN: Array) -> Batch:
    """The batch with only the chosen passages to read, in the order chosen; those not taken have length 0."""
    ids_BxNxL = jnp.take_along_axis(batch["reader_ids_BxKxL"], index_BxN[..., None], axis=1)
    length_BxN = jnp.where(taken_BxN, jnp.take_along_axis(batch["reader_len_BxK"], index_BxN, axis=1), 0)
    return batch | {"reader_ids_BxKxL": ids_BxNxL, "reader_len_BxK": length_BxN}


Prompt = tuple[Array, Array, dict[str, Array]]  # tokens_BxT, length_B; what is counted: tokens, dropped passages


def reading_prompt(spec: StepSpec, batch: Batch) -> Prompt:
    """Prompts that end with their answers, ``reader_ids_BxKxL`` best first: the prompt has the worst first."""
    answer = batch["answer_ids_BxA"], batch["answer_len_B"]
    total = reading_width(batch, spec.max_length, answer[0].shape[1], spec.bos_id)
    tokens_BxT, length_B, dropped_B = read_prompt(
        batch, total=total, bos_id=spec.bos_id, pad_id=spec.pad_id, answer=answer
    )
    return tokens_BxT, length_B, {"tokens": jnp.sum(length_B), "dropped": jnp.sum(dropped_B)}


@jax.named_scope("read")
def answer_losses(
    spec: StepSpec,
    weights: Weights,
    batch: Batch,
    prompt: Prompt,
    dropout_key: Array | None,
    places: int | None = None,
    *,
    int8: bool = False,
) -> Array:
    """method.md, steps 4 and 6: mean answer loss of each question after its prompt, ``nll_B`` float32, nats per token.

    Args:
      weights: ``generator``, and ``base`` under adapters.
      dropout_key: None turns dropout off, as judging needs it (method.md, fault 6).
      places: how many the prompts are packed into; None packs nothing.
      int8: of :func:`jmlr_jax.nn.functional.llama_hidden`.
    """
    base, adapters = weights["generator"], None
    if spec.lora is not None:
        base = lora.complete(weights["base"], weights["generator"])
        adapters = lora.bind(weights["generator"], spec.lora, dropout_key)
    tokens_BxT, length_B, _ = prompt
    answer_BxA, answer_len_B = batch["answer_ids_BxA"], batch["answer_len_B"]
    hidden_BxTxD = llama_hidden(base, spec.llama, tokens_BxT, length_B, adapters=adapters, places=places, int8=int8)
    # The head is applied only where an answer token is predicted, one position before it.
    place_BxA = (length_B - answer_len_B)[:, None] + jnp.arange(answer_BxA.shape[1]) - 1
    place_BxA = jnp.clip(place_BxA, 0, tokens_BxT.shape[1] - 1)
    hidden_BxAxD = jnp.take_along_axis(hidden_BxTxD, place_BxA[..., None], axis=1)
    return answer_nll(llama_logits(base, spec.llama, hidden_BxAxD, adapters=adapters), answer_BxA, answer_len_B)


@jax.named_scope("read")
def reading(spec: StepSpec, weights: Weights, batch: Batch, dropout_key: Array) -> tuple[Array, dict[str, Array]]:
    """method.md, step 6: the mean answer loss after all passages of the batch, and what the prompts held."""
    prompt = reading_prompt(spec, batch)
    still = {name: tree for name, tree in weights.items() if name == "base"}

    def loss(generator: Weights, places: int | None) -> Array:
        return jnp.mean(answer_losses(spec, still | {"generator": generator}, batch, prompt, dropout_key, places))

    tokens_BxT, length_B, held = prompt
    return learn_in_fewest_places(loss, weights["generator"], spec.pack, length_B, tokens_BxT.shape[1]), held


@jax.named_scope("judge")
def judge(spec: StepSpec, weights: Weights, batch: Batch, index_BxM: Array, taken_BxM: Array) -> Array:
    """method.md, step 4: answer loss ``nll_BxM`` after each sampled passage alone. No gradient, dropout off.

    The judge is ``judge`` of the weights where there is one, the generator that learns where not. Adapters are added to
    the base first, once for all B x M prompts: without gradient and dropout that is the same, and it saves their
    products and a pass over the activations for each.
    """
    B, M = index_BxM.shape
    weights = jax.lax.stop_gradient(weights)
    judging = weights.get("judge", weights["generator"])
    if spec.lora is not None:
        judging = lora.merge(weights["base"], judging, spec.lora)
    chosen = choose(batch, index_BxM, taken_BxM)
    alone = {name: jnp.repeat(batch[name], M, axis=0) for name in QUESTION_KEYS}
    alone["reader_ids_BxKxL"] = chosen["reader_ids_BxKxL"].reshape(B * M, 1, -1)
    alone["reader_len_BxK"] = chosen["reader_len_BxK"].reshape(B * M, 1)
    prompt, plain = reading_prompt(spec, alone), replace(spec, lora=None)
    losses = partial(answer_losses, plain, {"generator": judging}, alone, prompt, None, int8=spec.judge_int8)
    nll_N: Array = in_fewest_places(losses, spec.pack, prompt[1], prompt[0].shape[1])
    return jax.lax.stop_gradient(nll_N.reshape(B, M))


def passages_to_read(spec: StepSpec, batch: Batch, score_BxK: Array | None) -> Batch:
    """method.md, step 6: the N best-scored candidates, best first; without scores the first N of the table."""
    valid_BxK = batch["valid_BxK"]
    score_BxK = jnp.zeros(valid_BxK.shape) if score_BxK is None else jax.lax.stop_gradient(score_BxK)
    index_BxN, taken_BxN = top(score_BxK, valid_BxK, max(spec.passages, 1))
    return choose(batch, index_BxN[:, : spec.passages], taken_BxN[:, : spec.passages])


def joint_loss(
    params: Weights, frozen: Weights, batch: Batch, dropout_key: Array, *, spec: StepSpec
) -> tuple[Array, Metrics]:
    """method.md, steps 1 to 7 on one microbatch: total loss, a mean over questions, and metrics.

    ``batch`` carries ``gumbel_BxK``, drawn for the whole batch so that accumulation does not change the sample.
    """
    weights, valid_BxK = frozen | params, batch["valid_BxK"]
    loss, metrics, score_BxK = jnp.zeros(()), {}, None
    if spec.rank:
        score_BxK = candidate_scores(spec, weights, batch)
        index_BxM, taken_BxM = sample(score_BxK, valid_BxK, batch["gumbel_BxK"], spec.sampled)
        score_BxM = jnp.take_along_axis(score_BxK, index_BxM, axis=1)
        nll_BxM = judge(spec, weights, batch, index_BxM, taken_BxM)
        loss_B = rank_loss(spec.rank_loss, spec.help_margin)(score_BxM, nll_BxM, taken_BxM)
        loss += spec.rank_weight * jnp.mean(loss_B)
        metrics["loss/rank"] = jnp.mean(loss_B)
        metrics["rank/pair_accuracy"] = pair_accuracy(score_BxM, nll_BxM, taken_BxM, spec.help_margin)
        metrics["rank/entropy"] = jnp.mean(sampling_entropy(score_BxK, valid_BxK))
    if spec.read:
        answer_loss, held = reading(spec, weights, passages_to_read(spec, batch, score_BxK), dropout_key)
        loss += answer_loss
        metrics |= {"loss/answer": answer_loss, "prompt/tokens": held["tokens"], "prompt/dropped": held["dropped"]}
    return loss, metrics


def judge_probe(params: Weights, frozen: Weights, batch: Batch, *, spec: StepSpec) -> Array:
    """Judgements ``nll_BxK`` of all candidates of a batch; ``frozen`` holds ``judge`` where there is a slow one."""
    valid_BxK = batch["valid_BxK"]
    index_BxK = jnp.broadcast_to(jnp.arange(valid_BxK.shape[1]), valid_BxK.shape)
    return judge(replace(spec, pack=()), frozen | params, batch, index_BxK, valid_BxK)


def reading_loss(params: Weights, frozen: Weights, batch: Batch, *, spec: StepSpec) -> Array:
    """Answer loss ``nll_B`` of held-out questions, read as in training but without dropout or gradient."""
    weights = frozen | params
    score_BxK = candidate_scores(spec, weights, batch) if spec.rank else None
    chosen = passages_to_read(spec, batch, score_BxK)
    return answer_losses(spec, weights, chosen, reading_prompt(spec, chosen), None)


def make_step(spec: StepSpec, optimizer: optax.GradientTransformation) -> StepFn:
    """The step ``(state, frozen, batch) -> (state, metrics)`` to be compiled with the state donated.

    State: ``step`` and counters ``skipped``, ``skipped_in_row`` (int32), ``key`` (the run's, never consumed),
    ``params`` (what trains: ``retriever``, ``generator`` or both), ``opt`` and, with ``spec.judge_decay``, ``judge``,
    an exponential average of the generator that judges in its place. ``frozen`` is what a step reads but never changes:
    ``skip_V`` (retriever vocabulary outside MaxSim), ``base`` and ``retriever_base`` under adapters, a half that is
    frozen. Gradients that are not finite change nothing but the counters.
    """
    pieces, apply = spec.accumulate, partial(_update, optimizer)
    gradient = jax.value_and_grad(partial(joint_loss, spec=spec), has_aux=True)

    def step(state: State, frozen: Weights, batch: Batch) -> tuple[State, Metrics]:
        noise_key, dropout_key = jax.random.split(jax.random.fold_in(state["key"], state["step"]))
        batch = batch | {"gumbel_BxK": jax.random.gumbel(noise_key, batch["valid_BxK"].shape)}
        # (micro, pieces) and swap, not (pieces, micro): rows of one device stay on it.
        split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, pieces, *x.shape[1:]), 0, 1), batch)
        keys = jax.random.split(dropout_key, pieces)
        slow = {"judge": state["judge"]} if spec.judge_decay else {}

        def one(total: Any, piece: tuple[Batch, Array]) -> tuple[Any, None]:
            (_, metrics), grads = gradient(state["params"], frozen | slow, *piece)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        first = jax.tree.map(lambda x: x[0], (split, keys))
        shapes = jax.eval_shape(gradient, state["params"], frozen | slow, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[1], shapes[0][1]))
        (grads, metrics), _ = jax.lax.scan(one, zeros, (split, keys))
        # Every loss is a mean over a microbatch of equal size, so the batch's is the mean of theirs; counts are sums.
        grads = jax.tree.map(lambda g: g / pieces, grads)
        metrics = {name: m if name.startswith("prompt/") else m / pieces for name, m in metrics.items()}

        params, opt, norms, good = apply(state["params"], state["opt"], grads)
        state = {
            "step": state["step"] + 1,
            "key": state["key"],
            "params": params,
            "opt": opt,
            "skipped": state["skipped"] + ~good,
            "skipped_in_row": jnp.where(good, 0, state["skipped_in_row"] + 1),
        } | {
            name: optax.incremental_update(params["generator"], old, 1 - spec.judge_decay) for name, old in slow.items()
        }
        counters = {"skipped": state["skipped"], "skipped_in_row": state["skipped_in_row"]}
        return state, metrics | norms | counters

    return step


@jax.named_scope("update")
def _update(
    optimizer: optax.GradientTransformation, params: Weights, opt: Any, grads: Weights
) -> tuple[Weights, Any, Metrics, Array]:
    """method.md, step 7: weights and optimizer after one update, or as they were if it is not finite; gradient norms;
    and whether it is finite."""
    norms = {f"grad_norm/{half}": optax.tree.norm(tree) for half, tree in grads.items()}
    good = jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    updates, new_opt = optimizer.update(grads, opt, params)
    new = optax.apply_updates(params, updates), new_opt
    params, opt = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, (params, opt))
    return params, opt, norms, good


def init_state(params: Weights, optimizer: optax.GradientTransformation, key: Array, judge_decay: float = 0) -> State:
    """The state before the first step; ``key`` as from ``jax.random.key_data``."""
    # A buffer for each: a donated state must not name one twice.
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_row")}
    slow = {"judge": jax.tree.map(jnp.copy, params["generator"])} if judge_decay else {}
    return {**counters, "key": key, "params": params, "opt": optimizer.init(params), **slow}
