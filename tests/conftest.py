"""Set-up shared by all tests: eight virtual CPU devices, the shared data, and no silent skips."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports JAX: tests run on the CPU, with enough devices to shard over.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Tests, and the commands that they start, compile the same small programs over and over: all workers of a session share
# what they have compiled. The first process makes the folder and takes it away; the others inherit its name.
COMPILED = os.environ.get("JMLR_TESTS_COMPILED")
OWN_COMPILED = None if COMPILED else tempfile.mkdtemp(prefix="jmlr-tests-")
os.environ["JMLR_TESTS_COMPILED"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED or OWN_COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Their time is compilation, so XLA leaves out its dear optimizations, in the commands that they start too. Set it to 0
# to test what users run; all tests of a session must agree, since a seed's initial weights round by it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

ROOT = Path(__file__).resolve().parent.parent
NO_SHARED_DATA = "shared data not found at"
NO_BROWSER = "no browser at"  # tpu_scripts/test.sh has said why; it may not install one everywhere
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
def patch() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch for a whole file, whose runs lie on one device (``runs.one_device``)."""
    from runs import one_device

    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        yield monkeypatch


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the tiny world, to be given to ``runs.open_run``; made once, never changed."""
    from runs import tiny_config

    from jmlr_jax.commands.pipeline import prepare_data

    folder = tmp_path_factory.mktemp("tiny")
    prepare_data(tiny_config(folder))
    return folder / "data"


@pytest.fixture(scope="session")
def askable(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of :func:`answering.askable_run`, made once for all test processes; copy it before changing it."""
    import fcntl

    from answering import askable_run
    from runs import one_device

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "askable"
    with open(folder.with_suffix(".lock"), "w") as lock, pytest.MonkeyPatch.context() as monkeypatch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_device(monkeypatch)
        if not (folder / "done").exists():
            askable_run(tiny_data, folder)
            (folder / "done").touch()
    return folder


def pytest_unconfigure() -> None:
    if OWN_COMPILED:
        shutil.rmtree(OWN_COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Remember a test that did not truly run: skipped for any reason but missing shared data or a browser, or
    marked xfail."""
    if hasattr(report, "wasxfail"):
        _unwanted.append(f"{report.nodeid}: marked xfail")
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if NO_SHARED_DATA not in reason and NO_BROWSER not in reason:
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
