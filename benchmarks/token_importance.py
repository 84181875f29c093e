"""How much better a first retriever finds passages once its query tokens are weighted, its vectors as they are.

    PYTHONPATH=. python benchmarks/token_importance.py RUN [--questions 200] [--passages 3000] [--learn 320 640 1600]
        [--rates 0.01 0.03 0.1] [--json FILE]

RUN is a prepared run whose training questions have gold passages. Dev questions rank the passages of
``first_retriever.py`` exactly, by MaxSim in which a query token counts

none       once
idf, root  as its inverse document frequency in the corpus, or the root of that
words      exp(v_w) times, v being learned, one number for each word of the vocabulary
direction  exp(<q, u>) times, u being learned: ``retriever.importance``

Learning is by the rank loss on so many training questions, eight a step, each seen once, with BM25's four best passages
and two random ones; in place of a generator the gold labels judge: an answer loss of 0 after the right passage, of 0.3
nats after any other. This is no training of the method, which reads no gold labels: it asks what there is to learn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.first_retriever import BLOCK, corpus, dev_rows, encoded, first_gold, nearest, opened
from benchmarks.retriever_rate import BATCH, MARGIN, tables
from jmlr_jax.method.losses import llm_rank_loss
from jmlr_jax.method.scoring import minmax
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import retriever_of

CHUNK = 2000  # passages read at once


def rarity(run: Run) -> np.ndarray:
    """Inverse document frequency of every token of the retriever's vocabulary, mean 1 over the vocabulary."""
    count, frequency_V = len(run.prepared.passages), np.zeros(run.retriever.bert.vocab_size)
    for first in range(0, count, CHUNK):
        ids_nxP, length_n = run.prepared.passage_tokens(np.arange(first, min(first + CHUNK, count)))
        for ids_P, length in zip(ids_nxP, length_n, strict=True):
            frequency_V[np.unique(ids_P[:length])] += 1
    idf_V = np.log((count + 1) / (frequency_V + 1))
    return idf_V / idf_V.mean()


def weights(learned: dict[str, jax.Array], ids_nxQ: Any, q_nxQxC: Any) -> jax.Array:
    """What every query token counts, given one number for each word or a direction."""
    return jnp.exp(learned["words"][ids_nxQ] if "words" in learned else q_nxQxC @ learned["direction"])


def learn(start: dict[str, jax.Array], rate: float, data: tuple[np.ndarray, ...]) -> dict[str, jax.Array]:
    """The numbers after one pass over the training questions."""
    steps = len(data[0]) // BATCH
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 5, steps, 0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(learned: dict[str, jax.Array], ids: Any, q: Any, real: Any, near_nxKxQ: Any, nll: Any, valid: Any) -> Any:
        score_nxK = jnp.einsum("nkq,nq->nk", near_nxKxQ, jnp.where(real, weights(learned, ids, q), 0))
        return jnp.mean(llm_rank_loss(minmax(score_nxK, valid), nll, valid, MARGIN))

    @jax.jit
    def step(learned: Any, state: Any, *batch: Any) -> Any:
        update, state = optimizer.update(jax.grad(loss)(learned, *batch), state, learned)
        return optax.apply_updates(learned, update), state

    learned, state = start, optimizer.init(start)
    for number in range(steps):
        learned, state = step(learned, state, *(x[number * BATCH : (number + 1) * BATCH] for x in data))
    return learned


def training(run: Run, params: Any, count: int) -> tuple[np.ndarray, ...]:
    """Tokens, vectors, which are real, nearest similarities to each candidate, its loss by gold, whether it exists."""
    rows, table_NxK, nll_nxK = tables(run, count)
    table_nxK = table_NxK[rows]
    passages = np.unique(table_nxK[table_nxK >= 0])
    read = run.prepared.passage_tokens
    q_nxQxC, p_MxPxC, keep_MxP = encoded(run, params, run.retriever, rows, passages, read, "train")
    ids_nxQ, length_n = run.prepared.query_tokens("train", rows)
    near = []
    for q_QxC, row_K in zip(q_nxQxC, np.searchsorted(passages, np.maximum(table_nxK, passages[0])), strict=True):
        near.append(np.asarray(nearest(q_QxC[None], p_MxPxC[row_K], keep_MxP[row_K]))[0])
    real_nxQ = np.arange(ids_nxQ.shape[1]) < length_n[:, None]
    return ids_nxQ, q_nxQxC, real_nxQ, np.stack(near), nll_nxK, table_nxK >= 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=3000)
    parser.add_argument("--learn", type=int, nargs="+", default=[320, 640, 1600])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    run = opened(asked.run)
    rows, table = dev_rows(run, asked.questions), []
    kinds = np.array([run.prepared.questions("dev")[int(row)].kind for row in rows])
    with jax.set_mesh(run.mesh):
        passages, params = corpus(run, rows, asked.passages), retriever_of(run, None)
        q_NxQxC, p_MxPxC, keep_MxP = encoded(run, params, run.retriever, rows, passages, run.prepared.passage_tokens)
        data = training(run, params, max(asked.learn))
    gold = [np.searchsorted(passages, run.prepared.gold("dev", int(row))) for row in rows]
    ids_NxQ, length_N = run.prepared.query_tokens("dev", rows)
    real_NxQ = np.arange(ids_NxQ.shape[1]) < length_N[:, None]
    blocks = []
    for first in range(0, len(passages), BLOCK):
        at = np.arange(first, first + BLOCK) % len(passages)
        found = [np.asarray(nearest(some, p_MxPxC[at], keep_MxP[at])) for some in np.array_split(q_NxQxC, 20)]
        blocks.append(np.concatenate(found)[:, : len(passages) - first].astype(np.float16))
    near_NxMxQ = np.concatenate(blocks, axis=1)

    def note(weight_NxQ: Any, **what: Any) -> None:
        weight_NxQ = np.where(real_NxQ, np.asarray(weight_NxQ, np.float32), 0)
        score = [near.astype(np.float32) @ weight for near, weight in zip(near_NxMxQ, weight_NxQ, strict=True)]
        rank_N = first_gold(np.stack(score), gold)
        found = what | {f"hit@{k}": float(np.mean(rank_N <= k)) for k in (1, 5, 10)}
        found["hit@1 by kind"] = {kind: float(np.mean(rank_N[kinds == kind] <= 1)) for kind in sorted(set(kinds))}
        table.append(found)
        print(*(f"{key} {value}" for key, value in found.items() if not isinstance(value, dict)), flush=True)

    idf_V = rarity(run)
    note(np.ones(ids_NxQ.shape), weights="none")
    note(idf_V[ids_NxQ], weights="idf")
    note(idf_V[ids_NxQ] ** 0.5, weights="root")
    starts = {"words": jnp.zeros(len(idf_V)), "direction": jnp.zeros(q_NxQxC.shape[-1])}
    for count in asked.learn:
        for name, start in starts.items():
            for rate in asked.rates:
                learned = learn({name: start}, rate, tuple(x[:count] for x in data))
                note(weights(learned, ids_NxQ, q_NxQxC), weights=name, rate=rate, learned_from=count)
    if asked.json:
        found = {"questions": len(rows), "passages": len(passages), "rows": table}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
