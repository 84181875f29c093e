"""A generator reads questions: likelihoods of continuations after a prompt, and what it writes itself, in batches.

The prompt's keys and values are computed once and shared by the right answer and all options, each of which then costs
its own few tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.batches import Batch, Prepared
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.method.losses import answer_nll
from jmlr_jax.method.prompt import read_prompt, reading_width
from jmlr_jax.nn.functional import init_cache, llama_cached, llama_logits
from jmlr_jax.nn.generate import generate
from jmlr_jax.nn.layers import Adapters, Params
from jmlr_jax.parallel.placement import place_batch, replicated
from jmlr_jax.parallel.progress import Stage


@dataclass(frozen=True)
class Reader:
    """A generator ready to be evaluated.

    Attributes:
      params: weights of the decoder, on the mesh if there is one.
      cfg: their shape, vocabulary size resolved.
      decode: token ids to text, special tokens left out.
      adapters: from :func:`jmlr_jax.nn.lora.bind` without a dropout key.
    """

    params: Params
    cfg: LlamaConfig
    decode: Callable[[Sequence[int]], str]
    adapters: Adapters | None = None


@dataclass(frozen=True)
class Setting:
    """What every reading of an evaluation has in common.

    Attributes:
      split: where the questions are.
      mesh: devices; batches are spread over its data and fsdp axes. None runs where the weights are.
    """

    reader: Reader
    prepared: Prepared
    split: str
    cfg: Config
    mesh: Mesh | None = None


class Prefix(NamedTuple):
    """A prompt that was computed once, for all that may follow it.

    Attributes:
      cache: its keys and values, with room for what follows.
      last_Bx1xD: hidden state of its last token, which predicts the next.
      length_B: its tokens.
    """

    cache: Params
    last_Bx1xD: Array
    length_B: Array


def prompt_prefix(
    params: Params, cfg: LlamaConfig, prompt_BxT: Array, length_B: Array, room: int, adapters: Adapters | None = None
) -> Prefix:
    """Computes prompts; `room` tokens may follow each."""
    B, T = prompt_BxT.shape
    cache = init_cache(cfg, B, T + room)
    start_B = jnp.zeros_like(length_B)
    hidden, cache = llama_cached(params, cfg, prompt_BxT, start_B, length_B, cache, adapters=adapters)
    return Prefix(cache, jnp.take_along_axis(hidden, (length_B - 1)[:, None, None], axis=1), length_B)


def after_prefix(
    params: Params, cfg: LlamaConfig, prefix: Prefix, ids_BxA: Array, len_B: Array, adapters: Adapters | None = None
) -> Array:
    """Mean negative log-likelihood of one continuation of each prompt, ``nll_B`` float32; 0 where its length is 0."""
    cache, last_Bx1xD, length_B = prefix
    after, _ = llama_cached(params, cfg, ids_BxA, length_B, length_B + len_B, cache, adapters=adapters)
    before_BxAxD = jnp.concatenate([last_Bx1xD, after[:, :-1]], axis=1)  # token a is predicted one position earlier
    return answer_nll(llama_logits(params, cfg, before_BxAxD, adapters=adapters), ids_BxA, len_B)


def continuation_nll(
    params: Params,
    cfg: LlamaConfig,
    prompt_BxT: Array,
    length_B: Array,
    ids_BxOxA: Array,
    len_BxO: Array,
    *,
    adapters: Adapters | None = None,
) -> Array:
    """Mean negative log-likelihood of each continuation of a prompt, ``nll_BxO`` float32, nats per token.

    Equal to scoring prompt and continuation together, but the prompt is computed once. 0 where a length is 0.
    """
    prefix = prompt_prefix(params, cfg, prompt_BxT, length_B, ids_BxOxA.shape[-1], adapters)

    def one(option: tuple[Array, Array]) -> Array:
        return after_prefix(params, cfg, prefix, *option, adapters)

    # One option at a time: logits of A x V for every option at once would outgrow the model's own memory.
    return jax.lax.map(one, (jnp.swapaxes(ids_BxOxA, 0, 1), len_BxO.T)).T


STATIC = ("cfg", "ids", "max_length", "replicated")


@partial(jax.jit, static_argnames=STATIC)
def score_batch(
    params: Params,
    adapters: Adapters | None,
    batch: dict[str, Array],
    *,
    cfg: LlamaConfig,
    ids: GeneratorIds,
    max_length: int,
    replicated: NamedSharding | None,
) -> dict[str, Array]:
    """Likelihoods alone, ``nll`` [B, O]; arguments as for :func:`evaluate_batch`."""
    found = {"nll": _after_passages(params, adapters, batch, cfg, ids, max_length)[0]}
    return found if replicated is None else jax.lax.with_sharding_constraint(found, replicated)


@partial(jax.jit, static_argnames=STATIC)
def evaluate_batch(
    params: Params,
    adapters: Adapters | None,
    batch: dict[str, Array],
    *,
    cfg: LlamaConfig,
    ids: GeneratorIds,
    max_length: int,
    replicated: NamedSharding | None,
) -> dict[str, Array]:
    """Everything about a batch: likelihoods with and without passages, and generated tokens.

    Args:
      max_length: T, tokens of a prompt with its answer, at most.
    """
    A = batch["option_ids_BxOxA"].shape[-1]
    nll_BxO, (prompt_BxT, length_B, dropped_B) = _after_passages(params, adapters, batch, cfg, ids, max_length)
    score = partial(continuation_nll, params, cfg, adapters=adapters)
    bare = {
        **batch,
        "reader_ids_BxKxL": batch["reader_ids_BxKxL"][:, :0],
        "reader_len_BxK": batch["reader_len_BxK"][:, :0],
    }
    bare_BxT, bare_len_B, _ = read_prompt(
        bare, total=reading_width(bare, max_length, 0, ids.begin), bos_id=ids.begin, pad_id=ids.pad
    )
    answer_Bx1xA, answer_len_Bx1 = batch["option_ids_BxOxA"][:, :1], batch["option_len_BxO"][:, :1]
    none_Bx1 = score(bare_BxT, bare_len_B, answer_Bx1xA, answer_len_Bx1)
    asked: dict[str, Any] = {"max_new": A, "eos_id": ids.eos, "stops": ids.stops, "adapters": adapters}
    tokens_BxA, made_B = generate(params, cfg, prompt_BxT, length_B, **asked)
    found = {"nll": nll_BxO, "nll_none": none_Bx1[:, 0], "tokens": tokens_BxA, "made": made_B, "dropped": dropped_B}
    # On every device, so that each host of a pod can read all of them.
    return found if replicated is None else jax.lax.with_sharding_constraint(found, replicated)


def _after_passages(
    params: Params, adapters: Adapters | None, batch: dict[str, Array], cfg: LlamaConfig, ids: GeneratorIds, most: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Likelihoods of all continuations after the passages and the question, ``nll_BxO``, and the prompt itself."""
    A = batch["option_ids_BxOxA"].shape[-1]
    total = reading_width(batch, most, A, ids.begin) - A
    prompt = read_prompt(batch, total=total, bos_id=ids.begin, pad_id=ids.pad)
    options = batch["option_ids_BxOxA"], batch["option_len_BxO"]
    return continuation_nll(params, cfg, prompt[0], prompt[1], *options, adapters=adapters), prompt


def read_batch(compiled: Callable[..., dict[str, Array]], setting: Setting, place_B: np.ndarray, batch: Batch) -> Batch:
    """Results of :func:`evaluate_batch` or :func:`score_batch` for a batch, as numpy arrays."""
    reader, mesh = setting.reader, setting.mesh
    whole = np.arange(len(place_B))
    on_device = batch if mesh is None else place_batch(mesh, batch, whole, len(whole))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = compiled(
            reader.params,
            reader.adapters,
            on_device,
            cfg=reader.cfg,
            ids=setting.prepared.generator_ids,
            max_length=setting.cfg.generator.max_length,
            replicated=None if mesh is None else replicated(mesh),
        )
    return {name: np.asarray(value) for name, value in found.items()}


def question_batch(
    setting: Setting, place_B: np.ndarray, table_BxK: np.ndarray, questions: tuple[TokenTable, np.ndarray] | None = None
) -> Batch:
    """What is read of these questions; on axis O the right answer stands before the options.

    Args:
      place_B: rows of the questions in their split; table_BxK: rows of their passages, -1 where there is none.
      questions: other wordings, and which of its rows each question is; None: as they were prepared.
    """
    prepared, split = setting.prepared, setting.split
    lengths, pad = prepared.card["lengths"], prepared.generator_ids.pad
    batch: Batch = {}
    batch["reader_ids_BxKxL"], batch["reader_len_BxK"] = prepared.tokens("references").padded(
        table_BxK, lengths["reference"], pad
    )
    asked, rows_B = questions or (prepared.tokens(f"{split}.questions"), place_B)
    batch["question_ids_BxS"], batch["question_len_B"] = asked.padded(rows_B, lengths["question"], pad)
    answer_ids, answer_len = prepared.tokens(f"{split}.answers").padded(place_B, lengths["answer"], pad)
    option_ids, option_len = prepared.option_tokens(split, place_B)
    batch["option_ids_BxOxA"] = np.concatenate([answer_ids[:, None], option_ids], axis=1)
    batch["option_len_BxO"] = np.concatenate([answer_len[:, None], option_len], axis=1)
    return batch


def option_losses(
    setting: Setting,
    what: str,
    place_n: np.ndarray,
    table_nxK: np.ndarray,
    *,
    questions: TokenTable | None = None,
    answer_alone: bool = False,
) -> np.ndarray:
    """Losses of the right answer and of the options after some passages, ``nll_nxO`` float32, nats per token.

    Args:
      what: is read, for the progress that is shown.
      place_n: rows of the questions; table_nxK: their passages, best first.
      questions: another wording of each, in the order of `place_n`.
      answer_alone: O is 1, the right answer.
    """
    found = []
    with Stage(what, len(place_n), "questions") as stage:
        for row_B, count in batches(np.arange(len(place_n)), setting.cfg.eval.batch_size):
            other = None if questions is None else (questions, row_B)
            batch = question_batch(setting, place_n[row_B], table_nxK[row_B], other)
            if answer_alone:
                batch |= {name: batch[name][:, :1] for name in ("option_ids_BxOxA", "option_len_BxO")}
            found.append(read_batch(score_batch, setting, row_B, batch)["nll"][:count])
            stage.update(sum(map(len, found)))
    return np.concatenate(found)


def batches(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows [size], how many of them count): all of one size, so that one compilation serves; the last is filled up."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.full(size - len(part), part[0])]), len(part)
