"""``jmlr import FILE.gguf DST``: what is written from tiny files of every kind, and what is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jmlr_jax import cli
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.gguf_file import is_gguf, read_gguf
from jmlr_jax.hf.io import HFError, read_directory, read_json

Q = "blk.1.attn_q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    gguf_files.published(folder)
    return folder


@pytest.fixture(scope="module")
def fields(source: Path) -> dict[str, Any]:
    return gguf_files.fields_of(source)


@pytest.fixture(scope="module")
def tensors(source: Path) -> dict[str, np.ndarray]:
    return gguf_files.tensors_of(source)


def stored(folder: Path) -> dict[str, bytes]:
    return {key: entry.read().tobytes() for key, entry in read_directory(folder).items()}


def test_every_byte_and_id(
    source: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A file made of a directory becomes that directory again; a name without a suffix is as good."""
    file = gguf_files.write(tmp_path / "no suffix", fields, tensors)
    assert is_gguf(file) and not is_gguf(tmp_path) and not is_gguf(source / "config.json")
    assert cli.main(["import", str(file), str(tmp_path / "out")]) == 0
    assert stored(tmp_path / "out") == stored(source)
    ours, theirs = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "out", source))
    names = {key for key in theirs if key not in ("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id")}
    assert {key: ours.get(key) for key in names} == {key: theirs[key] for key in names}
    written, read = load_tokenizer(str(tmp_path / "out")), load_tokenizer(str(source))
    assert written.get_vocab() == read.get_vocab(), "unused rows are no tokens"
    assert written.all_special_ids == read.all_special_ids == [1, 2, 0]
    for text in ("the kidneys  are\thardened, 12 drugs", "café </s>", "  a "):
        assert written(text, add_special_tokens=False).input_ids == read(text, add_special_tokens=False).input_ids


def test_dtype_and_added_tokens(fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Added tokens take the unused rows; 16-bit tensors stay so where all are."""
    half = {key: value.astype(np.float16) for key, value in tensors.items()}
    file = gguf_files.write(tmp_path / "half.gguf", fields, half)
    import_checkpoint(file, tmp_path / "as it is")
    assert {entry.dtype for entry in read_directory(tmp_path / "as it is").values()} == {"F16"}
    words = ["import", str(file), str(tmp_path / "out"), "--dtype", "bfloat16", "--add-token", "<a>"]
    assert cli.main([*words, "--vocab-multiple", "100"]) == 0
    entries = read_directory(tmp_path / "out")
    assert {entry.dtype for entry in entries.values()} == {"BF16"}
    assert entries["lm_head.weight"].shape == (300, 32)
    assert load_tokenizer(str(tmp_path / "out")).convert_tokens_to_ids("<a>") == gguf_files.VOCAB - 4


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.BF16])
def test_quantised_tensors(kind: Kind, tmp_path: Path) -> None:
    """In pieces as at once: the library's own dequantisation of the whole, of more rows than are taken in one piece."""
    value = np.random.default_rng(0).normal(size=(140_000, 32)).astype(np.float32)
    file = gguf_files.write(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"x": value}, {"x": kind})
    entry = read_gguf(file).tensors["x"]
    wanted = gguf.dequantize(gguf.quantize(value, kind), kind)
    found = np.asarray(entry.read())
    assert found.dtype == (np.float32 if kind != Kind.BF16 else found.dtype) and entry.shape == value.shape
    np.testing.assert_array_equal(found.astype(np.float32), wanted)


@pytest.mark.parametrize("other", [False, True])
def test_llama3_scaling_is_read_from_its_divisors(
    other: bool, fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The file holds what each frequency is divided by; config.json states the rule, computed by transformers."""
    rule = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rule |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = {"head_dim": 8, "num_attention_heads": 4, "max_position_embeddings": 131072}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(**shape, hidden_size=32, rope_parameters=rule), torch.device("cpu")
    )
    divisors = (500000.0 ** -(np.arange(4) / 4) / scaled.numpy()).astype(np.float32)
    assert divisors.min() == 1 and divisors.max() == 32 and len(set(divisors)) > 2
    said = fields | {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}
    held = tensors | {"rope_freqs.weight": np.sqrt(divisors) if other else divisors}
    file = gguf_files.write(tmp_path / "x.gguf", said, held)
    if other:
        with pytest.raises(HFError, match=r"x.gguf: rope_freqs.weight holds another rotary scaling than Llama 3's"):
            import_checkpoint(file, tmp_path / "out")
    else:
        import_checkpoint(file, tmp_path / "out")
        assert read_json(tmp_path / "out" / "config.json")["rope_parameters"] == rule


def test_linear_scaling_and_ends_of_a_chat_model(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    said = fields | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    said |= {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ 1 }}",
    }
    import_checkpoint(gguf_files.write(tmp_path / "x.gguf", said, tensors), tmp_path / "out")
    rope = read_json(tmp_path / "out" / "config.json")["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert read_json(tmp_path / "out" / "generation_config.json") == generation
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer("a").input_ids[0] == 1 and tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer("a", add_special_tokens=False).input_ids[0] != 1


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " DON", "'", "T", " 1234", " mg", "/", "kg", "?", "\n\n ", " x"]),
        ("smollm", ["It", "'s", " DON", "'", "T", " ", "1", "2", "3", "4", " mg", "/", "kg", "?", "\n\n ", " x"]),
        ("llama-bpe", ["It", "'s", " DON", "'T", " ", "123", "4", " mg", "/kg", "?\n\n", " ", " x"]),
        ("llama3", ["It", "'s", " DON", "'T", " ", "123", "4", " mg", "/kg", "?\n\n", " ", " x"]),
        ("qwen2", ["It", "'s", " DON", "'T", " ", "1", "2", "3", "4", " mg", "/kg", "?\n\n", " ", " x"]),
        ("tekken", ["It", "'s", " DON", "'T", " ", "1", "2", "3", "4", " mg", "/kg", "?\n\n", " ", " x"]),
    ],
)
def test_how_text_is_split(
    pre: str, words: list[str], fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Words worked out by hand from each model's published rule; merges never cross them."""
    file = gguf_files.write(tmp_path / "x.gguf", fields | {"tokenizer.ggml.pre": pre}, tensors)
    import_checkpoint(file, tmp_path / "out")
    engine = load_tokenizer(str(tmp_path / "out")).backend_tokenizer
    text = "It's DON'T 1234 mg/kg?\n\n  x"
    assert "".join(words) == text
    cut = engine.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words


def refused(file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an import ends with; nothing is left."""
    assert cli.main(["import", str(file), str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"jmlr: {file}: "), lines
    assert not list(out.parent.glob(f"*{out.name}*"))
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma2"}, "general.architecture is 'gemma2'; read here are llama, gemma3: import"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; only a model"),
        ({"split.count": 2}, "one of the 2 parts of a split model (split.count); join them"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 3}, "missing: blk.2.attn_k.weight"),
        ({"llama.block_count": 1}, "unknown: blk.1.attn_k.weight"),
        ({"llama.feed_forward_length": [48, 48]}, "llama.feed_forward_length is [48, 48]; computed here is one"),
        (
            {"llama.feed_forward_length": 64},
            "blk.0.ffn_gate.weight has shape [48, 32] where its fields ask for [64, 32]",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; only 0"),
        ({"llama.attention.sliding_window": 5}, "llama.attention.sliding_window is not known here"),
        ({"llama.rope.dimension_count": 4}, "blk.0.attn_q.weight has shape [32, 32] where its fields ask for [16, 32]"),
        ({"llama.attention.key_length": 8, "llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4; only"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; read here are linear"),
        (
            {"llama.vocab_size": 280},
            "has 288 rows, the tokenizer 288 tokens, llama.vocab_size is 280",
        ),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; read here is 'gpt2'"),
        (
            {"tokenizer.ggml.pre": "bloom"},
            "tokenizer.ggml.pre is 'bloom', so how text is split is not known; known",
        ),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing, so how text is split"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre is 'default'"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["a ?!"]}, "tokenizer.ggml.merges joins 'a' and '?!', of which one is no token"),
        ({"tokenizer.ggml.eos_token_id": 288}, "tokenizer.ggml.eos_token_id is 288, of 288 tokens"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "bos_token_id is missing, and"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type has 1 entries, tokens 288"),
    ],
)
def test_what_a_field_may_say(
    changes: dict[str, Any],
    message: str,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = gguf_files.write(tmp_path / "x.gguf", fields | changes, tensors)
    assert message in refused(file, tmp_path / "out", capsys)


def test_tensors_are_all_used_and_all_there(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {key: value for key, value in tensors.items() if key != Q} | {"blk.1.attn_q.bias": np.ones(32, np.float32)}
    file = gguf_files.write(tmp_path / "x.gguf", fields, held)
    line = refused(file, tmp_path / "out", capsys)
    assert f"missing: {Q}; unknown: blk.1.attn_q.bias" in line
    tied = {key: value for key, value in tensors.items() if key != "output.weight"}
    import_checkpoint(gguf_files.write(tmp_path / "tied.gguf", fields, tied), tmp_path / "tied")
    assert read_json(tmp_path / "tied" / "config.json")["tie_word_embeddings"] is True
    huge = tensors | {Q: tensors[Q] * 1e6}
    file = gguf_files.write(tmp_path / "y.gguf", fields, huge)
    with pytest.raises(HFError, match=r"not all values are finite as float16 in model.layers.1.self_attn.q_"):
        import_checkpoint(file, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_quantisations_that_are_not_read(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A type that the library knows but does not unpack, one that it does not know, and integers."""
    file = gguf_files.write(tmp_path / "x.gguf", fields, tensors, {Q: Kind.Q8_0})
    data = file.read_bytes()
    place = data.index(Q.encode()) + len(Q) + 4 + 16
    assert struct.unpack_from("<I", data, place) == (Kind.Q8_0,)
    for number, message in ((Kind.Q8_1, f"quantised as Q8_1 (first {Q})"), (999, f"{Q} is quantised by type 999")):
        file.write_bytes(data[:place] + struct.pack("<I", number) + data[place + 4 :] + bytes(4096))
        assert message in refused(file, tmp_path / "out", capsys)
    whole = tensors | {Q: tensors[Q].astype(np.int32)}
    assert cli.main(["import", str(gguf_files.write(tmp_path / "y.gguf", fields, whole)), str(tmp_path / "out")]) == 2
    assert "of dtype I32" in capsys.readouterr().err


def test_damaged_files(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut anywhere, of another kind, version or byte order, or with a length out of all proportion."""
    whole = gguf_files.write(tmp_path / "whole.gguf", fields, tensors).read_bytes()
    file, out = tmp_path / "x.gguf", tmp_path / "out"
    for size in (4, 7, 20, 30, 200, 3000, len(whole) // 2, len(whole) - 32):
        file.write_bytes(whole[:size])
        assert "truncated" in refused(file, out, capsys), size
    tokens = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    changes = {
        "not a GGUF file": (0, b"PK\x03\x04"),
        "GGUF version 1": (4, struct.pack("<I", 1)),
        "big-endian": (4, struct.pack(">I", 3)),
        "truncated or damaged": (tokens, struct.pack("<Q", 1 << 60)),
        "field tokenizer.ggml.tokens is of type 99": (tokens - 8, struct.pack("<I", 99)),
    }
    for message, (at, new) in changes.items():
        file.write_bytes(whole[:at] + new + whole[at + len(new) :])
        assert message in refused(file, out, capsys)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(whole)
    assert "no config.json there, but GGUF files: give one of them, a.gguf" in refused(folder, out, capsys)
