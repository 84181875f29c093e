"""Candidate tables of a run: made, mixed for training, refreshed beside it (docs/design.md, Candidates).

A refresh is computed from a copy of the retriever in a thread of its own and written to disk with the fingerprint of
the weights it came from. A run that was killed finds its file and reads the same table again, so resuming is exact
even where building an index is not deterministic.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmlr_jax.files import replacing
from jmlr_jax.parallel.distributed import check_same, from_first, is_first, on_first
from jmlr_jax.retrieval.candidates import mixed_table, overlap, random_table, recall
from jmlr_jax.retrieval.store import params_fingerprint
from jmlr_jax.run.artifact import Recipe
from jmlr_jax.run.index import merged, retrieve, retriever_index, search
from jmlr_jax.run.open import DataError, Run
from jmlr_jax.run.phases import PassageSource

SPARE_DEPTH = 4  # how many times its count each source of a mixture is asked for, to fill up what they have in common


def fixed_table(
    run: Run, source: PassageSource, split: str, k: int, retriever: Any = None, rows: np.ndarray | None = None
) -> np.ndarray:
    """A table that does not change while an arm trains or is evaluated: int32 [N, k], best first, -1 padding.

    Args:
      rows: the questions that will be read, each once: a retriever is asked for no others. None: all.
    """
    count, passages = len(run.prepared.questions(split)), len(run.prepared.passages)
    if source == "none":
        return np.full((count, k), -1, np.int32)
    if source == "random":
        return random_table(count, passages, k, seed=run.seed("random passages", split))
    if source == "bm25":
        return bm25_table(run, split, k)
    rows, table_NxK = np.arange(count) if rows is None else rows, np.full((count, k), -1, np.int32)
    if len(rows):
        table_NxK[rows] = retrieve(run, retriever_index(run, retriever), retriever, split, rows, k)
    return table_NxK


def kept_tables(file: Path, of: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables that a phase began with, by split: made once, so that a resumed phase reads the very same ones.

    Building an index is not deterministic replicated, and the same weights can give it other hits. Every process must
    call it.

    Args:
      of: digest of the phase's recipe.

    Raises:
      DataError: the file is damaged, or of another phase.
    """
    if from_first(file.exists):
        return _load(file, [of])
    tables = make()
    on_first(lambda: _save(file, tables, [of]))
    return tables


def _save(file: Path, tables: dict[str, np.ndarray], of: list[str]) -> None:
    with replacing(file) as out:
        np.savez(out, allow_pickle=False, of=np.array(of), **tables)


def _load(file: Path, of: list[str]) -> dict[str, np.ndarray]:
    """Tables of :func:`_save`; what the file holds is checked by its own sums, whose it is by `of`.

    Raises:
      DataError: there is no such file, or it is damaged, or of another phase, run or step.
    """
    try:
        with zipfile.ZipFile(file) as held:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in held.infolist()):
                raise ValueError("it is compressed, and could hold more than memory")
        with np.load(file, allow_pickle=False) as found:
            tables = dict(found)
            what = None if tables.pop("of").tolist() == of else "is of another phase, run or step"
    except Exception as error:  # zip, numpy and the disk have an error each
        what = "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    if what is not None:
        folder = file.parent.parent
        raise DataError(f"{file}: {what}; bring it back from a copy, or remove {folder} to train it again")
    return tables


def bm25_table(run: Run, split: str, k: int, with_answer: bool = False) -> np.ndarray:
    """BM25's k best passages for the question, or for question and right answer together (distant supervision)."""
    return bm25_search(run, split, k, with_answer)[0]


def bm25_search(run: Run, split: str, k: int, with_answer: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The same with its scores; see :meth:`jmlr_jax.retrieval.bm25.BM25.search`."""
    questions = run.prepared.questions(split)
    texts = [f"{q.question} {q.answer}" if with_answer else q.question for q in questions]
    return run.lexical.search(texts, k)


class Candidates:
    """The training candidates of a live retriever: the current table, and the next one while it is being made.

    Attributes:
      train_NxK: candidates of the training questions; rows that no step before the next refresh reads may be older.
      dev_nxK: candidates of ``run.dev_rows``, the dev questions that checkpoints are compared on.
      metrics: of the last adoption: ``index/staleness`` and, with gold ids, ``recall/candidates`` and ``recall/top1``.
    """

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder = run, folder
        begun = Recipe.read(folder.parent)
        self._of = begun.digest if begun else ""
        train = run.cfg.train
        self._lexical = {
            split: bm25_table(run, split, SPARE_DEPTH * train.mix.bm25) if train.mix.bm25 else None
            for split in ("train", "dev")
        }
        self._gold = run.gold("train")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._pending: tuple[int, Future[dict[str, np.ndarray]]] | None = None
        self.train_NxK = np.full((len(run.prepared.questions("train")), train.candidates), -1, np.int32)
        self.dev_nxK = np.full((len(run.dev_rows), train.candidates), -1, np.int32)
        self.metrics: dict[str, float] = {}
        self._beside: tuple[float, float | None] = 0.0, None  # seconds of finished refreshes; when one began
        self._waited = 0.0

    def seconds(self) -> dict[str, float]:
        """What refreshes have cost this process, in seconds, by the metric that their fraction of the time becomes:
        a thread of theirs was at work beside the steps, and no step could begin for one."""
        done, began = self._beside
        return {
            "speed/refresh_fraction": done + (time.monotonic() - began if began else 0.0),
            "speed/refresh_wait_fraction": self._waited,
        }

    def start(self, step: int, retriever: Any, rows: np.ndarray) -> None:
        """Begins the refresh of `step` for these training questions.

        `retriever` is of :func:`jmlr_jax.parallel.placement.local_arrays`, and the caller's to give away.
        """
        self._pending = step, self._pool.submit(self._search, step, retriever, np.unique(rows))

    def adopt(self) -> None:
        """Waits for the refresh under way and reads from its table from now on."""
        if self._pending is None:
            return
        made, self._pending = self._in_time(), None
        rows, fresh = made["rows"], made["train"]
        before = self.train_NxK[rows]
        seen = (before >= 0).any(1)
        self.metrics = {"index/staleness": 1 - overlap(before[seen], fresh[seen])} if seen.any() else {}
        gold = [self._gold[row] for row in rows]
        if any(gold):
            self.metrics["recall/candidates"] = recall(fresh, gold, (fresh.shape[1],))[fresh.shape[1]]
            self.metrics["recall/top1"] = recall(made["top"], gold, (1,))[1]
        self.train_NxK[rows], self.dev_nxK = fresh, made["dev"]

    def wait(self) -> None:
        """Lets the refresh under way finish, so that its file is on disk."""
        if self._pending is not None:
            self._in_time()

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds of this object; the step of the refresh under way is -1 if there is none."""
        pending = -1 if self._pending is None else self._pending[0]
        tables = {"train": self.train_NxK, "pending": np.array(pending, np.int32)}
        return tables | ({"dev": self.dev_nxK} if self.dev_nxK.size else {})  # Orbax saves no empty arrays

    def restore(self, state: dict[str, np.ndarray], metrics: dict[str, float]) -> None:
        """Continues from :meth:`state`; a refresh that was under way is read from its file."""
        self.train_NxK, self.dev_nxK = np.array(state["train"]), np.array(state.get("dev", self.dev_nxK))
        self.metrics = dict(metrics)
        step = int(state["pending"])
        if step >= 0:
            self._pending = step, self._pool.submit(lambda: self._own(step))

    def close(self) -> None:
        """Ends the thread; a refresh nobody waits for is given up."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _in_time(self) -> dict[str, np.ndarray]:
        start = time.monotonic()
        try:
            return self._made()
        finally:
            self._waited += time.monotonic() - start

    def _search(self, step: int, retriever: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What this process finds in its own index; or the whole result, where an earlier run has left it."""
        done, began = self._beside[0], time.monotonic()
        self._beside = done, began
        try:
            return self._found(step, retriever, rows)
        finally:
            self._beside = done + time.monotonic() - began, None

    def _found(self, step: int, retriever: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
        fingerprint = np.array(params_fingerprint(jax.device_get(retriever)))
        if is_first() and self._file(step).exists():  # one answer for all processes, see `_made`
            made = self._own(step)
            if made["fingerprint"] == fingerprint and np.array_equal(made["rows"], rows):
                return made
        run, depth = self.run, SPARE_DEPTH * self.run.cfg.train.mix.index
        index = retriever_index(run, retriever)
        found = {"rows": rows, "fingerprint": fingerprint}
        found["found"], found["score"] = search(run, index, retriever, "train", rows, depth)
        if len(run.dev_rows):
            found["dev_found"], found["dev_score"] = search(run, index, retriever, "dev", run.dev_rows, depth)
        return found

    def _made(self) -> dict[str, np.ndarray]:
        """The refresh under way, finished, and its file on disk; the main thread of each process calls it."""
        assert self._pending is not None
        step, future = self._pending
        made = future.result()
        if not from_first(lambda: "train" in made):
            made = self._mix(step, made)
            on_first(lambda: _save(self._file(step), made, [self._of, str(step)]))
        elif "train" not in made:  # process 0 has found the file
            made = self._own(step)
        finished: Future[dict[str, np.ndarray]] = Future()
        finished.set_result(made)
        self._pending = step, finished
        return made

    def _mix(self, step: int, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tables of a refresh from what all processes found."""
        top, dev = merged(found["found"], found["score"]), self.dev_nxK
        if len(self.run.dev_rows):
            dev = merged(found["dev_found"], found["dev_score"])
            dev = self._mixed("dev", dev, self.run.dev_rows, step)
        train = self._mixed("train", top, found["rows"], step)
        digest = hashlib.sha256(train.tobytes() + dev.tobytes()).hexdigest()
        check_same(f"the candidate table of step {step}", digest, "a fault; please report it with both outputs")
        made = {"rows": found["rows"], "train": train, "dev": dev, "top": top[:, :1]}
        return made | {"fingerprint": found["fingerprint"]}

    def _mixed(self, split: str, retrieved: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
        """Candidates from all three sources, the K of the method; see ``MixConfig``."""
        train = self.run.cfg.train
        parts = {"index": (retrieved, train.mix.index)}
        lexical = self._lexical[split]
        if lexical is not None:
            parts["bm25"] = lexical[rows], train.mix.bm25
        if train.mix.random:
            seed = self.run.seed("candidates", split, "random", step)
            passages = len(self.run.prepared.passages)
            parts["random"] = random_table(len(rows), passages, 2 * train.candidates, seed), train.mix.random
        return mixed_table(parts, train.candidates, self.run.seed("candidates", split, "order", step))

    def _own(self, step: int) -> dict[str, np.ndarray]:
        """The file of a refresh of this phase; raises DataError if it is another's, or damaged."""
        return _load(self._file(step), [self._of, str(step)])

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.npz"
