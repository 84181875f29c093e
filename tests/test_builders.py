"""tensorflow-datasets builders: what is written comes back in order, and TensorFlow stays out."""

import subprocess
import sys

import pytest

from jmlr_jax.data.builders import read_passages, read_questions_split, write_corpus, write_questions
from jmlr_jax.data.schema import Passage, Question

QUESTIONS = [
    Question("ä-1", "Qué?\n{x}", ("eins", "zwei"), "zwei", 1, ("d1", "d2"), "kind", {"focus": "ß"}),
    Question("2", "free?", (), "text", -1),
]


def test_questions_come_back_as_they_were(tmp_path):
    write_questions(tmp_path, {"train": QUESTIONS, "dev": QUESTIONS[:1], "test": []})
    assert list(read_questions_split(tmp_path, "train")) == QUESTIONS
    assert list(read_questions_split(tmp_path, "dev")) == QUESTIONS[:1]
    assert list(read_questions_split(tmp_path, "test")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions"]
    assert next(tmp_path.rglob("*train*array_record*")).is_file()


def test_order_is_kept_and_rows_are_random_access(tmp_path):
    passages = [Passage(f"p{i}", "T", f"text {i}", "S", "U") for i in range(3000)]
    write_corpus(tmp_path, passages)
    records = read_passages(tmp_path)
    assert list(records) == passages
    assert records[2999] == records[-1] == passages[-1] and records[10:12] == passages[10:12]
    with pytest.raises(IndexError):
        records[3000]


def test_tensorflow_and_torch_are_not_imported(tmp_path):
    program = f"""
import sys
from pathlib import Path
from jmlr_jax.data.builders import read_passages, write_corpus
from jmlr_jax.data.schema import Passage
write_corpus(Path({str(tmp_path)!r}), [Passage("a", "", "b")])
assert read_passages(Path({str(tmp_path)!r}))[0].text == "b"
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
