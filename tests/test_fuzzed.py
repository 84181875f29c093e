"""A fixed sample of `benchmarks/faults.py fuzz`: mutated input is read whole, or ends in an error of ours."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from jmlr_jax.errors import JmlrError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from faults_fuzz import mutated  # noqa: E402
from faults_inputs import TARGETS, Lost, by_csv, by_entries, by_lines  # noqa: E402

INPUTS = 60  # of each kind; a tokenizer takes ten times as long as the rest
SLOW = {"tokenizer.json": 4, "modules.json": 20}
SEALED = ("index card", "made_from.json")  # a sample without the sum that belongs to it


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_input_is_read_whole_or_refused(name: str, tmp_path: Path) -> None:
    sample, read = TARGETS[name](tmp_path)
    if name not in SEALED:
        read(sample)
    refused = 0
    for number in range(SLOW.get(name, INPUTS)):
        content = mutated(random.Random(f"sample {name} {number}"), sample)
        try:
            read(content)
        except JmlrError as error:
            refused += 1
            assert str(error).strip()
        except (FileNotFoundError, IsADirectoryError):
            refused += 1
    assert refused or name in ("jsonl questions", "medqa", "medmcqa", "jsonl corpus", "questions.jsonl")


def test_the_counts_are_not_the_readers() -> None:
    assert by_lines(b"a\n\n \nb\xe2\x80\xa8c\n") == 2 and by_lines(b"h\na\n", 1) == 1
    assert by_csv(b'h,i\n"a\nb",c\n\nd,e\n') == 2 and by_csv(b'h\n"a') is None
    assert by_entries(2)(b'{"a": {"x": 1, "y": 2}, "b": {}}') == 2 and by_entries(1)(b"[") is None


def test_a_reader_that_loses_a_record_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jmlr_jax.data import readers

    sample, read = TARGETS["jsonl questions"](tmp_path)
    lines = readers.read_lines
    monkeypatch.setattr(readers, "read_lines", lambda path: list(lines(path))[:-1])
    with pytest.raises(Lost, match="4 records, of which 3"):
        read(sample)
