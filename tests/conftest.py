"""Set-up shared by all tests: eight virtual CPU devices, the shared data, and no silent skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports JAX: tests run on the CPU, with enough devices to shard over.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

ROOT = Path(__file__).resolve().parent.parent
NO_SHARED_DATA = "shared data not found at"
# Files of minutes go first, so that no core waits for the last of them (with xdist's own order switched off).
LONG = (
    "test_documented_commands",
    "test_presets",
    "test_multiprocess",
    "test_resume",
    "test_mesh_shapes",
    "test_plan",
    "test_pipeline",
    "test_gold_unread",
)
_unwanted: list[str] = []


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared data sets: ``$JMLR_DATA``, or ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("JMLR_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{NO_SHARED_DATA} {folder}: set JMLR_DATA")
    return folder


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """For files whose time is compilation: XLA leaves out its dear optimizations, which halves it.

    What was compiled so is forgotten afterwards: it rounds otherwise, and a file that mixed the two kinds would see a
    seed's initial weights change under it.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the tiny world, to be given to ``runs.open_run``; made once, never changed."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache
    from runs import tiny_config

    from jmlr_jax.commands.pipeline import prepare_data

    # Tests of runs compile the same small programs over and over.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    folder = tmp_path_factory.mktemp("tiny")
    prepare_data(tiny_config(folder))
    return folder / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Remember a test that did not truly run: skipped for any reason but missing shared data, or marked xfail."""
    if hasattr(report, "wasxfail"):
        _unwanted.append(f"{report.nodeid}: marked xfail")
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if NO_SHARED_DATA not in reason:
            _unwanted.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _skips_fail() -> bool:
    return bool(_unwanted) and os.environ.get("JMLR_ALLOW_SKIPS") != "1"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    if _skips_fail() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skips_fail():
        terminalreporter.section("skipped tests count as failures (JMLR_ALLOW_SKIPS=1 permits them)", red=True)
        for line in _unwanted:
            terminalreporter.line(line)
