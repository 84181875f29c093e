"""What a published directory knows is taken from it; what it is, and what of it is not read, is said by name."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmlr_jax import config_io
from jmlr_jax.cli import main
from jmlr_jax.config import Config
from jmlr_jax.data.tokenizers import TokenizerError, generator_ids, load_tokenizer, train_generator_tokenizer
from jmlr_jax.hf.follow import followed
from jmlr_jax.hf.io import HFError, Tensor, write_directory, write_file, write_json
from jmlr_jax.hf.layouts import open_retriever

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 444,
    "hidden_act": "silu",
}
BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 61,
}
ST, BASE = "sentence_transformers", "sentence_transformers.base.modules"
TRUNK, DENSE = f"{BASE}.transformer.Transformer", f"{BASE}.dense.Dense"
MASK = f"{ST}.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
NORMALIZE = f"{BASE}.normalize.Normalize"
PYLATE = {"query_prefix": "[Q]", "document_prefix": "[D]", "query_length": 24, "document_length": 40}


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, np.dtype(np.float32), shape, lambda: np.zeros(shape, np.float32))


def decoder(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    write_json(folder / "config.json", LLAMA | more)
    return folder


def encoder(folder: Path, types: list[str], card: dict[str, Any] | None = None, **dense: Any) -> Path:
    """A retriever's directory with these modules; a Dense one has a projection to 16."""
    folder.mkdir()
    write_json(folder / "config.json", BERT)
    write_directory(folder, [tensor("embeddings.word_embeddings.weight", 61, 32)], 1 << 30)
    rows = []
    for number, kind in enumerate(types):
        path = f"{number}_{kind.rpartition('.')[2]}" if number else ""
        rows.append({"idx": number, "name": str(number), "path": path, "type": kind})
        (folder / path).mkdir(exist_ok=True)
        if kind.endswith("Dense"):
            write_json(folder / path / "config.json", {"bias": False, **dense})
            write_file(folder / path / "model.safetensors", [tensor("linear.weight", 16, 32)])
    write_json(folder / "modules.json", rows)
    write_json(folder / "config_sentence_transformers.json", card or {})
    return folder


# What was not set follows the directory


def test_a_decoder_s_shape_is_its_directory_s(tmp_path: Path) -> None:
    source = decoder(tmp_path / "llama")
    cfg = followed(config_io.load(None, [f"generator.source={source}", "generator.max_length=1500"]))
    llama = cfg.generator.llama
    assert (llama.num_layers, llama.max_positions, llama.rope_theta, llama.vocab_size) == (3, 2048, 5000.0, 0)
    again = config_io.load(
        None, [f"generator.source={source}", "generator.llama.num_layers=3", "generator.max_length=99"]
    )
    assert followed(again).generator.llama == llama
    assert followed(cfg) == cfg and followed(Config()) == Config()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("num_layers=2", "num_layers=2, the checkpoint has 3; leave it out"),  # the default of a model from scratch
        ("num_layers=5", "num_layers=5, the checkpoint has 3; leave it out"),
        ("max_positions=4096", "max_positions=4096, the checkpoint has 2048; lower it"),
    ],
)
def test_what_was_set_and_is_not_so_is_refused(tmp_path: Path, key: str, said: str) -> None:
    source = decoder(tmp_path / "llama")
    cfg = config_io.load(None, [f"generator.source={source}", f"generator.llama.{key}"])
    with pytest.raises(HFError, match=f"generator.llama.{said}"):
        followed(cfg)


def test_lengths_are_held_against_what_the_directory_says(tmp_path: Path) -> None:
    source = decoder(tmp_path / "llama", max_position_embeddings=128)
    with pytest.raises(HFError, match="generator.max_length=512 exceeds generator.llama.max_positions=128"):
        followed(config_io.load(None, [f"generator.source={source}"]))


def test_a_retriever_s_conventions_and_lengths_are_its_directory_s(tmp_path: Path) -> None:
    source = encoder(tmp_path / "late", [TRUNK, DENSE], PYLATE | {"skiplist_words": [], "do_query_expansion": False})
    found = followed(config_io.load(None, [f"retriever.source={source}"])).retriever
    assert (found.dim, found.query_length, found.passage_length) == (16, 24, 40)
    assert (found.skip_punctuation, found.augment_queries, found.bert.max_positions) == (False, False, 64)
    shorter = followed(config_io.load(None, [f"retriever.source={source}", "retriever.query_length=20"])).retriever
    assert (shorter.query_length, shorter.passage_length) == (20, 40)
    with pytest.raises(HFError, match="retriever.query_marker='x', the checkpoint was trained with"):
        followed(config_io.load(None, [f"retriever.source={source}", "retriever.query_marker=x"]))


def test_the_record_of_a_run_sets_what_is_not_a_default(tmp_path: Path) -> None:
    """It holds every key; a default in it is not taken for a wish."""
    config_io.save_resolved(Config(), tmp_path / config_io.RESOLVED_NAME)
    source = decoder(tmp_path / "llama")
    cfg = config_io.load(str(tmp_path / config_io.RESOLVED_NAME), [f"generator.source={source}"])
    assert followed(cfg).generator.llama.num_layers == 3


# Modules


@pytest.mark.parametrize(
    "types",
    [
        [f"{ST}.models.Transformer", f"{ST}.models.Dense"],
        [f"{ST}.models.Transformer", "pylate.models.Dense.Dense"],
        [TRUNK, DENSE],
        [TRUNK, DENSE, MASK, NORMALIZE],
    ],
)
def test_a_projection_is_read_wherever_its_class_lives(tmp_path: Path, types: list[str]) -> None:
    opened = open_retriever(encoder(tmp_path / "late", types, PYLATE))
    assert (opened.kind, opened.dim) == ("pylate", 16)


@pytest.mark.parametrize("types", [[TRUNK], [TRUNK, f"{ST}.sentence_transformer.modules.pooling.Pooling", NORMALIZE]])
def test_what_is_pooled_is_left_to_others(tmp_path: Path, types: list[str]) -> None:
    assert open_retriever(encoder(tmp_path / "sentence", types)).dim is None


@pytest.mark.parametrize(
    "types",
    [
        [TRUNK, f"{ST}.sentence_transformer.modules.lstm.LSTM"],
        [TRUNK, f"{ST}.models.Pooling", f"{ST}.models.Dense"],
        ["custom_st.Transformer", f"{ST}.models.Pooling"],
        [TRUNK, "mine.Dense"],
        [],
    ],
)
def test_every_other_module_is_refused_by_name(tmp_path: Path, types: list[str]) -> None:
    with pytest.raises(HFError, match=r"modules.json: modules are ") as told:
        open_retriever(encoder(tmp_path / "other", types))
    assert all(kind in str(told.value) for kind in types)


def test_a_multi_vector_encoder_of_sentence_transformers(tmp_path: Path) -> None:
    """Its own form: prompts for markers, expansion and lengths with the Transformer, skipped words with the mask."""
    source = encoder(
        tmp_path / "late",
        [TRUNK, DENSE, MASK, NORMALIZE],
        {"prompts": {"query": "[Q] ", "document": "[D] "}},
        module_input_name="token_embeddings",
    )
    write_json(
        source / "tokenizer.json",
        {"added_tokens": [{"content": "[Q]"}, {"content": "[D]"}], "model": {"type": "WordPiece", "vocab": {}}},
    )
    expansion = {"strategy": "fixed", "attend": True, "token": None, "length": 24}
    write_json(source / "sentence_bert_config.json", {"query_expansion": expansion, "document_length": 40})
    write_json(source / "2_MultiVectorMask" / "config.json", {"skiplist_words": list(string.punctuation)})
    opened = open_retriever(source)
    assert opened.conventions == {
        "query_marker": "[Q]",
        "passage_marker": "[D]",
        "augment_queries": True,
        "attend_to_mask_tokens": True,
        "skip_punctuation": True,
    }
    assert opened.lengths == {"query_length": 24, "passage_length": 40}
    write_json(source / "sentence_bert_config.json", {"query_expansion": expansion | {"strategy": "min"}})
    with pytest.raises(HFError, match="query_expansion.strategy is 'min'; only 'fixed' is computed here"):
        open_retriever(source)


# What it is, where it is something else


def test_another_decoder_is_named_with_those_that_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = decoder(tmp_path / "other", architectures=["Gemma9ForCausalLM"], model_type="gemma9")
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert (
        "Gemma9ForCausalLM" in err and "LlamaForCausalLM" in err and "BertModel" in err and len(err.splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "PEFT adapters; give the directory of the merged model"),
        ("model_index.json", "a pipeline of diffusers"),
        ("m.gguf", "GGUF files; `jmlr import FILE DIR`"),
        ("README.md", "expected a Hugging Face model"),
    ],
)
@pytest.mark.parametrize("half", ["generator", "retriever"])
def test_a_directory_of_another_kind(tmp_path: Path, half: str, name: str, said: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(HFError, match=f"no config.json there.*{said}"):
        followed(config_io.load(None, [f"{half}.source={tmp_path}"]))


# Tokenizers


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_generator_tokenizer(["gout is treated"], 262, str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


def test_a_vocabulary_with_holes_is_as_large_as_its_ids(tokenizer: Path) -> None:
    file = tokenizer / "tokenizer.json"
    said = json.loads(file.read_text())
    moved = {piece: number + (100 if number > 200 else 0) for piece, number in said["model"]["vocab"].items()}
    said["model"]["vocab"] = moved
    file.write_text(json.dumps(said))
    loaded = load_tokenizer(str(tokenizer))
    assert len(loaded) <= max(moved.values()) and generator_ids(loaded).vocab_size == max(moved.values()) + 1


def test_a_tokenizer_of_a_newer_library_is_said_to_be_one(tokenizer: Path) -> None:
    file = tokenizer / "tokenizer.json"
    said = json.loads(file.read_text())
    said["model"]["type"] = "FutureBPE"
    file.write_text(json.dumps(said))
    with pytest.raises(TokenizerError, match=r"model is of type 'FutureBPE'; .* reads BPE, Unigram, WordLevel"):
        load_tokenizer(str(tokenizer))
    said["model"] |= {"type": "BPE", "merges": 7}
    file.write_text(json.dumps(said))
    with pytest.raises(TokenizerError, match=r"tokenizer.json \(BPE\) was written for another version"):
        load_tokenizer(str(tokenizer))
