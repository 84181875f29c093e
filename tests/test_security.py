"""Every claim of docs/security.md that tests/test_layout.py does not read out of the source."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmlr_jax import config_io
from jmlr_jax.cli import main
from jmlr_jax.data import tokenizers
from jmlr_jax.data.readers import read_questions
from jmlr_jax.data.schema import RecordError
from jmlr_jax.errors import JmlrError
from jmlr_jax.hf import io
from jmlr_jax.hf.io import HFError, read_directory, read_header, read_json
from jmlr_jax.hf.layouts import open_retriever
from jmlr_jax.run.candidates import kept_tables

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["data.world.conditions=48", "retriever.tokenizer_vocab=512", "generator.tokenizer_vocab=512"]
SMALL += ["generator.question_length=200", "generator.passage_length=100", "generator.answer_length=16"]


class Bomb:
    """Tells when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("something was unpickled",))


def header(table: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


# What is read


def test_no_path_leads_out_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(header({}))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / io.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(HFError, match="outside the directory"):
        read_directory(folder)
    (folder / "config.json").write_text("{}")
    modules = [{"path": "", "type": "pylate.models.Transformer"}, {"path": "../x", "type": "pylate.models.Dense.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(HFError, match="outside the directory"):
        open_retriever(folder)


# What is never executed


def test_pickled_weights_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(HFError, match="pickled weights only"):
        read_directory(tmp_path)


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "tables" / "fixed.npz"
    file.parent.mkdir()
    np.savez(file, of=np.array(["x"]), train=np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(JmlrError, match=r"fixed.npz: cannot be read"):
        kept_tables(file, "x", dict)


def test_a_model_brings_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Mine", None]}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Mine"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a model was run')\n")
    with pytest.raises(tokenizers.TokenizerError):
        tokenizers.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_dir: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("data: &a {world: {}}\nretriever: *a\n", r"mine.yaml:2: \*a: aliases are not read"),
        ("eval: {arms: " + "[" * 30_000, "mine.yaml:1: more than 20"),
    ],
    ids=["tag", "alias", "nesting"],
)
def test_a_configuration_makes_no_objects(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(config_io.ConfigError, match=said):
        config_io.load(str(tmp_path / "mine.yaml"))


# What leaves the machine


def test_nothing_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no directory is not looked up on a hub, and preparing data needs no connection."""

    def connects(*_: Any) -> None:
        pytest.fail("a connection was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, connects)
    monkeypatch.setattr(socket, "getaddrinfo", connects)
    monkeypatch.chdir(tmp_path)
    for key in ("generator.source", "retriever.source", "generator.tokenizer"):
        assert main(["prepare", "--run-dir", "run", f"{key}=bert-base-uncased", *SMALL]) == 2
        assert "bert-base-uncased" in capsys.readouterr().err
    assert main(["import", "bert-base-uncased", "out"]) == 2
    assert main(["prepare", "--run-dir", "run", *SMALL]) == 0


# Limits


def test_the_length_of_a_header_is_checked_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(HFError, match="not a safetensors file"):
        read_header(file)
    file.write_bytes(struct.pack("<Q", 90_000_000) + b"{}")
    with pytest.raises(HFError, match="truncated within its header"):
        read_header(file)


def test_a_tensor_has_the_bytes_of_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}, bytes(8)))
    with pytest.raises(HFError, match="a has 8 bytes"):
        read_header(file)


def test_nested_json_is_refused(tmp_path: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(HFError, match=r"config.json: not JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
    with pytest.raises(HFError, match="its header is not JSON"):
        read_header(tmp_path / "model.safetensors")
    for form in ("jsonl", "pubmedqa"):
        (tmp_path / "a.jsonl").write_text('{"question": ' + deep)
        with pytest.raises(RecordError, match=r"a.jsonl:1"):
            read_questions(form, str(tmp_path / "a.jsonl"))


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    for name, act in (
        ("config.json", lambda: read_json(tmp_path / "config.json")),
        ("tokenizer.json", lambda: tokenizers.load_tokenizer(str(tmp_path))),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate((1 << 28) + 1)  # sparse
        with pytest.raises(JmlrError, match=f"{name}: has 268,435,457 bytes"):
            act()


def test_a_compressed_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tables" / "fixed.npz"
    file.parent.mkdir()
    np.savez_compressed(file, of=np.array(["x"]), train=np.zeros(1 << 20, np.int32))
    assert zipfile.ZipFile(file).infolist()[1].compress_size < 1 << 14
    with pytest.raises(JmlrError, match="it is compressed"):
        kept_tables(file, "x", dict)


def test_the_page_speaks_of_what_is_tested() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    assert f"{io.MAX_JSON >> 20} MiB" in page and f"{tokenizers.MAX_BYTES >> 20} MiB" in page
