"""A run directory small enough for a test: 72 conditions, models of width 16, one device, batches of 4."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jmlr_jax.config import Config
from jmlr_jax.config_io import RESOLVED_NAME, save_resolved
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.run import open as run_module
from jmlr_jax.run.open import Run

TINY: dict[str, Any] = {
    "data": {"world": {"conditions": 72, "values": 12}},
    "retriever": {
        "tokenizer_vocab": 512,
        "dim": 8,
        "query_length": 24,
        "passage_length": 40,
        "bert": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1},
    },
    "generator": {
        "tokenizer_vocab": 512,
        "passage_length": 56,
        "question_length": 80,
        "answer_length": 12,
        "llama": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1},
    },
    "index": {"encode_batch": 32, "oracle_queries": 4},
    "train": {
        "steps": 12,
        "batch_size": 4,
        "candidates": 4,
        "mix": {"index": 2, "bm25": 1, "random": 1},
        "sampled": 3,
        "pack": [],  # each fraction is compiled
        "read_passages": 2,
        "refresh_steps": 4,
        "refresh_delay": 2,
        "checkpoint_steps": 5,
        "dev_questions": 4,
        "probe_questions": 0,
        "log_steps": 1,
        "warmup": {"steps": 0},
    },
    "eval": {"max_questions": 4, "bootstrap": 20, "batch_size": 4, "hit_at": [1, 5]},
}


def tiny_config(run_dir: Path, **sections: Any) -> Config:
    """The tiny configuration; `sections` override it, ``train={"steps": 3}``."""
    return Config.model_validate(_merged(TINY, {"run_dir": str(run_dir), **sections}))


def open_run(data: Path, run_dir: Path, **sections: Any) -> Run:
    """A run of :func:`tiny_config` with its own copy of the prepared data, on one device (see :func:`one_device`)."""
    cfg = tiny_config(run_dir, **sections)
    if not (run_dir / "data").exists():
        shutil.copytree(data, run_dir / "data")
        save_resolved(cfg, run_dir / RESOLVED_NAME)
    return Run.open(cfg)


def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs lay their mesh over the first device alone: small programs compile faster for one than for eight."""
    monkeypatch.setattr(run_module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))


def assert_same_weights(a: Any, b: Any) -> None:
    """The very same bits in the same tree."""
    one, other = jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
    assert [path for path, _ in one] == [path for path, _ in other] and one
    for (path, x), (_, y) in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged
