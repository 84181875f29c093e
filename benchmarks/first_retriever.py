"""How well a published encoder retrieves before any training: by layers, by tokens of a passage, by first projection.

    python benchmarks/first_retriever.py RUN [--layers 6 3] [--lengths 64 176] [--questions 200] [--passages 3000]
        [--width 128] [--json FILE]

RUN is a prepared run whose `retriever.source` has no projection. Dev questions with gold passages, and passages (the
gold ones, BM25's best 20 of each question, and random ones), are encoded with the first layers of the encoder and no
projection at all; each projection is then applied to those vectors, which are made unit vectors again, and MaxSim ranks
these passages exactly. Passages longer than a length are cut, for the encoder alone.

pooled     one vector a text, the mean of its tokens' (for comparison)
none       the encoder's own vectors, at their whole width
random     as layers begin (Gaussian, variance one over the width)
principal  the directions along which the passages' token vectors are longest
whitened   the same, each scaled to one length
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax import config_io
from jmlr_jax.config_io import RESOLVED_NAME
from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.nn import functional
from jmlr_jax.retrieval.encode import encode_passages_batched, encode_queries_batched
from jmlr_jax.run.open import Run

BLOCK = 1024  # passages scored at once
NEAR = 20  # of BM25's, for each question


def opened(folder: Path) -> Run:
    """A prepared run."""
    return Run.open(config_io.load(folder / RESOLVED_NAME, [f"run_dir={folder}"]))


def dev_rows(run: Run, count: int) -> np.ndarray:
    """So many dev questions that have gold passages, spread evenly."""
    with_gold = [row for row in range(len(run.prepared.questions("dev"))) if len(run.prepared.gold("dev", row))]
    return np.array(with_gold)[np.linspace(0, len(with_gold) - 1, count).round().astype(int)]


def corpus(run: Run, rows: np.ndarray, most: int) -> np.ndarray:
    """Rows of the passages that are ranked: gold ones, BM25's best of each question, and random ones up to `most`."""
    prepared = run.prepared
    texts = [question.question for question in map(prepared.questions("dev").__getitem__, rows.tolist())]
    near = run.lexical.search(texts, NEAR)[0].reshape(-1)
    wanted = np.unique(np.concatenate([near, *(prepared.gold("dev", int(row)) for row in rows)]))
    others = np.setdiff1d(np.arange(len(prepared.passages)), wanted)
    more = np.random.default_rng(0).permutation(others)[: max(0, most - len(wanted))]
    return np.sort(np.concatenate([wanted, more]))


def vectors(
    run: Run, rows: np.ndarray, passages: np.ndarray, layers: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors after so many layers: q_NxQxD, p_MxPxD float16 and keep_MxP."""
    asked, prepared, key = run.cfg.retriever, run.prepared, jax.random.key(0)
    D, tokens = run.retriever.bert.hidden_size, prepared.retriever_ids.vocab_size
    whole = asked.model_copy(update={"dim": D})
    cfg, params = load_retriever(asked.source, whole, key, run.mesh, tokens=tokens)
    cfg = cfg.model_copy(update={"bert": cfg.bert.model_copy(update={"num_layers": layers})})
    params = {"bert": first_layers(params["bert"], cfg), "projection": jnp.eye(D)}

    def read(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, count = prepared.passage_tokens(places)
        cut = count > length
        ids[cut, length - 1] = ids[cut, count[cut] - 1]  # [SEP]
        return ids[:, :length], np.minimum(count, length)

    return encoded(run, params, cfg, rows, passages, read)


def encoded(
    run: Run,
    params: Any,
    cfg: RetrieverConfig,
    rows: np.ndarray,
    passages: np.ndarray,
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    split: str = "dev",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of questions and passages, q_NxQxC, p_MxPxC float16 and keep_MxP; `read` gives tokens."""
    prepared, batch = run.prepared, run.cfg.index.encode_batch
    made = encode_passages_batched(
        functional.encode_passages, params, cfg, read, passages, prepared.skip_V, batch=batch
    )
    found = [(some.vectors_NxPxC, some.keep_NxP) for some in made]
    queries = encode_queries_batched(
        functional.encode_queries,
        params,
        cfg,
        lambda places: prepared.query_tokens(split, rows[places]),
        len(rows),
        batch=batch,
    )
    p_MxPxC, keep_MxP = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.concatenate(list(queries)), p_MxPxC, keep_MxP


def first_layers(bert: dict[str, Any], cfg: RetrieverConfig) -> dict[str, Any]:
    """The trunk cut to the layers of `cfg`; weights of layers are stacked on their first axis."""
    return jax.tree.map(lambda x, wanted: x[: wanted.shape[0]], bert, functional.abstract_params(cfg)["bert"])


@jax.jit
def nearest(q_NxQxC: jax.Array, p_bxPxC: jax.Array, keep_bxP: jax.Array) -> jax.Array:
    """Each query token's largest similarity in each passage, NxbxQ."""
    similar = jnp.einsum("nqc,bpc->nbqp", q_NxQxC, p_bxPxC.astype(jnp.float32))
    return jnp.max(jnp.where(keep_bxP[None, :, None, :], similar, -jnp.inf), axis=-1)


@jax.jit
def scores(q_NxQxC: jax.Array, p_bxPxD: jax.Array, keep_bxP: jax.Array, start_DxC: jax.Array) -> jax.Array:
    """MaxSim of every question with a block of passages."""
    return jnp.sum(nearest(q_NxQxC, unit(p_bxPxD.astype(jnp.float32) @ start_DxC), keep_bxP), axis=-1)


def unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def ranks(
    q_NxQxD: np.ndarray, p: np.ndarray, keep: np.ndarray, start: np.ndarray, gold: list[np.ndarray]
) -> np.ndarray:
    """Rank of the best gold passage of every question, from 1."""
    q_NxQxC = unit(jnp.asarray(q_NxQxD, jnp.float32) @ start)
    blocks = []
    for first in range(0, len(p), BLOCK):
        places = np.arange(first, first + BLOCK) % len(p)
        found = [np.asarray(scores(some, p[places], keep[places], start)) for some in jnp.array_split(q_NxQxC, 10)]
        blocks.append(np.concatenate(found)[:, : len(p) - first])
    score_NxM = np.concatenate(blocks, axis=1)
    return first_gold(score_NxM, gold)


def first_gold(score_NxM: np.ndarray, gold: list[np.ndarray]) -> np.ndarray:
    """Rank of the best gold passage of every question by score, from 1."""
    return np.array([1 + np.sum(row > row[own].max()) for row, own in zip(score_NxM, gold, strict=True)])


def starts(sample_SxD: np.ndarray, C: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every projection by name, float32 DxC."""
    D = sample_SxD.shape[1]
    yield "none", np.eye(D, dtype=np.float32)
    yield "random", np.random.default_rng(0).normal(size=(D, C)).astype(np.float32) / D**0.5
    values, directions = np.linalg.eigh(sample_SxD.T @ sample_SxD / len(sample_SxD))
    values, directions = values[::-1][:C], directions[:, ::-1][:, :C]
    yield "principal", directions.astype(np.float32)
    yield "whitened", (directions * values**-0.5).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 3])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 176])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=3000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    run = opened(asked.run)
    questions, rows = run.prepared.questions("dev"), dev_rows(run, asked.questions)
    passages = corpus(run, rows, asked.passages)
    gold = [np.searchsorted(passages, run.prepared.gold("dev", int(row))) for row in rows]
    kinds = np.array([questions[int(row)].kind for row in rows])
    table = []

    def note(rank_N: np.ndarray, **what: Any) -> None:
        found = what | {f"hit@{k}": float(np.mean(rank_N <= k)) for k in (1, 5, 10)}
        found["hit@1 by kind"] = {kind: float(np.mean(rank_N[kinds == kind] <= 1)) for kind in sorted(set(kinds))}
        table.append(found)
        print(*(f"{key} {value}" for key, value in found.items() if not isinstance(value, dict)), flush=True)

    hits = run.lexical.search([questions[int(row)].question for row in rows], 10)[0]
    golden = [run.prepared.gold("dev", int(row)) for row in rows]
    note(np.array([1 + np.argmax([*np.isin(h, g), True]) for h, g in zip(hits, golden, strict=True)]), retriever="bm25")
    for layers in asked.layers:
        for length in asked.lengths:
            q, p, keep = vectors(run, rows, passages, layers, length)
            one = {"retriever": "pooled", "layers": layers, "length": length}
            pooled = np.asarray(unit(q.sum(1))) @ np.asarray(unit(p.astype(np.float32).sum(1))).T
            note(first_gold(pooled, gold), **one)
            draw = np.random.default_rng(0).permutation(np.flatnonzero(keep.reshape(-1)))[:100_000]
            sample = p.reshape(-1, p.shape[-1])[draw].astype(np.float32)
            for name, start in starts(sample, asked.width):
                note(ranks(q, p, keep, start, gold), **one | {"retriever": name})
    if asked.json:
        made = {"questions": len(rows), "passages": len(passages), "width": asked.width, "rows": table}
        asked.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
