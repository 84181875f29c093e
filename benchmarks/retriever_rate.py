"""How far a retriever moves at a learning rate, if its judge were never wrong.

    PYTHONPATH=. python benchmarks/retriever_rate.py RUN [--rates 3e-4 1e-3] [--steps 40] [--questions 150]
        [--passages 1500] [--json FILE]

RUN is a prepared run whose training questions have gold passages. Its first retriever makes so many steps of the rank
loss on BM25's four best passages of each question and two random ones; in place of a generator the gold labels judge:
an answer loss of 0 after the right passage, of 0.3 nats after any other. This is no training of the method, which reads
no gold labels: it asks which rates can move the retriever in so few steps at all. Dev questions then rank the passages
of ``first_retriever.py`` exactly.
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

from benchmarks.first_retriever import corpus, dev_rows, encoded, opened, ranks
from jmlr_jax.data.batches import assemble
from jmlr_jax.method.losses import llm_rank_loss
from jmlr_jax.method.step import candidate_scores
from jmlr_jax.run.candidates import fixed_table
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import retriever_of
from jmlr_jax.training.program import phase_program

NEAR, CHANCE, BATCH = 4, 2, 8
HARM, MARGIN = 0.3, 0.1  # nats


def tables(run: Run, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of training questions, their candidates, and the loss that an ideal judge gives to each."""
    prepared = run.prepared
    rows = np.random.default_rng(0).permutation(len(prepared.questions("train")))[:count]
    near = fixed_table(run, "bm25", "train", NEAR, None, rows)
    chance = fixed_table(run, "random", "train", CHANCE, None, rows)
    table_NxK = np.concatenate([near, chance], axis=1)
    right = np.array([np.isin(table_NxK[row], prepared.gold("train", int(row))) for row in rows])
    return rows, table_NxK, np.where(right, 0.0, HARM).astype(np.float32)


def trained(run: Run, first: Any, rate: float, steps: int, made: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Any:
    """The retriever after so many steps at a rate, of which five warm it up."""
    rows, table_NxK, nll_nxK = made
    ids = run.prepared.generator_ids
    spec = phase_program(run.cfg, PHASES["jmlr"], run.retriever, run.llama, ids, steps, run.mesh).spec
    schedule = optax.warmup_constant_schedule(0.0, rate, 5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    skip_V = jnp.pad(run.prepared.skip_V, (0, run.retriever.bert.vocab_size - len(run.prepared.skip_V)))

    def loss(params: Any, batch: dict[str, jax.Array], nll_BxK: jax.Array) -> jax.Array:
        score_BxK = candidate_scores(spec, {"retriever": params, "skip_V": skip_V}, batch)
        return jnp.mean(llm_rank_loss(score_BxK, nll_BxK, batch["valid_BxK"], MARGIN))

    @jax.jit
    def step(params: Any, state: Any, batch: dict[str, jax.Array], nll_BxK: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, batch, nll_BxK)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    params, state = first, optimizer.init(first)
    for number in range(steps):
        part = slice(number * BATCH, (number + 1) * BATCH)
        batch = {
            name: jnp.asarray(x)
            for name, x in assemble(run.prepared, "train", rows[part], table_NxK[rows[part]]).items()
        }
        params, state, value = step(params, state, batch, jnp.asarray(nll_nxK[part]))
        if number % 10 == 9:
            print(f"rate {rate:g}, step {number + 1}: loss {float(value):.3f}", flush=True)
    return params


def hits(run: Run, params: Any, rows: np.ndarray, passages: np.ndarray) -> dict[str, float]:
    """How often the right passage of dev questions is among the first."""
    prepared = run.prepared
    q_NxQxC, p_MxPxC, keep_MxP = encoded(run, params, run.retriever, rows, passages, prepared.passage_tokens)
    gold = [np.searchsorted(passages, prepared.gold("dev", int(row))) for row in rows]
    whole = np.eye(p_MxPxC.shape[-1], dtype=np.float32)
    rank_N = ranks(q_NxQxC, p_MxPxC, keep_MxP, whole, gold)
    return {f"hit@{k}": float(np.mean(rank_N <= k)) for k in (1, 5, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--passages", type=int, default=1500)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    run = opened(asked.run)
    rows = dev_rows(run, asked.questions)
    table = []
    with jax.set_mesh(run.mesh):
        passages, first = corpus(run, rows, asked.passages), retriever_of(run, None)
        made = tables(run, asked.steps * BATCH)
        for rate in (0.0, *asked.rates):
            params = trained(run, first, rate, asked.steps, made) if rate else first
            table.append({"rate": rate, **hits(run, params, rows, passages)})
            print(table[-1], flush=True)
            if asked.json:
                found = {"steps": asked.steps, "questions": len(rows), "passages": len(passages), "rows": table}
                asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
