"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from jmlr_jax.files import replacing, write_text


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
