"""A joint step small enough for a test, on random tokens, and its loss computed slowly, one question at a time."""

from __future__ import annotations

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax.config_models import BertConfig, EncoderLoraConfig, LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.method.step import StepSpec
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.lora import init_lora

V = 32
BOS, PAD, SKIPPED = 1, 0, 3  # SKIPPED: a retriever token outside MaxSim
K, M, N = 5, 3, 2
Q, P, L, S, A = 4, 6, 6, 7, 3
ROOM = 1 + N * L + S + A
LLAMA = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2)
BERT = BertConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
RETRIEVER = RetrieverConfig(bert=BERT, dim=8, query_length=Q, passage_length=P, augment_queries=False)
ENCODER_LORA = EncoderLoraConfig(rank=2, alpha=4, targets=("q", "o", "down"))
LORA = LoraConfig(rank=2, alpha=4, dropout=0.5, targets=("q", "down"))


def spec(
    *, rank: bool = True, read: bool = True, lora: LoraConfig | None = None, max_length: int = ROOM, **train: Any
) -> StepSpec:
    """M 3 of the batch's K 5, N 2, no margin; `train` overrides what the step reads of the training configuration."""
    settings = {
        "rank_loss": "llm_rank",
        "help_margin": 0.0,
        "rank_weight": 1.0,
        "accumulate": 1,
        "judge_decay": 0.0,
        "judge_int8": False,
    } | train
    settings = {"pack": ()} | settings
    return StepSpec(
        retriever=RETRIEVER,
        llama=LLAMA,
        lora=lora,
        rank=rank,
        read=read,
        sampled=M,
        passages=N,
        max_length=max_length,
        bos_id=BOS,
        pad_id=PAD,
        **settings,
    )


def weights() -> dict[str, Any]:
    """Both halves, decoder outputs large enough for judgements to differ."""
    halves = {
        "generator": F.init_llama(LLAMA, jax.random.key(0)),
        "retriever": F.init_colbert(RETRIEVER, jax.random.key(1)),
    }
    halves["generator"]["embed"] = halves["generator"]["embed"] * 40
    return halves


def adapters() -> dict[str, Any]:
    """Adapters of LORA that already change something."""
    tree = init_lora(LORA, LLAMA, jax.random.key(2))
    return jax.tree.map(lambda x: x + 0.3, tree)


def frozen() -> dict[str, Any]:
    return {"skip_V": jnp.arange(V) == SKIPPED}


def batch(questions: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pieces of unequal lengths with the noise for sampling; from 2 to K candidates a question."""
    rng = np.random.default_rng(seed)
    B = questions

    def piece(*shape: int, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
        length = rng.integers(least, shape[-1] + 1, shape[:-1]).astype(np.int32)
        ids = rng.integers(2, V, shape).astype(np.int32)
        return np.where(np.arange(shape[-1]) < length[..., None], ids, PAD).astype(np.int32), length

    made: dict[str, np.ndarray] = {}
    made["query_ids_BxQ"], made["query_len_B"] = piece(B, Q)
    made["passage_ids_BxKxP"], made["passage_len_BxK"] = piece(B, K, P, least=2)
    made["reader_ids_BxKxL"], made["reader_len_BxK"] = piece(B, K, L, least=2)
    made["question_ids_BxS"], made["question_len_B"] = piece(B, S)
    made["answer_ids_BxA"], made["answer_len_B"] = piece(B, A)
    valid = np.arange(K) < rng.integers(2, K + 1, B)[:, None]
    made["passage_ids_BxKxP"][..., 0] = 2  # never all skipped
    for name in ("passage", "reader"):
        ids = f"{name}_ids_BxKx{'P' if name == 'passage' else 'L'}"
        made[ids] = np.where(valid[..., None], made[ids], PAD).astype(np.int32)
        made[f"{name}_len_BxK"] = np.where(valid, made[f"{name}_len_BxK"], 0).astype(np.int32)
    made["valid_BxK"] = valid
    made["gumbel_BxK"] = rng.gumbel(size=(B, K)).astype(np.float32)
    return made


def one(of: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """The batch of one question alone."""
    return {name: x[row : row + 1] for name, x in of.items()}


@jax.jit
def _logp(generator: Any, tokens_T: jax.Array, length: jax.Array) -> jax.Array:
    hidden = F.llama_hidden(generator, LLAMA, tokens_T[None], length[None])
    return jax.nn.log_softmax(F.llama_logits(generator, LLAMA, hidden))[0]


@jax.jit
def _vectors(retriever: Any, query_Q: jax.Array, q: jax.Array, passages_KxP: jax.Array, p_K: jax.Array) -> Any:
    query = F.encode_queries(retriever, RETRIEVER, query_Q[None], q[None])[0]
    return query, F.encode_passages(retriever, RETRIEVER, passages_KxP, p_K, jnp.zeros(V, bool))[0]


def slow_loss(made: StepSpec, halves: dict[str, Any], of: dict[str, np.ndarray], row: int) -> dict[str, float]:
    """method.md, steps 1 to 6 for one question in plain Python over lists of tokens."""
    b = {name: x[row] for name, x in of.items()}
    query = b["query_ids_BxQ"], b["query_len_B"], b["passage_ids_BxKxP"], b["passage_len_BxK"]
    q, p = (np.asarray(x, np.float64) for x in _vectors(halves["retriever"], *query))
    there = [k for k in range(K) if b["valid_BxK"][k]]
    raw = {}
    for k in there:
        words = [i for i in range(b["passage_len_BxK"][k]) if b["passage_ids_BxKxP"][k, i] != SKIPPED]
        raw[k] = sum(max(q[i] @ p[k, j] for j in words) for i in range(b["query_len_B"]))
    low, high = min(raw.values()), max(raw.values())
    score = {k: 2 * (raw[k] - low) / (high - low) - 1 for k in there}

    question = list(b["question_ids_BxS"][: b["question_len_B"]])
    answer = list(b["answer_ids_BxA"][: b["answer_len_B"]])
    references = {k: list(b["reader_ids_BxKxL"][k, : b["reader_len_BxK"][k]]) for k in there}

    def fitting(passages: list[int]) -> list[int]:
        """Best first, up to the first that the prompt has no room for."""
        room, held = made.max_length - 1 - len(question) - len(answer), []
        for k in passages:
            room -= len(references[k])
            if room < 0:
                break
            held.append(k)
        return held

    def nll(passages: list[int]) -> float:
        before = [BOS, *(t for k in reversed(fitting(passages)) for t in references[k]), *question]
        tokens = before + answer
        logp = np.asarray(
            _logp(halves["generator"], jnp.array(tokens + [PAD] * (ROOM - len(tokens))), jnp.array(len(tokens)))
        )
        return -float(np.mean([logp[len(before) + i - 1, t] for i, t in enumerate(answer)]))

    sampled = sorted(there, key=lambda k: -(score[k] + float(b["gumbel_BxK"][k])))[:M]
    alone = {k: nll([k]) for k in sampled}
    middle = statistics.median(alone.values())
    terms, differing = [], 0
    for i, first in enumerate(sampled):
        for second in sampled[i + 1 :]:
            differing += alone[first] != alone[second]
            if made.help_margin == 0 or min(alone[first], alone[second]) < middle - made.help_margin:
                sign = 1 if alone[first] < alone[second] else -1
                terms.append(math.log1p(math.exp(-sign * (score[first] - score[second]))))
    best = sorted(there, key=lambda k: -score[k])[:N]
    return {
        "rank": sum(terms) / max(differing, 1),
        "pairs": len(terms),
        "answer": nll(best),
        "dropped": len(best) - len(fitting(best)),
    }
