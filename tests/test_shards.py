"""Shards of an index over two real processes answer as one index does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from indexes import build, clustered
from sharded_search import KINDS, PASSAGES, QUESTIONS, K, allowed_rows

from jmlr_jax.retrieval.shards import shard_rows

HERE = Path(__file__).parent


@pytest.mark.parametrize("passages, processes", [(203, 4), (8, 8), (9, 2)])
def test_shares_cover_the_corpus_once(passages, processes):
    shards = [shard_rows(passages, process, processes) for process in range(processes)]
    assert [row for shard in shards for row in shard] == list(range(passages))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_more_processes_than_passages_are_refused():
    with pytest.raises(ValueError, match="fewer processes"):
        shard_rows(3, 0, 4)


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


@pytest.mark.exhaustive
def test_shards_answer_as_one_index(tmp_path):
    """Rows and scores alike, filtered too, and the same in every process; every passage is scored."""
    vectors, q = clustered(PASSAGES, QUESTIONS)
    processes = start(2, tmp_path)
    whole = {kind: build(vectors, q, kind, rerank=PASSAGES) for kind in KINDS}
    for process in processes:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
    for number in range(2):
        with np.load(tmp_path / f"{number}.npz") as got:
            for kind, index in whole.items():
                rows, scores = index.search(q, K)
                assert got[f"{kind}/held"].tolist() == [len(shard_rows(PASSAGES, number, 2))]
                np.testing.assert_array_equal(got[f"{kind}/rows"], rows, err_msg=f"{kind} in {number}")
                np.testing.assert_allclose(got[f"{kind}/scores"], scores, rtol=1e-5, err_msg=kind)
                filtered, _ = index.search(q, K, allowed_rows())
                np.testing.assert_array_equal(got[f"{kind}/filtered"], filtered, err_msg=f"{kind} in {number}")
