"""A decoder and a few questions to evaluate, and its likelihoods one question at a time, without any cache."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax.config_io import load
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.evaluation.reading import Reader
from jmlr_jax.nn.functional import init_llama, llama_hidden, llama_logits

DRUGS = ("aspirin", "heparin", "warfarin", "insulin", "digoxin", "metformin", "codeine")


def small_setting(root):
    """(cfg, prepared, reader, table): seven test questions, one without options, and a random decoder."""
    passages = [
        {"id": f"p{i}", "title": f"Drug {i}", "text": f"{d} treats disease number {i}" + " well" * i}
        for i, d in enumerate(DRUGS)
    ]
    questions = []
    for i, drug in enumerate(DRUGS):
        others = [d for d in DRUGS if d != drug][: 2 + i % 3]
        question = {"id": f"q{i}", "question": f"What treats disease number {i}?", "answer": drug}
        if i != 3:
            question |= {
                "options": {"A": others[0], "B": drug} | dict(zip("CDE", others[1:], strict=False)),
                "answer": "B",
            }
        questions.append({**question, "meta": {"kind": "odd" if i % 2 else "even", "group": f"g{i // 2}"}})
    for split in ("train", "dev"):
        other = [{**question, "id": f"{split}-{question['id']}"} for question in questions[:2]]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in other))
    for name, records in (("corpus", passages), ("test", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = load(
        None,
        [
            "data.questions=jsonl",
            *(f"data.{name}_path={root / name}.jsonl" for name in ("corpus", "train", "dev", "test")),
            "data.leakage_ngram=0",
            "retriever.tokenizer_vocab=300",
            "generator.tokenizer_vocab=300",
            "generator.max_length=256",
            "generator.passage_length=48",
            "generator.question_length=64",
            "generator.answer_length=12",
            "eval.batch_size=4",
            "eval.bootstrap=200",
        ],
    )
    prepare(cfg, root / "data")
    prepared = Prepared.open(root / "data")
    llama = LlamaConfig(
        vocab_size=prepared.generator_ids.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        tie_embeddings=False,
    )
    params = jax.tree.map(lambda w: w * 4, init_llama(llama, jax.random.key(0)))  # sharper than fresh weights
    tokenizer = load_tokenizer(prepared.tokenizer_dir("generator"))
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    table = np.array([[0, 1, 2], [3, -1, -1], [-1, -1, -1], [6, 5, 4], [2, 3, -1], [5, 0, 1], [6, 1, 5]], np.int32)
    return cfg, prepared, Reader(params, llama, decode), table


def prompt_ids(prepared, place, passages, question=None):
    """BOS, passages worst first, question (that of the place unless given); plain lists."""
    ids = [prepared.generator_ids.bos]
    for p in reversed([p for p in passages if p >= 0]):
        ids += prepared.tokens("references").row(int(p)).tolist()
    return ids + (prepared.tokens("test.questions").row(place).tolist() if question is None else list(question))


@partial(jax.jit, static_argnames="cfg")
def _logits(params, cfg, tokens, length, adapters):
    hidden = llama_hidden(params, cfg, tokens, length, adapters=adapters)
    return llama_logits(params, cfg, hidden, adapters=adapters)


def full_logits(reader, ids):
    """Logits [256, V] of one sequence, the cache not involved; padded so that all lengths share a compilation."""
    tokens = jnp.array([ids + [0] * (256 - len(ids))])
    return _logits(reader.params, reader.cfg, tokens, jnp.array([len(ids)]), reader.adapters)[0]


def brute_nll(reader, prompt, answer):
    """Mean nll of the answer after the prompt, prompt and answer run together."""
    logp = np.asarray(jax.nn.log_softmax(full_logits(reader, prompt + answer)))
    return -np.mean([logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])
