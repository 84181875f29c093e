"""The command line: routing, messages, exit status, and that asking for help costs nothing."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from jmlr_jax import config_io
from jmlr_jax.cli import COMMANDS, main
from jmlr_jax.config import Config
from jmlr_jax.errors import JmlrError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the modules that do the work; records (function, arguments)."""
    made: list[tuple[Any, ...]] = []

    def recorder(name: str) -> Any:
        return lambda *args, **named: made.append((name, *args, *named.values()))

    functions = {
        "jmlr_jax.commands.pipeline": ("prepare_data", "index", "train", "write_report", "run_all"),
        "jmlr_jax.evaluation.arms": ("evaluate_arms",),
        "jmlr_jax.hf.convert": ("import_checkpoint",),
        "jmlr_jax.commands.compare": ("run",),
        "jmlr_jax.commands.export": ("export_run",),
        "jmlr_jax.commands.search": ("run_search",),
        "jmlr_jax.commands.ask": ("run_ask",),
        "jmlr_jax.serving.server": ("Settings", "run_server"),
        "jmlr_jax.planning.report": ("run",),
    }
    for module_name, names in functions.items():
        module = types.ModuleType(module_name)
        for name in names:
            setattr(module, name, recorder(name))
        monkeypatch.setitem(sys.modules, module_name, module)
        package, _, last = module_name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)
    opened = types.ModuleType("jmlr_jax.run.open")
    opened.Run = types.SimpleNamespace(open=lambda config: config)  # what a command opens stands for the run
    monkeypatch.setitem(sys.modules, "jmlr_jax.run.open", opened)
    return made


def test_each_command_calls_its_function(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(tmp_path / "run")
    config = Config(run_dir=run_dir)
    for command in ("prepare", "index", "train", "eval", "report", "run"):
        assert main([command, "--run-dir", run_dir]) == 0
    assert [c[0] for c in calls] == ["prepare_data", "index", "train", "evaluate_arms", "write_report", "run_all"]
    prepare, index, train, evaluate, report, run_all = calls
    assert prepare[1:] == (config,)
    assert index[1:] == (config,)
    assert train[1:] == (config, "jmlr")
    assert evaluate[1:] == (config, config.eval.arms)
    assert report[1:] == (config, None)
    assert run_all[1:] == (config, 1)
    assert capsys.readouterr().out.splitlines()[-1] == run_dir


def test_arms_and_seeds(calls: list[tuple[Any, ...]]) -> None:
    assert main(["train", "--arm", "all", "eval.arms=[jmlr,bm25]"]) == 0
    assert [c[2] for c in calls] == ["jmlr", "bm25"]
    calls.clear()
    assert main(["eval", "--arm", "random"]) == 0
    assert calls[0][2] == ("random",)
    calls.clear()
    assert main(["run", "--seeds", "3"]) == 0
    assert calls[0][2] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["train.steps=3", "--config", "smoke", "mesh.fsdp=-1"],
        ["--config", "smoke", "train.steps=3", "mesh.fsdp=-1"],
        ["train.steps=3", "mesh.fsdp=-1", "--config=smoke"],
    ],
)
def test_overrides_stand_anywhere(calls: list[tuple[Any, ...]], words: list[str]) -> None:
    assert main(["index", *words]) == 0
    assert calls[0][1] == config_io.load("smoke", ["train.steps=3", "mesh.fsdp=-1"])


def test_a_run_directory_brings_its_configuration(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_io.save_resolved(Config(run_dir="where it was first", seed=5), tmp_path / config_io.RESOLVED_NAME)
    assert main(["eval", "--run-dir", str(tmp_path), "eval.split=dev"]) == 0
    used = calls[0][1]
    assert (used.seed, used.eval.split, used.run_dir) == (5, "dev", str(tmp_path))
    assert str(tmp_path) in capsys.readouterr().err
    calls.clear()
    assert main(["eval", "--run-dir", str(tmp_path), "--config", "smoke"]) == 0
    assert calls[0][1].seed == 0, "--config comes before the saved configuration"


def test_print_config_is_yaml_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["print-config", "--config", "smoke", "train.steps=3"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["steps"] == 3
    (tmp_path / "x.yaml").write_text(text)
    assert config_io.load(str(tmp_path / "x.yaml")) == config_io.load("smoke", ["train.steps=3"])


def test_print_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["print-config", "--fields"]) == 0
    text = capsys.readouterr().out
    assert "train.candidates = 16\n    K (30 in the paper)" in text
    for row in config_io.field_rows():
        assert f"{row.key} = " in text


# Errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "train.stps=3"], "did you mean train.steps?"),
        (["train", "train.steps=x"], "train.steps = 'x': expected a whole number"),
        (["train", "--config", "nowhere"], "nowhere: no such file"),
    ],
)
def test_what_the_user_can_mend(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out = capsys.readouterr()
    assert expected in out.err and len(out.err.splitlines()) == 1 and "Traceback" not in out.err
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
        (["train", "--runs-dir", "x"], "unknown option --runs-dir"),
        (["train", "--arm", "best"], "invalid choice: 'best'"),
        (["run", "--seeds", "0"], "expected 1 or more"),
        (["run", "--seeds", "some"], "--seeds"),
    ],
)
def test_arguments_that_do_not_parse(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and expected in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "status", "expected"),
    [
        (JmlrError("line 3: field answer: missing"), 2, "jmlr: line 3: field answer: missing"),
        (FileNotFoundError(2, "No such file or directory", "train.jsonl"), 2, "train.jsonl"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_work_itself(
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    expected: str,
) -> None:
    def fail(*args: Any) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["jmlr_jax.commands.pipeline"], "index", fail)
    assert main(["index"]) == status
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err


def test_a_fault_of_ours_keeps_its_traceback(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["jmlr_jax.commands.pipeline"], "index", fail)
    with pytest.raises(ZeroDivisionError):
        main(["index"])


def test_record_errors_are_the_users() -> None:
    from jmlr_jax.data.schema import RecordError

    assert issubclass(RecordError, JmlrError)


# Help


HEAVY = ("jax", "flax", "numpy", "transformers", "grain", "tensorflow_datasets", "scann", "torch", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["print-config"], ["train", "train.stps=3"]])
def test_answers_without_importing_anything_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom jmlr_jax.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "examples:" in text
    for name, command in COMMANDS.items():
        assert name in text and " ".join(command.help.split()) in " ".join(text.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_parse(name: str, calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(COMMANDS[name].example)
    assert program == "jmlr" and words[0] == name
    assert main(words) == 0


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "jmlr_jax", "print-config", "seed=7"], capture_output=True, text=True)
    assert done.returncode == 0 and "seed: 7" in done.stdout
    done = subprocess.run([sys.executable, "-m", "jmlr_jax", "print-config", "sead=7"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
