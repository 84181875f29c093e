"""Safetensors: the same bytes as the library's, and every damaged, incomplete or contradictory directory refused."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jmlr_jax.config_models import LlamaConfig, RetrieverConfig
from jmlr_jax.hf import io
from jmlr_jax.hf.io import HFError, Tensor, read_directory, read_header, whole_directory, write_directory, write_file
from jmlr_jax.hf.load import load_generator, load_retriever
from jmlr_jax.hf.table import gather


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal((2, 2, 2)).astype(jnp.bfloat16),
        "c": rng.standard_normal(5).astype(np.float16),
        "d": np.arange(6).reshape(1, 6),
        "e": np.array(2.5, np.float32),
        "f": np.zeros((0, 3), np.float32),
    }


def tensors(held: dict[str, np.ndarray]) -> list[Tensor]:
    return [Tensor(name, x.dtype, x.shape, lambda x=x: x) for name, x in held.items()]


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(values(), tmp_path / "model.safetensors")
    entries = read_directory(tmp_path)
    for name, value in values().items():
        np.testing.assert_array_equal(entries[name].read(), value)
        assert entries[name].read().dtype == value.dtype


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_the_library_reads_what_is_written(shard_bytes: int, tmp_path: Path) -> None:
    write_directory(tmp_path, tensors(values()), shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 100 else 4)
    found = {name: value for file in files for name, value in load_file(file).items()}
    for name, value in values().items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(read_directory(tmp_path)[name].read(), value)
    if len(files) > 1:
        index = json.loads((tmp_path / io.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in values().values())


def test_a_tensor_that_is_not_what_it_was_announced_to_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t is float64, not float32"):
        write_file(tmp_path / "x", [Tensor("t", np.dtype(np.float32), (2,), lambda: np.zeros(2))])


def edit_header(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated \\(": lambda data: data[:-1],
    "truncated within its header": lambda data: data[:20],
    "not a safetensors file": lambda data: data[:5],
    "its beginning is damaged": lambda data: b"\xff" * 8 + data[8:],
    "is not JSON": lambda data: data[:8] + b"\x00" + data[9:],
    "followed by bytes that belong to no tensor": lambda data: data + b"x",
    "header entry of a is malformed": edit_header(lambda header: header["a"].pop("shape")),
    "a has 48 bytes, F32 \\[5, 4\\] needs 80": edit_header(lambda header: header["a"].update(shape=[5, 4])),
    "overlap others or leave a gap": edit_header(lambda header: header.pop("a")),
    "a has 48 bytes, F64 \\[3, 4\\] needs 96": edit_header(lambda header: header["a"].update(dtype="F64")),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage(message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, tensors(values()))
    file.write_bytes(DAMAGE[message](file.read_bytes()))
    with pytest.raises(HFError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)


def test_unknown_dtype_is_refused_when_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, tensors({"a": np.zeros(4, np.uint8)}))
    file.write_bytes(edit_header(lambda header: header["a"].update(dtype="F8_E4M3"))(file.read_bytes()))
    with pytest.raises(HFError, match="dtype F8_E4M3 is not read here; save the model as float32"):
        read_header(file)["a"].read()


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(HFError, match=r"pickled weights only \(pytorch_model.bin\).*save_pretrained"):
        read_directory(tmp_path)
    with pytest.raises(HFError, match="no such directory"):
        read_directory(tmp_path / "none")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "adapter_config.json")
    with pytest.raises(HFError, match="holds PEFT adapters"):
        read_directory(tmp_path)


def sharded(folder: Path) -> dict:
    write_directory(folder, tensors(values()), 40)
    return json.loads((folder / io.INDEX).read_text())


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first, second = index["weight_map"]["a"], index["weight_map"]["b"]
    index["weight_map"] |= {"a": second, "ghost": second}
    (tmp_path / io.INDEX).write_text(json.dumps(index))
    # The file of "a" is named by no key any more, so that "a" is lost altogether.
    with pytest.raises(HFError, match=f"(?s)a is not in {second}.*ghost is not in {second}"):
        read_directory(tmp_path)
    index["weight_map"] |= {"f": first}
    (tmp_path / io.INDEX).write_text(json.dumps(index))
    with pytest.raises(HFError, match=f"a is in {first}, the index has it in {second}"):
        read_directory(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    write_file(tmp_path / index["weight_map"]["b"], tensors({"a": values()["a"], "b": values()["b"]}))
    with pytest.raises(HFError, match=r"a is set twice, in model-0000\d-of-00004"):
        read_directory(tmp_path)


def test_a_missing_shard_and_a_path_out_of_the_directory(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / index["weight_map"]["c"]).unlink()
    with pytest.raises(HFError, match=f"not there: {index['weight_map']['c']}"):
        read_directory(tmp_path)
    index["weight_map"]["c"] = "../model.safetensors"
    (tmp_path / io.INDEX).write_text(json.dumps(index))
    with pytest.raises(HFError, match="outside the directory: ../model.safetensors"):
        read_directory(tmp_path)


def test_one_file_and_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_file(tmp_path / io.SINGLE, tensors(values()))
    with pytest.raises(HFError, match="holds both"):
        read_directory(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a saved model."""
    held = load_file(folder / "model.safetensors")
    change(held)
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", tensors(held))


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    hf_models.decoder("qwen3", tmp_path)

    def change(held: dict[str, np.ndarray]) -> None:
        for layer in (0, 1):
            del held[f"model.layers.{layer}.self_attn.q_norm.weight"]
        held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        held["model.norm.weight"] = np.zeros(31, np.float32)
        held["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)

    rewrite(tmp_path, change)
    with pytest.raises(HFError) as error:
        load_generator(str(tmp_path), LlamaConfig(max_positions=16))
    text = str(error.value)
    assert "missing: model.layers.{0-1}.self_attn.q_norm.weight" in text
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in text
    assert "of shape [31] where config.json asks for [32]: model.norm.weight" in text
    assert "of dtype I8, which is none of F32, F16, BF16: model.layers.1.mlp.up_proj.weight" in text


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    hf_models.encoder(tmp_path)
    key = "embeddings.LayerNorm.weight"
    rewrite(tmp_path, lambda held: held.update({"embeddings.LayerNorm.gamma": held[key]}))
    cfg = RetrieverConfig(bert=RetrieverConfig().bert.model_copy(update={"max_positions": 40}))
    with pytest.raises(HFError, match=f"set twice: {key} \\(by embeddings.LayerNorm.*gamma"):
        load_retriever(str(tmp_path), cfg, jax.random.key(0))
    rewrite(tmp_path, lambda held: held.pop(key))
    load_retriever(str(tmp_path), cfg, jax.random.key(0))  # the old name alone


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    hf_models.decoder("llama, tied, own head width", tmp_path)
    asked = LlamaConfig(max_positions=16)
    rewrite(tmp_path, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"]}))
    assert "lm_head" not in load_generator(str(tmp_path), asked)[1]
    rewrite(tmp_path, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1}))
    with pytest.raises(HFError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_generator(str(tmp_path), asked)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    hf_models.decoder("llama", tmp_path)
    key = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path, lambda held: held.update({key: np.full_like(held[key], 1e30)}))
    load_generator(str(tmp_path), LlamaConfig(max_positions=16))
    with pytest.raises(HFError, match=r"model\.layers\.\*\.mlp\.down_proj\.weight of F32 as float16"):
        load_generator(str(tmp_path), LlamaConfig(max_positions=16, param_dtype="float16"))


def test_old_checkpoints_bring_derived_tensors(tmp_path: Path) -> None:
    hf_models.decoder("llama", tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    rewrite(tmp_path, lambda held: held.update(extra))
    load_generator(str(tmp_path), LlamaConfig(max_positions=16))
    encoder = tmp_path / "encoder"
    hf_models.encoder(encoder, torch.float32)
    rewrite(encoder, lambda held: held.update({"embeddings.position_ids": np.arange(40)[None] + 1}))
    cfg = RetrieverConfig(bert=RetrieverConfig().bert.model_copy(update={"max_positions": 40}))
    with pytest.raises(HFError, match=r"position_ids is not 0, 1, 2"):
        load_retriever(str(encoder), cfg, jax.random.key(0))


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), whole_directory(target) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.part").mkdir()  # what a killed process leaves
    (tmp_path / ".out.part" / "stale").write_text("x")
    with whole_directory(target) as folder:
        (folder / "new").write_text("x")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(HFError, match="exists already"), whole_directory(target):
        pass


KILLED_WHILE_WRITING = """
import os, signal, sys
import numpy as np
from jmlr_jax.hf.io import Tensor, whole_directory, write_directory

def value():
    assert os.path.getsize(f".{sys.argv[1]}.part/model-00001-of-00002.safetensors") > 4_000_000  # one shard is there
    os.kill(os.getpid(), signal.SIGKILL)

with whole_directory(sys.argv[1]) as folder:
    shape, dtype = (1_000_000,), np.dtype(np.float32)
    first = Tensor("a", dtype, shape, lambda: np.ones(shape, dtype))
    write_directory(folder, [first, Tensor("b", dtype, shape, value)], 4_000_000)
"""


def test_a_killed_process_leaves_no_directory(tmp_path: Path) -> None:
    """SIGKILL between two shards: what is left is hidden, is not taken for a model, and goes with the next attempt."""
    env = os.environ | {"PYTHONPATH": str(Path(io.__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    with pytest.raises(HFError, match="no such directory"):
        read_directory(tmp_path / "out")
    with whole_directory(tmp_path / "out") as folder:
        write_directory(folder, tensors(values()), 40)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert read_directory(tmp_path / "out").keys() == values().keys()


def test_keys_are_gathered_by_layer() -> None:
    keys = [f"l.{i}.w" for i in (0, 1, 2, 5, 7, 8)] + ["l.3.b", "x"]
    assert gather(keys) == ["x", "l.{0-2,5,7-8}.w", "l.3.b"]
