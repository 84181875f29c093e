"""An index over 2 and 4 real processes answers as one index does."""

import doctest
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from indexes import CFG, build, clustered
from sharded_search import CASES, PASSAGES, QUESTIONS, K, allowed_rows

from jmlr_jax.retrieval import shards
from jmlr_jax.retrieval.shards import ShardedIndex, best_of_all, share_of
from jmlr_jax.retrieval.tokens import best_of

HERE = Path(__file__).parent


def test_docstrings():
    assert doctest.testmod(shards) == (0, 1)


@pytest.mark.parametrize("passages, processes", [(203, 4), (8, 8), (9, 2)])
def test_shares_cover_the_corpus_once(passages, processes):
    shares = [share_of(passages, process, processes) for process in range(processes)]
    assert [row for share in shares for row in share] == list(range(passages))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_passages_are_refused():
    with pytest.raises(ValueError, match="fewer processes"):
        share_of(3, 0, 4)


def test_the_best_of_all_processes(monkeypatch):
    """With ties, and with different numbers of rows; what three processes would exchange is put together here."""
    score = np.random.default_rng(0).integers(0, 12, (5, 20)).astype(np.float32)
    want = np.argsort(-score, axis=1, kind="stable")[:, :6]
    parts = [range(3), range(3, 11), range(11, 20)]
    own = [(np.tile(np.array(rows), (5, 1)), score[:, rows]) for rows in parts]
    sent = [best_of(*found, 6) for found in own]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for (rows, scores), given in zip(own, sent, strict=True):
        asked = iter(zip(given, zip(*sent, strict=True), strict=True))

        def exchanged(array, asked=asked):
            mine, everyone = next(asked)
            np.testing.assert_array_equal(array, mine)
            return np.stack(everyone)

        monkeypatch.setattr(shards, "_all", exchanged)
        row, best = best_of_all(rows, scores, 6)
        np.testing.assert_array_equal(row, want)
        np.testing.assert_array_equal(best, np.take_along_axis(score, want, 1))


@pytest.fixture(scope="module")
def whole():
    """The index of one process over everything."""
    vectors, q = clustered(PASSAGES, QUESTIONS)
    found = {}
    for name, changes in CASES.items():
        index = build(vectors, q, **{"kind": "scann", **changes})
        found[name] = (*index.search(q, K), index.search(q, K, allowed_rows())[0])
    return found


def start(count, out):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, str(HERE / "sharded_search.py"), address]
    return [
        subprocess.Popen([*command, str(i), str(count), str(out)], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_shards_answer_as_one_index(count, whole, tmp_path):
    """Rows and scores alike, filtered too, and the same in every process; ScaNN is brute force at this size."""
    processes = start(count, tmp_path)
    for process in processes:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
    for number in range(count):
        with np.load(tmp_path / f"{number}.npz") as got:
            for name, (rows, scores, filtered) in whole.items():
                assert got[f"{name}/size"].tolist() == [PASSAGES, len(share_of(PASSAGES, number, count))]
                np.testing.assert_array_equal(got[f"{name}/rows"], rows, err_msg=f"{name} in {number}")
                np.testing.assert_allclose(got[f"{name}/scores"], scores, rtol=1e-5, err_msg=name)
                np.testing.assert_array_equal(got[f"{name}/filtered"], filtered, err_msg=f"{name} in {number}")


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_one_process_is_the_same_code(kind, whole):
    vectors, q = clustered(PASSAGES, QUESTIONS)
    index = ShardedIndex.build(lambda rows: [vectors.rows(rows)], PASSAGES, CFG.model_copy(update={"kind": kind}))
    np.testing.assert_array_equal(index.search(q, K)[0], whole["exact" if kind == "exact" else "float16"][0])
    assert index.search(q[:0], K)[0].shape == (0, K)
    rows, scores = index.search(q[:2], PASSAGES + 5)
    assert (rows[:, PASSAGES:] == -1).all() and np.array_equal(np.sort(rows[0, :PASSAGES]), np.arange(PASSAGES))
    assert np.isneginf(scores[:, PASSAGES:]).all()
