"""What it costs to pad prompts of the evaluation to `generator.max_length`, beside the width that they can reach.

    python benchmarks/evaluation_width.py [--questions 840] [key=value ...]

The world's test questions are read with BM25's passages and without any, by the configuration's generator with the
weights it starts from. Both widths take turns on every batch, so that a busy machine slows both alike. Wide rows come
from empty passages behind the rest. The last column is the largest difference of an option's loss between the two;
generated answers must be the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from jmlr_jax import config_io
from jmlr_jax.data.batches import Batch, Prepared, assemble
from jmlr_jax.data.prepare import prepare
from jmlr_jax.evaluation.reading import evaluate_batch
from jmlr_jax.method.prompt import reading_width
from jmlr_jax.nn.functional import init_llama
from jmlr_jax.retrieval.bm25 import BM25

COLUMNS = ("", "tokens a row", "seconds", "the least for a batch, ms", "ratio of seconds", "difference, nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=840)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    cfg = config_io.load(None, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        prepare(cfg, Path(folder) / "data")
        prepared = Prepared.open(Path(folder) / "data")
        questions = list(prepared.questions("test"))[: args.questions]
        bm25 = BM25([f"{passage.title} {passage.text}" for passage in prepared.passages])
        read = bm25.search([question.question for question in questions], cfg.train.read_passages)[0]
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
        for name, table in (("BM25's passages", read), ("closed book", read[:, :0])):
            compare(name, cfg, prepared, table)


def compare(name: str, cfg: config_io.Config, prepared: Prepared, table_NxK: np.ndarray) -> None:
    """Two rows of the table: all questions at both widths."""
    llama = cfg.generator.llama.model_copy(update={"vocab_size": prepared.generator_ids.vocab_size})
    params, size = init_llama(llama, jax.random.key(cfg.seed)), cfg.eval.batch_size
    static = {"cfg": llama, "ids": prepared.generator_ids, "max_length": cfg.generator.max_length, "replicated": None}
    seconds, width, differs = defaultdict(list), {}, 0.0
    for first in range(-size, len(table_NxK), size):  # the first batch is read once more, for compilation
        rows = np.arange(first, first + size) % len(table_NxK)
        narrow = questions_and_options(prepared, rows, table_NxK[rows])
        found = {}
        for kind, batch in (("padded to max_length", widened(narrow, cfg)), ("as wide as can be", narrow)):
            width[kind] = reading_width(batch, cfg.generator.max_length, cfg.generator.answer_length)
            start = time.perf_counter()
            found[kind] = jax.device_get(evaluate_batch(params, None, batch, **static))
            if first >= 0:
                seconds[kind].append(time.perf_counter() - start)
        a, b = found.values()
        assert np.array_equal(a["tokens"], b["tokens"]), "the two widths answer differently"
        differs = max(differs, float(np.abs(a["nll"] - b["nll"]).max()))
    whole = sum(seconds["padded to max_length"])
    for kind, taken in seconds.items():
        ratio, least = whole / sum(taken), 1000 * min(taken)
        row = f"{name}, {kind} | {width[kind]} | {sum(taken):.1f} | {least:.0f} | {ratio:.1f} | {differs:.0e}"
        print(f"| {row} |", flush=True)


def questions_and_options(prepared: Prepared, rows_B: np.ndarray, table_BxK: np.ndarray) -> Batch:
    """What :func:`evaluate_batch` reads, the right answer before the options."""
    made = assemble(prepared, "test", rows_B, table_BxK)
    option_ids, option_len = prepared.option_tokens("test", rows_B)
    batch = {name: made[name] for name in ("reader_ids_BxKxL", "reader_len_BxK", "question_ids_BxS", "question_len_B")}
    batch["option_ids_BxOxA"] = np.concatenate([made["answer_ids_BxA"][:, None], option_ids], axis=1)
    batch["option_len_BxO"] = np.concatenate([made["answer_len_B"][:, None], option_len], axis=1)
    return batch


def widened(batch: Batch, cfg: config_io.Config) -> Batch:
    """The batch with so many empty passages that its prompts reach `generator.max_length`."""
    more = ((0, 0), (0, -(-cfg.generator.max_length // cfg.generator.passage_length)))
    ids, length = np.pad(batch["reader_ids_BxKxL"], (*more, (0, 0))), np.pad(batch["reader_len_BxK"], more)
    return batch | {"reader_ids_BxKxL": ids, "reader_len_BxK": length}


if __name__ == "__main__":
    main()
