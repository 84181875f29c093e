"""Two runs side by side: paired on common questions, refused where they are not comparable."""

import json
import re

import numpy as np
import pytest
from made_runs import made_rows, write_questions

from jmlr_jax.cli import main
from jmlr_jax.commands.compare import NotComparable, compare
from jmlr_jax.evaluation.intervals import paired_bootstrap


def write(folder, accuracy, seed=0, n=40, arm="jmlr", split="test", **changed):
    rows = [row | changed for row in made_rows(np.random.default_rng(seed), accuracy, n)]
    write_questions(folder / "eval" / split / arm, rows)
    return rows


def test_differences_are_paired_on_common_questions(tmp_path, capsys):
    a, b = write(tmp_path / "a", 0.8, n=40), write(tmp_path / "b", 0.5, seed=1, n=30)
    write(tmp_path / "a", 0.5, arm="bm25")  # b has no such arm
    file = tmp_path / "c.json"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found["arms"]) == {"jmlr"} and found["seeds"] == [["a", "b"]] and found["split"] == "test"
    row, right = found["arms"]["jmlr"], [[float(r["correct"]) for r in rows[:30]] for rows in (a, b)]
    expected = paired_bootstrap(*right, groups=[r["group"] for r in b])
    assert (row["mean"], row["low"], row["high"], row["p"]) == pytest.approx(expected)
    assert (row["n"], row["asked"]) == (30, [40, 30])
    assert (row["first"], row["second"]) == pytest.approx(np.mean(right, axis=1))
    out = capsys.readouterr().out
    assert f"{100 * expected.mean:+.1f}" in out and "30 of 40, 30" in out


def test_seeds_are_paired_by_name(tmp_path):
    for run, seeds, accuracy in (("a", (0, 1, 2), 0.9), ("b", (1, 2, 3), 0.3)):
        for seed in seeds:
            write(tmp_path / run / f"seed_{seed}", accuracy, seed=10 * seed)
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"), "test")
    assert found["seeds"] == [["seed_1", "seed_1"], ["seed_2", "seed_2"]]
    assert found["arms"]["jmlr"]["n"] == 80 and found["arms"]["jmlr"]["low"] > 0


@pytest.mark.parametrize("changed", [{"question": "Another?"}, {"option_texts": ["w", "x", "y", "v"]}, {"answer": 2}])
def test_other_questions_under_the_same_id_are_refused(tmp_path, changed, capsys):
    write(tmp_path / "a", 0.8)
    write(tmp_path / "b", 0.8, **changed)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "question q0 of jmlr is not the same in a and b" in said and len(said.splitlines()) == 1


def test_what_is_not_comparable_is_refused(tmp_path):
    write(tmp_path / "a", 0.8)
    write(tmp_path / "dev", 0.8, split="dev")
    write(tmp_path / "ids", 0.8, id="elsewhere")
    for seed in (0, 1):
        write(tmp_path / "early" / f"seed_{seed}", 0.5)
        write(tmp_path / "late" / f"seed_{seed + 2}", 0.5)
    for one, other, words in (
        ("a", "dev", "a (jmlr) and .*dev (none) was evaluated on test in both; run `jmlr eval eval.split=test`"),
        ("a", "ids", "jmlr: a and ids have no question in common"),
        ("early", "late", "early has seed_0, seed_1, .*late has seed_2, seed_3: no seed in common"),
        ("a", "nowhere", "nowhere: no such run directory"),
    ):
        with pytest.raises(NotComparable, match=words.replace("(", r"\(").replace(")", r"\)")):
            compare(str(tmp_path / one), str(tmp_path / other), "test")
    assert re.search("jmlr", str(compare(str(tmp_path / "a"), str(tmp_path / "a"), "test")))
