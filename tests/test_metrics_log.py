"""The metrics files of a phase: when a step is read, which lines there are, what a resumed run cuts."""

import json

import jax.numpy as jnp
import pytest

from jmlr_jax.training import metrics_log
from jmlr_jax.training.metrics_log import MetricsLog


def open_log(folder, every=1, steps=6, step=0) -> MetricsLog:
    return MetricsLog(folder, "jmlr", steps, every, 4, step)


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Device:
    """A scalar that notes when it is read."""

    def __init__(self, value: float, read: list[float]) -> None:
        self.value, self.read = value, read

    def __float__(self) -> float:
        self.read.append(self.value)
        return self.value


def test_a_step_is_read_only_when_the_next_one_has_been_sent_off(tmp_path):
    read: list[float] = []
    with open_log(tmp_path) as log:
        assert log.push(1, {"loss": Device(1.0, read)}, {"recall": 0.5}) == {} and read == []
        assert log.push(2, {"loss": Device(2.0, read)}, {}) == {"loss": 1.0, "recall": 0.5} and read == [1.0]
        assert rows(tmp_path) == [{"step": 1, "loss": 1.0, "recall": 0.5}]
        assert log.flush() == {"loss": 2.0} and read == [1.0, 2.0] and log.flush() == {}
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_every_so_many_steps_and_the_last(tmp_path):
    with open_log(tmp_path, every=4) as log:
        for step in range(1, 7):
            log.push(step, {"loss": jnp.float32(step)}, {})
        log.flush()
        log.note(6, {"dev/loss": 0.25})
    assert rows(tmp_path) == [{"step": 4, "loss": 4.0}, {"step": 6, "loss": 6.0}, {"step": 6, "dev/loss": 0.25}]


def test_clocks_stay_out_of_the_metrics(tmp_path):
    with open_log(tmp_path, every=2) as log:
        for step in range(1, 5):
            log.push(step, {"loss": 1.0, "prompt/tokens": 10.0}, {})
        log.flush()
    assert all(set(row) == {"step", "loss", "prompt/tokens"} for row in rows(tmp_path))
    speeds = rows(tmp_path, "speed.jsonl")
    assert [row["step"] for row in speeds] == [2, 4]
    # 2 steps of 4 questions and 10 tokens each: the two speeds are of the same seconds.
    for row in speeds:
        assert row["speed/tokens_per_s"] / row["speed/questions_per_s"] == pytest.approx(20 / 8)


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path):
    lines = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 2, "dev/loss": 0.5}, {"step": 3, "loss": 0.3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("metrics.jsonl", "speed.jsonl"):
        (tmp_path / name).write_text(text + '{"step": 4, "lo')
    with open_log(tmp_path, step=2) as log:
        assert rows(tmp_path) == rows(tmp_path, "speed.jsonl") == lines[:3]
        log.push(3, {"loss": 0.3}, {})
        log.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_new_start_leaves_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    with open_log(tmp_path):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_half_written_line_goes_even_if_its_step_would_stay(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss')
    with open_log(tmp_path, step=5):
        assert rows(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_other_clocks_are_written_as_shares_of_the_time(tmp_path, monkeypatch):
    now, spent = [100.0], {"a": 7.0, "b": 0.0}
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    with MetricsLog(tmp_path, "jmlr", 4, 2, 4, 0, lambda: dict(spent)) as log:
        log.push(1, {}, {})
        for step, (second, refresh, wait) in enumerate(((110, 9, 1), (120, 9, 6), (130, 9, 6)), 2):
            now[0], spent["a"], spent["b"] = second, refresh, wait
            log.push(step, {}, {}) if step < 5 else None
        log.flush()
    shares = [(row["a"], row["b"]) for row in rows(tmp_path, "speed.jsonl")]
    assert shares == [pytest.approx((2 / 20, 6 / 20)), pytest.approx((0, 0))]
