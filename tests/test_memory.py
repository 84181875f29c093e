"""Memory is asked before a phase begins: of the program that then runs, and refused with a value that fits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from runs import one_device, open_run

from jmlr_jax.commands import pipeline
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.training import memory
from jmlr_jax.training.loop import train_phase
from jmlr_jax.training.memory import GIB, Knobs, MemoryShort, ask_memory, cgroup_free_bytes, step_bytes

COMPILED = "/jax/core/compile/backend_compile_duration"
SHORT = {"steps": 2, "checkpoint_steps": 2, "refresh_steps": 0, "dev_questions": 0}
JOINT = [PHASES["jmlr"]]


@pytest.fixture
def opened(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    one_device(monkeypatch)
    return lambda **sections: open_run(tiny_data, tmp_path, **sections)


def let(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The host has so many bytes free."""
    monkeypatch.setattr(memory, "host_free_bytes", lambda: free)


def compiled(act: Any) -> list[str]:
    """Names of the steps that XLA compiles while `act` runs."""
    names: list[str] = []

    def heard(event: str, duration: float, **about: Any) -> None:
        if event == COMPILED:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        act()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    return [name for name in names if "step" in name]


@pytest.mark.parametrize("arm", [pytest.param("jmlr", marks=pytest.mark.exhaustive), "bm25", "closed_book"])
def test_what_is_asked_is_what_runs(opened: Any, arm: str) -> None:
    """Asking compiles the step; training compiles none. The rate is this test's own."""
    run = opened(train=SHORT | {"generator": {"learning_rate": 0.0321}})
    assert len(compiled(lambda: ask_memory(run, [PHASES[arm]]))) == 1
    assert compiled(lambda: train_phase(run, PHASES[arm], Console(quiet=True))) == []


@pytest.mark.exhaustive
def test_what_does_not_fit_is_refused_with_what_does(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = opened(train=SHORT)
    needed = {a: step_bytes(run, PHASES["jmlr"], Knobs(a, remat=False)) for a in (1, 2, 4)}
    assert needed[1] > needed[2] > needed[4] > 0
    let(monkeypatch, (needed[1] + needed[2]) // 2)
    with pytest.raises(MemoryShort) as told:
        pipeline.train(run, "jmlr")
    said = str(told.value)
    assert said.startswith(f"jmlr: a step needs {needed[1] / GIB:.2f} GiB of memory, ") and "\n" not in said
    given = re.search(r"give train\.accumulate=(\d), which needs ([\d.]+) GiB", said)
    assert given and f"{needed[int(given[1])] / GIB:.2f}" == given[2]
    assert not (run.directory / "arms").exists()
    other = run.cfg.train.model_copy(update={"accumulate": int(given[1])})
    again = Run(run.cfg.model_copy(update={"train": other}), run.directory, run.prepared, run.mesh)
    ask_memory(again, JOINT)


@pytest.mark.exhaustive
def test_what_nothing_mends_says_so(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    let(monkeypatch, 1 << 16)
    with pytest.raises(MemoryShort, match="with train.accumulate=4 .*remat=full .*needs .* still: fewer"):
        ask_memory(opened(train=SHORT), JOINT)


@pytest.mark.exhaustive
def test_after_an_earlier_phase_recomputation_comes_first(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Microbatches are part of what the warm-up was made from; recomputation is not."""
    run = opened(train=SHORT | {"warmup": {"steps": 1}}, generator={"llama": {"num_layers": 6}})
    phases = [PHASES["warmup"], PHASES["jmlr"]]
    train_phase(run, phases[0], Console(quiet=True))
    needed = [step_bytes(run, PHASES["jmlr"], Knobs(1, remat=remat)) for remat in (False, True)]
    let(monkeypatch, int((needed[1] + 1) / (1 - memory.RESERVE)) + 1)
    with pytest.raises(MemoryShort, match=r"give generator.llama.remat=full retriever.bert.remat=full, which needs"):
        ask_memory(run, phases)


@pytest.mark.exhaustive
def test_processes_of_one_host_share_its_memory(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(train=SHORT)
    need = step_bytes(run, PHASES["jmlr"], Knobs(1, remat=False))
    let(monkeypatch, int(1.5 * need))
    ask_memory(run, JOINT)
    monkeypatch.setattr(memory, "gather", lambda row: [row, row])
    with pytest.raises(MemoryShort, match="a step needs"):
        ask_memory(run, JOINT)
    monkeypatch.setattr(memory, "gather", lambda row: [row, ["elsewhere", *row[1:]]])
    ask_memory(run, JOINT)


def test_a_control_group_counts(tmp_path: Path) -> None:
    """The tightest group around the process, file caches that can go as free; versions 1 and 2; no limit, no figure."""
    root, named = tmp_path / "cgroup", tmp_path / "named"

    def group(path: str, **files: str) -> None:
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / path / name.replace("__", ".")).write_text(text + "\n")

    group("", memory__max="9000", memory__current="1000", memory__stat="anon 1\ninactive_file 500")
    group("a/b", memory__max="max", memory__current="1000")
    named.write_text("0::/a/b\n")
    assert list(cgroup_free_bytes(named, root)) == [8500]
    group("a", memory__max="3000", memory__current="2000", memory__stat="inactive_file 0")
    assert list(cgroup_free_bytes(named, root)) == [1000, 8500]
    stat = "total_inactive_file 7"
    group("memory/x", memory__limit_in_bytes="100", memory__usage_in_bytes="90", memory__stat=stat)
    named.write_text("5:cpu:/x\n4:memory,hugetlb:/x\n")
    assert list(cgroup_free_bytes(named, root)) == [17]
    named.write_text("0::/nowhere\n")
    assert list(cgroup_free_bytes(named, root)) == [8500]
    assert list(cgroup_free_bytes(tmp_path / "none", root)) == []


def test_this_machine_says_what_it_has() -> None:
    free = memory.host_free_bytes()
    assert free is not None and 1 << 24 < free < 1 << 50
    held = np.ones(1 << 26)  # 512 MiB, written
    assert memory.host_free_bytes() < free + held.nbytes
