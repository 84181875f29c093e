"""A trace is written when the signal comes, for a few steps, and only then."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from jmlr_jax.training.profiling import STEPS, tracer


@pytest.mark.exhaustive
def test_a_signal_traces_the_next_steps(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    started = []
    with tracer(tmp_path) as made:
        step = jax.jit(lambda x: x + 1)
        made.after_step(step(jnp.zeros(())))
        assert not (tmp_path / "profile").exists()
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(STEPS + 3):
            made.after_step(step(jnp.zeros(())))
            started.append(any(tmp_path.rglob("*.xplane.pb")))
    assert started == [False] * STEPS + [True] * 3
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_under_way_ends_with_the_training(tmp_path):
    with tracer(tmp_path) as made:
        made.ask()
        made.after_step(None)
    assert any(tmp_path.rglob("*.xplane.pb"))
