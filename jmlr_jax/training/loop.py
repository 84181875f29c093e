"""The training loop: one phase of an arm from its start, or its last checkpoint, to its final weights."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jmlr_jax.data.batches import Batch, assemble, question_stream
from jmlr_jax.errors import JmlrError
from jmlr_jax.method.step import live_retriever
from jmlr_jax.parallel.distributed import Stop, from_first, on_first
from jmlr_jax.parallel.placement import addressable_rows, local_arrays, place_batch, replicate
from jmlr_jax.run.artifact import Recipe, making
from jmlr_jax.run.candidates import Candidates, fixed_table, kept_tables
from jmlr_jax.run.checks import checksums, file_sum
from jmlr_jax.run.open import DataError, Run, Weights
from jmlr_jax.run.phases import Phase
from jmlr_jax.run.weights import (
    METRICS,
    begin,
    is_trained,
    phase_folder,
    phase_steps,
    phase_weights,
    save_weights,
    seal_weights,
)
from jmlr_jax.training.checkpoint import DEV_LOSS, Checkpoints
from jmlr_jax.training.cost import costed
from jmlr_jax.training.metrics_log import MetricsLog, lines_until
from jmlr_jax.training.optimizer import trainable_counts
from jmlr_jax.training.probe import HIT, JudgeProbe, on_dev
from jmlr_jax.training.profiling import tracer
from jmlr_jax.training.program import divide, phase_program
from jmlr_jax.training.warmup import ReadingLessons


class TrainingStopped(JmlrError):
    """Training ended before its last step; the message says why and how to go on."""


@dataclass
class Loop:
    """A compiled phase: what :func:`train_phase` drives.

    Attributes:
      step: compiled ``(state, frozen, batch) -> (state, metrics)``; dev: compiled mean answer loss of dev questions.
      batch: ``(step, question rows, held)`` to those rows of the training batch that this process holds.
      candidates: of a live retriever; None where the table is fixed.
      tables: by split, where they are fixed; the passages that they hold are part of what a checkpoint continues.
      dev_table: passages of the dev questions where the table is fixed.
      probe: of the judge, where the retriever learns; judged: its hit rate at the start of the phase.
      of: digest of the phase's recipe.
    """

    state: dict[str, Any]
    frozen: Weights
    step: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    dev: Callable[..., Any]
    batch: Callable[[int, np.ndarray, np.ndarray], Batch]
    candidates: Candidates | None
    tables: dict[str, np.ndarray]
    dev_table: np.ndarray
    of: str
    probe: JudgeProbe | None
    judged: float | None = None


def train_phase(run: Run, phase: Phase, console: Console) -> Path:
    """Trains a phase to its end and returns the directory of its final weights; a finished phase is left alone.

    Raises:
      ArtifactError: it was begun with other values or on other data; or another process is training it.
      TrainingStopped: SIGTERM came (a checkpoint was saved), or too many updates in a row were not finite.
    """
    folder = phase_folder(run, phase.name)
    with ExitStack() as held:
        on_first(lambda: held.enter_context(making(folder)))
        begin(run, phase)
        if not is_trained(run, phase.name):
            with jax.set_mesh(run.mesh), run.timed("train"), costed(run, phase):
                _train(run, phase, folder, console)
    return folder / "weights"


def _train(run: Run, phase: Phase, folder: Path, console: Console) -> None:
    cfg, steps = run.cfg.train, phase_steps(run.cfg.train, phase)
    stream, held = _stream(run), addressable_rows(run.mesh, cfg.batch_size)
    loop = build(run, phase, folder, console)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.keep_last, loop.of)
    done, metrics_sum = _resume(loop, checkpoints, stream)
    on_first(lambda: _check_metrics(folder, done, metrics_sum))
    if done == 0 and loop.candidates is not None:
        _refresh(run, loop, stream, 0)
        loop.candidates.adopt()
    refresh = cfg.refresh_steps if phase.passages == "live" else 0
    with _closing(loop, checkpoints), _sigterm() as sigterm, tracer(folder) as trace:
        stop = Stop()
        clock = loop.candidates.seconds if refresh and loop.candidates else dict
        with MetricsLog(folder, phase.name, steps, cfg.log_steps, cfg.batch_size, done, clock) as log:
            if done == 0:
                probe_judge(loop, log, 0, console)
            for step in range(done, steps):
                if refresh and loop.candidates and step and step % refresh == 0:
                    _refresh(run, loop, stream, step)
                if refresh and loop.candidates and step > refresh and step % refresh == cfg.refresh_delay:
                    loop.candidates.adopt()
                placed = place(run, loop.batch(step, next(stream), held), held)
                loop.state, metrics = loop.step(loop.state, loop.frozen, placed)
                trace.after_step(metrics)
                extra = dict(loop.candidates.metrics) if refresh and loop.candidates else {}
                _check_finite(log.push(step + 1, metrics, extra), cfg.max_skipped_in_row)
                last, stopped = step + 1 == steps, stop.after(step, sigterm.is_set())
                planned = last or (step + 1) % cfg.checkpoint_steps == 0
                probed = loop.probe is not None and (step + 1) % cfg.probe_steps == 0
                if planned or stopped or probed:
                    _check_finite(log.flush(), cfg.max_skipped_in_row)
                if probed:
                    probe_judge(loop, log, step + 1, console)
                if planned or stopped:
                    checkpoint(run, loop, checkpoints, stream, step + 1, log, planned)
                if stopped and not last:
                    raise TrainingStopped(
                        f"SIGTERM: {phase.name} saved at step {step + 1} of {steps}; the same command continues"
                    )
    finish(run, loop, checkpoints, folder)


def _check_metrics(folder: Path, done: int, known: str | None) -> None:
    """Raises DataError if the lines up to the checkpoint that is continued are not those of its time."""
    if known is not None and hashlib.sha256(lines_until(folder / METRICS, done).encode()).hexdigest() != known:
        raise DataError(
            f"{folder / METRICS}: changed since it was written; remove {folder} to train the phase again, or give it "
            "the file of a copy"
        )


@contextmanager
def _closing(loop: Loop, checkpoints: Checkpoints) -> Iterator[None]:
    """Ends the refresh thread and lets checkpoints be written out: what was saved before an error is worth keeping."""
    try:
        yield
    except BaseException as error:
        # Of several processes another may be gone, and waiting for it would hide this error.
        if jax.process_count() == 1 or isinstance(error, JmlrError):
            checkpoints.close()
        raise
    else:
        checkpoints.close()
    finally:
        if loop.candidates is not None:
            loop.candidates.close()


def build(run: Run, phase: Phase, folder: Path, console: Console) -> Loop:
    """Weights, tables and compiled functions of a phase."""
    prepared, steps = run.prepared, phase_steps(run.cfg.train, phase)
    program = phase_program(run.cfg, phase, run.retriever, run.llama, prepared.generator_ids, steps, run.mesh)
    params, frozen = divide(program.spec, phase_weights(run, phase), run.retriever_adapters)
    console.print(f"{phase.name}: training " + ", ".join(f"{k} {v:,}" for k, v in trainable_counts(params).items()))
    passages, made = program.spec.passages, Recipe.read(folder)
    of = made.digest if made else ""
    candidates, tables = None, {}
    if phase.passages == "live":
        candidates = Candidates(run, folder / "tables")
    elif phase.passages == "mixed":
        tables = {"dev": fixed_table(run, "bm25", "dev", passages)}
    else:

        def found() -> dict[str, np.ndarray]:
            own = local_arrays(frozen["retriever"], run.mesh) if phase.passages == "retriever" else None
            read = {"train": np.unique(_rows_ahead(run, _stream(run), steps)), "dev": run.dev_rows}
            return {s: fixed_table(run, phase.passages, s, max(passages, 1), own, rows) for s, rows in read.items()}

        tables = kept_tables(folder / "tables" / "fixed.npz", of, found)

    def batch(step: int, rows: np.ndarray, held: np.ndarray) -> Batch:
        table = candidates.train_NxK if candidates else tables["train"]
        return assemble(prepared, "train", rows[held], table[rows[held]])

    return Loop(
        state=program.start(params, key=jax.random.PRNGKey(run.seed("steps"))),
        frozen=frozen | {"skip_V": replicate(run.mesh, _skipped(run))},
        step=program.step,
        dev=program.dev,
        batch=ReadingLessons(run).batch if phase.passages == "mixed" else batch,
        candidates=candidates,
        tables=tables,
        of=of,
        dev_table=np.zeros((0, 1), np.int32) if candidates else tables["dev"][run.dev_rows],
        probe=JudgeProbe(run, program) if phase.rank else None,
    )


def _skipped(run: Run) -> np.ndarray:
    """``skip_V`` of every row of the retriever's vocabulary: rows that only fill it up are of no token."""
    skip_V = run.prepared.skip_V
    return np.pad(skip_V, (0, run.retriever.bert.vocab_size - len(skip_V)))


def _stream(run: Run) -> Any:
    return question_stream(len(run.prepared.questions("train")), run.cfg.train.batch_size, run.seed("questions"))


def _rows_ahead(run: Run, stream: Any, steps: int) -> np.ndarray:
    """The training questions of the stream's next steps; all, in order, where those are as many."""
    count = len(run.prepared.questions("train"))
    if steps * run.cfg.train.batch_size >= count:
        return np.arange(count)
    return np.concatenate([next(stream) for _ in range(steps)])


def _refresh(run: Run, loop: Loop, stream: Any, step: int) -> None:
    """Begins a refresh for the questions that will be read with its table."""
    assert loop.candidates is not None
    cfg = run.cfg.train
    ahead = _stream(run)
    ahead.set_state(stream.get_state())
    length = cfg.refresh_steps + cfg.refresh_delay if cfg.refresh_steps else cfg.steps
    if "retriever" in loop.state["params"]:
        rows = _rows_ahead(run, ahead, length)
    else:
        rows = np.arange(len(loop.candidates.train_NxK))
    # A copy: the step donates its state, and the refresh outlives it.
    copy = jax.tree.map(jax.numpy.copy, live_retriever(run.retriever, loop.frozen | loop.state["params"]))
    loop.candidates.start(step, local_arrays(copy, run.mesh), rows)


def place(run: Run, batch: Batch, held: np.ndarray) -> dict[str, jax.Array]:
    """The batch on the mesh; each process brings its own questions."""
    return place_batch(run.mesh, batch, held, run.cfg.train.batch_size)


def checkpoint(
    run: Run, loop: Loop, checkpoints: Checkpoints, stream: Any, step: int, log: MetricsLog, planned: bool
) -> None:
    """Saves everything, after any refresh under way has been written: resuming never needs weights that are gone."""
    notes: dict[str, Any] = {"data": stream.get_state(), "table_metrics": {}, "fixed": checksums(loop.tables)}
    if loop.candidates is not None:
        loop.candidates.wait()
        notes["table_metrics"] = loop.candidates.metrics
    if loop.judged is not None:
        notes["judged"] = loop.judged
    # Not where SIGTERM stops the loop: an interrupted run writes what an uninterrupted one does.
    loss = dev_loss(run, loop) if planned else None
    if loss is not None:
        notes[DEV_LOSS] = loss
        log.note(step, {DEV_LOSS: loss})
    notes["metrics"] = from_first(lambda: file_sum(log.folder / METRICS))
    checkpoints.save(step, loop.state, _tables(loop), notes)


def probe_judge(loop: Loop, log: MetricsLog, step: int, console: Console) -> None:
    """Tries the judge as it is after `step` steps, and warns once it is worse than it was."""
    if loop.probe is None:
        return
    slow = {"judge": loop.state["judge"]} if "judge" in loop.state else {}
    if not (found := loop.probe.measure(loop.state["params"], loop.frozen | slow)):
        return
    log.note(step, found)
    if loop.judged is None:
        loop.judged = found[HIT]
    elif fallen := loop.probe.fallen(loop.judged, found[HIT]):
        console.print(f"step {step}: {fallen}")
        loop.judged = 0.0  # said once


def _tables(loop: Loop) -> dict[str, np.ndarray]:
    """What a checkpoint holds of the candidates; Orbax wants an entry even where the table is fixed."""
    return {"none": np.zeros(1, np.int32)} if loop.candidates is None else loop.candidates.state()


def _resume(loop: Loop, checkpoints: Checkpoints, stream: Any) -> tuple[int, str | None]:
    """Continues from the latest checkpoint, if there is one; the number of steps done, and the sum of their metrics."""
    step = checkpoints.latest()
    if step is None:
        return 0, None
    loop.state, tables, notes = checkpoints.restore(step, loop.state, _tables(loop))
    stream.set_state(notes["data"])
    loop.judged = notes.get("judged")
    if loop.candidates is not None:
        loop.candidates.restore(tables, notes["table_metrics"])
        loop.candidates.wait()  # a damaged file of the refresh under way is told before anything is changed
    if notes["fixed"] != checksums(loop.tables):
        folder = checkpoints.folder.parent
        raise DataError(
            f"{folder / 'tables'}: not the tables that the phase began with; remove {folder} to train it again"
        )
    return step, str(notes["metrics"])


def dev_loss(run: Run, loop: Loop) -> float | None:
    """Mean answer loss of ``run.dev_rows``, in batches of one compiled shape."""
    table = loop.dev_table if loop.candidates is None else loop.candidates.dev_nxK
    if not len(table):
        return None
    losses = on_dev(run, partial(loop.dev, loop.state["params"], loop.frozen), run.dev_rows, table)
    return float(np.mean(losses))


def _check_finite(row: dict[str, float], most: int) -> None:
    skipped = int(row.get("skipped_in_row", 0))
    if skipped >= most:
        raise TrainingStopped(
            f"{skipped} updates in a row had gradients that are not finite (train.max_skipped_in_row={most}); "
            "lower the learning rate of train.generator or train.retriever, or look at the data"
        )


def finish(run: Run, loop: Loop, checkpoints: Checkpoints, folder: Path) -> None:
    """Writes the weights that later phases, evaluation and export use."""
    if run.cfg.eval.checkpoint == "best":
        reopened = Checkpoints(folder / "checkpoints", run.cfg.train.keep_last, loop.of)
        step = reopened.best()
        assert step is not None  # the last step has just been saved
        loop.state, _, _ = reopened.restore(step, loop.state, _tables(loop))
        reopened.close()
    part, halves = folder / ".weights.part", dict(loop.state["params"])
    if "retriever" in halves:
        # It is made whole: whatever retrieves with it later needs plain weights, and it is small.
        halves["retriever"] = live_retriever(run.retriever, loop.frozen | loop.state["params"])
    for name, tree in halves.items():
        save_weights(part / name, tree)
    seal_weights(folder, loop.of, halves)
    on_first(lambda: part.rename(folder / "weights"))


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as a TPU VM sends it before it is taken away; outside, SIGTERM ends the program."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
