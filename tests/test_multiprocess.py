"""The whole trainer as several processes (CPU, gloo): what one process gets, who writes, what a kill leaves.

One run of two processes is held against one process with two devices. A second one is stopped, killed, and then
finished three times over: by two processes, by four and by one.
"""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from processes import Job
from runs import tiny_config

from jmlr_jax import cli
from jmlr_jax.commands import pipeline
from jmlr_jax.config_io import save_resolved
from jmlr_jax.data.batches import Prepared
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.run import open as run_module
from jmlr_jax.run.open import Run

pytestmark = pytest.mark.exhaustive

STEPS = 20
TRAIN = {"steps": STEPS, "refresh_steps": 5, "refresh_delay": 2, "checkpoint_steps": 4, "warmup": {"steps": 3}}
TRAIN |= {"help_margin": 0.0}  # to a reader that has learned nothing every difference is small
# Losses of the same program over the same devices, whoever owns them; over one device or four, sums take other orders.
SAME_DEVICES, OTHER_DEVICES = 1e-5, 2e-3


def configured(root, arms=("jmlr",)):
    """The configuration of a run here, as a file."""
    llama = {"num_heads": 2, "num_kv_heads": 2, "vocab_size": 512}  # what a tensor axis of 2 divides
    config = tiny_config(root, train=TRAIN, eval={"arms": list(arms)}, generator={"llama": llama})
    save_resolved(config, root / "asked.yaml")
    return config, ("--config", str(root / "asked.yaml"))


def over(monkeypatch, count: int) -> None:
    monkeypatch.setattr(run_module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:count]))


def rows(folder, phase="jmlr"):
    return [json.loads(line) for line in (folder / "arms" / phase / "metrics.jsonl").read_text().splitlines()]


def ranked(file):
    """The lines of a run file: question, Q0, passage, rank, score, tag."""
    return [line.split() for line in file.read_text().splitlines()]


def assert_close(one, other, tolerance):
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss/answer", "loss/rank", "grad_norm/generator", "dev/loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """`jmlr run` by two processes, from preparation to report."""
    root = tmp_path_factory.mktemp("two")
    _, words = configured(root, ("jmlr", "frozen"))
    with Job(root, 2, "run", *words) as job:
        job.succeeds()
    return root


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """The same by one process with two devices, on the same data."""
    root = tmp_path_factory.mktemp("one")
    shutil.copytree(two / "seed_0" / "data", root / "seed_0" / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        over(monkeypatch, 2)
        pipeline.run_all(configured(root, ("jmlr", "frozen"))[0], seeds=1)
    return root


def test_two_processes_train_as_one_does(one, two):
    for phase in ("warmup", "jmlr", "frozen"):
        ours, theirs = rows(two / "seed_0", phase), rows(one / "seed_0", phase)
        assert_close(ours, theirs, SAME_DEVICES)
        plain = [row["step"] for row in ours if "dev/loss" not in row]
        assert plain == list(range(1, 1 + (3 if phase == "warmup" else STEPS))), "one process writes, each step once"


def test_their_candidate_tables_are_those_of_one_process(one, two):
    files = sorted((two / "seed_0/arms/jmlr/tables").glob("step_*.npz"))
    assert [file.name for file in files] == [f"step_{step:07d}.npz" for step in range(0, STEPS, 5)]
    for file in files:
        ours, theirs = np.load(file), np.load(one / "seed_0/arms/jmlr/tables" / file.name)
        for name in ("rows", "train", "dev", "top"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{file.name} {name}")


def test_each_process_indexed_its_shard_of_the_corpus(two):
    for name in ("initial", "jmlr"):
        folder = two / "seed_0" / "index" / name
        cards = [json.loads((folder / f"shard_{i}_of_2" / "card.json").read_text()) for i in range(2)]
        total = len(Prepared.open(two / "seed_0" / "data").passages)
        assert sum(card["passages"] for card in cards) == total and abs(cards[0]["passages"] * 2 - total) <= 1
        assert cards[0]["corpus_fingerprint"] != cards[1]["corpus_fingerprint"]


def test_any_number_of_processes_can_ask_their_index(one, two, tmp_path, capsys, monkeypatch):
    """Two processes ask the shards of two, one asks both, and one asks the whole index of one process."""
    question = Prepared.open(one / "seed_0" / "data").questions("test")[0].question

    def words(root, name):
        return "search", question, "--run-dir", str(root / "seed_0"), "--k", "7", "--trec", str(tmp_path / name)

    with Job(tmp_path, 2, *words(two, "by two")) as job:
        job.succeeds()
    first, second = job.last_words()
    assert "\n7. " in first and "\n7. " not in second, "process 0 speaks for all"
    over(monkeypatch, 2)
    for root, name in ((two, "by one"), (one, "whole")):
        assert cli.main(words(root, name)) == 0
        out = capsys.readouterr().out
        assert "\n7. " in out and out in first
    by_two, by_one, whole = (ranked(tmp_path / name) for name in ("by two", "by one", "whole"))
    assert len(by_two) == 7
    for other in (by_one, whole):
        assert [line[:4] for line in other] == [line[:4] for line in by_two]
        assert [float(line[4]) for line in other] == pytest.approx(
            [float(line[4]) for line in by_two], rel=SAME_DEVICES
        )


def test_their_evaluation_and_report_are_those_of_one_process(one, two):
    ours, theirs = (json.loads((root / "report.json").read_text()) for root in (two, one))
    assert ours["missing"] == [] and ours["arms"].keys() == theirs["arms"].keys()
    assert ours["retriever"] == theirs["retriever"]
    for arm in ours["arms"]:
        a, b = (json.loads((root / f"seed_0/eval/test/{arm}/summary.json").read_text()) for root in (two, one))
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4) and a["accuracy"] == b["accuracy"]
    assert len(list((two / "seed_0/arms/jmlr/tensorboard").iterdir())) == 1


@pytest.fixture(scope="module")
def killed(two, tmp_path_factory):
    """A run of two processes: one got SIGTERM; started again, one was killed. Directory, and what was seen."""
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(two / "seed_0" / "data", root / "seed_0" / "data")
    _, words = configured(root)
    checkpoints, seen = root / "seed_0/arms/jmlr/checkpoints", {}

    def saved() -> set[int]:
        return {int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()}

    for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        known = max(saved(), default=0)
        with Job(root / name, 2, "train", *words, "--run-dir", str(root / "seed_0")) as job:
            job.until(lambda known=known: max(saved(), default=0) > known)
            job.processes[1].send_signal(number)
            statuses = job.statuses()
            seen[name] = statuses, job.last_words(), max(saved())
    return root, seen


def test_sigterm_to_one_stops_all_after_the_same_step(killed):
    statuses, said, last = killed[1]["stopped"]
    assert statuses == [2, 2], said
    for text in said:
        assert f"jmlr: SIGTERM: jmlr saved at step {last} of {STEPS}; the same command continues" in text


def test_a_killed_process_ends_the_job_with_a_clear_message(killed):
    statuses, said, _ = killed[1]["killed"]
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None), said
    for i, text in enumerate(said):
        assert f"jmlr: process {i} of 2 has ended before its work was done" in text
        assert "Start the same command in all processes again" in text


@pytest.mark.parametrize("count", [2, 4])
def test_started_again_it_continues(killed, two, tmp_path, count):
    """By as many processes to the very bytes of the uninterrupted run; by more of them, to the same losses."""
    shutil.copytree(killed[0] / "seed_0", tmp_path / "seed_0")
    _, words = configured(tmp_path)
    assert len(rows(tmp_path / "seed_0")) < len(rows(two / "seed_0"))
    # With four, pairs of processes hold the same questions and half of the generator each.
    mesh = () if count == 2 else ("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2")
    with Job(tmp_path, count, "run", *words, *mesh) as job:
        job.succeeds()
    name = "seed_0/arms/jmlr/metrics.jsonl"
    if count == 2:
        assert (tmp_path / name).read_bytes() == (two / name).read_bytes()
    assert_close(rows(tmp_path / "seed_0"), rows(two / "seed_0"), OTHER_DEVICES)
    assert json.loads((tmp_path / "report.json").read_text())["missing"] == []


def test_one_process_continues_what_two_have_saved(killed, two, tmp_path, monkeypatch):
    shutil.copytree(killed[0] / "seed_0", tmp_path / "seed_0")
    over(monkeypatch, 1)
    config, _ = configured(tmp_path)
    pipeline.train(Run.open(config.model_copy(update={"run_dir": str(tmp_path / "seed_0")})), "jmlr")
    assert_close(rows(tmp_path / "seed_0"), rows(two / "seed_0"), OTHER_DEVICES)
