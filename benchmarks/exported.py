"""A run, and an arm of it as `jmlr export` writes it, for benchmarks that let other programs read it."""

from __future__ import annotations

from pathlib import Path

from jmlr_jax.cli import main as jmlr
from jmlr_jax.config_io import load
from jmlr_jax.run.open import Run


def opened(directory: Path, *overrides: str) -> Run:
    """The run in the directory of one seed, with other values of keys that no artifact there was made from."""
    return Run.open(load(str(directory / "config.yaml"), [f"run_dir={directory}", *overrides]))


def exported(directory: Path, folder: Path, arm: str) -> Path:
    """The arm, exported into `folder` unless it is there."""
    found = folder / f"exported_{arm}"
    if not found.exists() and jmlr(["export", str(directory), str(found), "--arm", arm]):
        raise SystemExit(f"{arm} could not be exported")
    return found
