"""What the fuzz campaign mutates: a sample of every kind of file that is read, and the reader, with its own count."""

from __future__ import annotations

import csv
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Act = Callable[[bytes], None]
Target = Callable[[Path], tuple[bytes, Act]]


class Lost(Exception):
    """Records that are neither read nor told."""


QUESTION = {
    "id": "q1",
    "question": "What helps against gout?",
    "options": {"A": "colchicine", "B": "rest"},
    "answer": "A",
}
ROWS = [QUESTION | {"id": f"q{i}", "question": f"What is the {i}th, “naïve” one?\u2028 Yes."} for i in range(4)]
PASSAGES = [{"id": f"p{i}", "title": "Gout", "text": f"Colchicine helps {i} times, “naïve” or not."} for i in range(4)]
MEDQA = {"question": "Which?", "options": {k: k.lower() * 3 for k in "ABCD"}, "answer_idx": "B", "answer": "bbb"}
MEDMCQA = {
    "id": "m",
    "question": "Which?",
    "opa": "a",
    "opb": "b",
    "opc": "c",
    "opd": "d",
    "cop": 2,
    "choice_type": "single",
}
PUBMEDQA = {
    "1": {"QUESTION": "Does it?", "CONTEXTS": ["It does.", "Often."], "LABELS": ["R", "C"], "final_decision": "yes"},
    "2": {"QUESTION": "Did it?", "CONTEXTS": ["No."], "LABELS": ["R"], "final_decision": "no"},
}
MIRAGE = {"medqa": {f"{i}": {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "A"} for i in range(3)}}
PRESET = b"""seed: 3
data: {questions: jsonl, train_path: train.jsonl, on_error: skip}
retriever:
  query_length: 24
  bert: {hidden_size: 32, num_heads: 2}
train:
  steps: 4
  mix: {index: 6, bm25: 5, random: 5}
eval:
  arms: [jmlr, bm25]
generator: {lora: {rank: 4, targets: [q, v]}}
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 444,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 61,
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.base.modules.dense.Dense"},
]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    flat = [{k: v for k, v in row.items() if k != "options"} | row.get("options", {}) for row in rows]
    return "\n".join(delimiter.join(map(str, line)) for line in (flat[0], *(row.values() for row in flat))).encode()


def _safetensors(tensors: dict[str, tuple[int, ...]]) -> bytes:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


# Records


def questions(form: str, suffix: str, sample: bytes, counted: Callable[[bytes], int | None]) -> Target:
    """A reader of questions in the mode that leaves bad records out and lists them."""

    def make(place: Path) -> tuple[bytes, Act]:
        from jmlr_jax.data.readers import read_questions

        def act(content: bytes) -> None:
            file = place / f"{form}{suffix}"
            file.write_bytes(content)
            found = read_questions(form, str(file), "skip")  # type: ignore[arg-type]
            _all_told(counted(content), len(found.questions) + len(found.report.skipped))

        return sample, act

    return make


def corpus(suffix: str, sample: bytes, counted: Callable[[bytes], int | None]) -> Target:
    """A reader of passages, likewise."""

    def make(place: Path) -> tuple[bytes, Act]:
        from jmlr_jax.data.readers import read_corpus

        def act(content: bytes) -> None:
            file = place / f"corpus{suffix}"
            file.write_bytes(content)
            passages, report = read_corpus(str(file), "skip")
            _all_told(counted(content), len(passages) + len(report.skipped))

        return sample, act

    return make


def _all_told(there: int | None, told: int) -> None:
    if there is not None and there != told:
        raise Lost(f"{there} records, of which {told} are read or told")


def by_lines(content: bytes, header: int = 0) -> int:
    """Lines with more than white space in them, counted without the readers."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return sum(bool(line.decode("utf-8", "surrogateescape").strip()) for line in lines) - header


def by_csv(content: bytes, header: int = 1) -> int | None:
    """Rows as the library counts them; None where it cannot."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    csv.field_size_limit(1 << 30)
    try:
        return sum(bool(row) for row in csv.reader(re.findall(r"[^\n]*\n|[^\n]+$", text), strict=True)) - header
    except csv.Error:
        return None


def by_entries(depth: int) -> Callable[[bytes], int | None]:
    """Entries of nested objects, as the library counts them."""

    def count(content: bytes) -> int | None:
        try:
            tree = json.loads(content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
            return len(tree) if depth == 1 else sum(map(len, tree.values()))
        except (ValueError, RecursionError, TypeError, AttributeError):
            return None

    return count


# Files of other kinds


def reading(name: str, sample: bytes, load: Callable[[], Callable[[Path], object]]) -> Target:
    """A file in a folder of its own and what reads it."""

    def make(place: Path) -> tuple[bytes, Act]:
        read, file = load(), place / name
        file.parent.mkdir(parents=True, exist_ok=True)

        def act(content: bytes) -> None:
            file.write_bytes(content)
            read(file)

        return sample, act

    return make


def _preset() -> Callable[[Path], object]:
    from jmlr_jax import config_io

    return lambda file: config_io.load(str(file))


def override(place: Path) -> tuple[bytes, Act]:
    """What stands on the command line."""
    from jmlr_jax import config_io

    def act(content: bytes) -> None:
        config_io.load(None, [content.decode("utf-8", "surrogateescape")])

    return b"train.generator.learning_rate=1e-3", act


def _questions_to_ask() -> Callable[[Path], object]:
    from jmlr_jax.commands.search import read_questions

    return read_questions


def _llama() -> Callable[[Path], object]:
    from jmlr_jax.hf.config import llama_from_hf
    from jmlr_jax.hf.io import read_json

    return lambda file: llama_from_hf(read_json(file), str(file))


def _bert() -> Callable[[Path], object]:
    from jmlr_jax.hf.encoder_config import bert_from_hf
    from jmlr_jax.hf.io import read_json

    return lambda file: bert_from_hf(read_json(file), str(file))


def _header() -> Callable[[Path], object]:
    from jmlr_jax.hf.io import read_header

    return lambda file: [entry.read() for entry in read_header(file).values()]


def modules(place: Path) -> tuple[bytes, Act]:
    """modules.json beside whole weights."""
    from jmlr_jax.hf.layouts import open_retriever

    folder = place / "late"
    (folder / "1_Dense").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(_safetensors({"embeddings.word_embeddings.weight": (3, 2)}))
    (folder / "1_Dense" / "model.safetensors").write_bytes(_safetensors({"linear.weight": (2, 2)}))
    (folder / "1_Dense" / "config.json").write_text(json.dumps({"bias": False}))
    (folder / "config.json").write_text(json.dumps(BERT))

    def act(content: bytes) -> None:
        (folder / "modules.json").write_bytes(content)
        open_retriever(folder)

    return json.dumps(MODULES, indent=1).encode(), act


def tokenizer(place: Path) -> tuple[bytes, Act]:
    """tokenizer.json of a directory that has been whole."""
    from jmlr_jax.data.tokenizers import encoder, generator_ids, load_tokenizer, train_generator_tokenizer

    folder = place / "tokenizer"
    train_generator_tokenizer(["gout is treated"], 262, str(folder))

    def act(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        loaded = load_tokenizer(str(folder))
        generator_ids(loaded)
        encoder(loaded, continues=True).encode("gout")

    return (folder / "tokenizer.json").read_bytes(), act


def _index_card() -> Callable[[Path], object]:
    from jmlr_jax.retrieval.store import open_index

    return lambda file: open_index(file.parent, "x", None)


def _recipe() -> Callable[[Path], object]:
    from jmlr_jax.run.artifact import Recipe, check_files

    def read(file: Path) -> None:
        if Recipe.read(file.parent) is not None:
            check_files(file.parent)

    return read


def _sums() -> Callable[[Path], object]:
    from jmlr_jax.run.checks import read_checks

    return lambda file: read_checks(file.parent)


def _report() -> Callable[[Path], object]:
    from jmlr_jax.evaluation.seed_run import read_run

    return lambda file: read_run(file.parents[3], "run", "test")


CARD = {"format": 4, "kind": "exact", "model_fingerprint": "x", "corpus_fingerprint": "y", "passages": 1, "entries": 1}
CARD |= {"dim": 2, "bits": 16.0, "hits": 1, "leaves": None, "spare": 1, "build_seconds": 0.1, "oracle_queries": 0}
CARD |= {"ann_recall": {}, "ann_recall_target": None, "parts": [{"name": "data-a", "files": {}}]}
RECIPE = {"format": 2, "digest": "0", "keys": {"seed": 0}, "inputs": {"a": "b"}, "places": {}, "files": {"x": "y"}}
SUMS = {"of": "x", "halves": {"generator": {"['a'] float32 [2]": "00"}}, "metrics": "0"}
TARGETS: dict[str, Target] = {
    "jsonl questions": questions("jsonl", ".jsonl", _lines(ROWS), by_lines),
    "csv questions": questions("csv", ".csv", _table(ROWS, ","), by_csv),
    "tsv questions": questions("tsv", ".tsv", _table(ROWS, "\t"), lambda content: by_lines(content, 1)),
    "medqa": questions("medqa", ".jsonl", _lines([MEDQA] * 3), by_lines),
    "medmcqa": questions("medmcqa", ".json", _lines([MEDMCQA | {"id": f"m{i}"} for i in range(3)]), by_lines),
    "mmlu": questions("mmlu", "_test.csv", b'Which?,a,b,c,d,A\n"Or, ""which""?",a,b,c,d,B\n', lambda c: by_csv(c, 0)),
    "pubmedqa": questions("pubmedqa", ".json", json.dumps(PUBMEDQA, indent=1).encode(), by_entries(1)),
    "mirage": questions("mirage", ".json", json.dumps(MIRAGE, indent=1).encode(), by_entries(2)),
    "jsonl corpus": corpus(".jsonl", _lines(PASSAGES), by_lines),
    "csv corpus": corpus(".csv", _table(PASSAGES, ","), by_csv),
    "tsv corpus": corpus(".tsv", _table(PASSAGES, "\t"), lambda content: by_lines(content, 1)),
    "preset": reading("preset/preset.yaml", PRESET, _preset),
    "override": override,
    "questions to ask": reading("asked/asked.tsv", b"1\tWhat helps?\n2\tWho?\n", _questions_to_ask),
    "config.json of a decoder": reading("llama/config.json", json.dumps(LLAMA).encode(), _llama),
    "config.json of an encoder": reading("bert/config.json", json.dumps(BERT).encode(), _bert),
    "safetensors": reading("tensors/model.safetensors", _safetensors({"a": (2, 3), "b": (4,)}), _header),
    "modules.json": modules,
    "tokenizer.json": tokenizer,
    "index card": reading("index/card.json", json.dumps(CARD).encode(), _index_card),
    "made_from.json": reading("made/made_from.json", json.dumps(RECIPE).encode(), _recipe),
    "checks.json": reading("sums/checks.json", json.dumps(SUMS).encode(), _sums),
    "questions.jsonl": reading("run/eval/test/questions.jsonl", _lines(ROWS), _report),
}
