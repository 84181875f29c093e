"""Files appear whole or not at all, and an address is never taken for a folder of this machine."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from jmlr_jax.cli import main
from jmlr_jax.config import Config
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.files import PlaceError, any_path, check_readable, local_path, replacing, write_text
from jmlr_jax.retrieval.store import open_index


def test_a_file_and_its_folders_appear(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "naïve\n")
    write_text(str(tmp_path / "a" / "b.txt"), "ï\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ï\n".encode()
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["b.txt"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "x.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of what was to be")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before  # not touched while being written either
        raise RuntimeError
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == ({} if before is None else {"x.bin": before})


def test_it_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(number: int) -> None:
        assert not (tmp_path / "x").exists()
        synced.append(number)

    monkeypatch.setattr("os.fsync", fsync)
    write_text(tmp_path / "x", "text")
    assert len(synced) == 1


# Addresses


@pytest.mark.parametrize("words", [["prepare", "--run-dir"], ["run", "--run-dir"], ["eval", "--run-dir"], ["export"]])
@pytest.mark.parametrize("given", ["gs://bucket/runs/a", "s3://bucket/a", "https://host/a", "file:///tmp/a"])
def test_a_run_directory_is_a_folder_of_this_machine(
    words: list[str], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pathlib would make a local folder ``gs:`` and keep the run there."""
    monkeypatch.chdir(tmp_path)
    assert main([*words, given, *(["out"] if words == ["export"] else [])]) == 2
    err = capsys.readouterr().err
    assert f"run_dir: {given}: is an address" in err and "mount the bucket" in err and "docs/tpu.md" in err
    assert len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_so_does_a_run_directory_in_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 1\nrun_dir: gs://bucket/runs/a\n")
    assert main(["index", "--config", "mine.yaml"]) == 2
    assert "mine.yaml:2: run_dir: gs://bucket/runs/a: is an address" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_functions_refuse_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda: prepare(Config(), "gs://bucket/data"),
        lambda: Prepared.open("gs://bucket/data"),
        lambda: open_index(Path("gs://bucket/index"), "", None),  # pathlib has made gs:/ of it
    ):
        with pytest.raises(PlaceError, match="gs:/+bucket/.*mount the bucket"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["data.train_path", "data.corpus_path", "generator.source", "retriever.source"])
def test_an_address_that_nothing_reads(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", f"{key}=https://host/file.jsonl"]) == 2
    err = capsys.readouterr().err
    assert f"{key}: https://host/file.jsonl: https: is not read here; download" in err and len(err.splitlines()) == 1


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_bucket_without_its_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"data.{name}_path=gs://bucket/{name}.jsonl" for name in ("train", "test", "corpus")]
    for words in (
        ["prepare", "--run-dir", str(tmp_path / "run"), "data.questions=jsonl", *files],
        ["prepare", "--config", "gs://bucket/mine.yaml"],
        ["import", "gs://bucket/model", str(tmp_path / "model")],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "gs://bucket/" in err and "pip install gcsfs" in err and len(err.splitlines()) == 1


def test_a_tokenizer_lies_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--run-dir", str(tmp_path / "run"), "data.world.conditions=48"]
    assert main([*words, "generator.tokenizer=gs://bucket/llama"]) == 2
    assert "generator.tokenizer: gs://bucket/llama: is an address" in capsys.readouterr().err
    with pytest.raises(PlaceError, match="gs://bucket/llama: is an address"):
        load_tokenizer("gs://bucket/llama")


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    for path in ("a", "a:b/c", "/mnt/jmlr/runs/a", "C:/x", "a b#c"):
        assert local_path(path) == Path(path).absolute() and check_readable(path) == path
        assert any_path(path) == any_path(Path(path))
