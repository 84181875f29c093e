"""Asking a run's index: `jmlr search`. One question or a file, filters, fusion with BM25, highlighted matches."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from jmlr_jax.answering.asked import Source
from jmlr_jax.answering.retrieval import SearchError, run_searcher
from jmlr_jax.config import Config
from jmlr_jax.data.fields import check_text
from jmlr_jax.data.rows import read_lines
from jmlr_jax.data.schema import FieldError
from jmlr_jax.files import any_path
from jmlr_jax.parallel.distributed import check_same, console, from_first, on_first
from jmlr_jax.retrieval.fusion import write_trec
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import INITIAL


def read_questions(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Ids and texts of a file of questions: a line for each, ``id<TAB>text``.

    Raises:
      SearchError: no file, no question, or an id that an earlier line has.
      RecordError: a line of another form, or that is not UTF-8 text.
    """
    file = os.fspath(path)
    if not any_path(file).is_file():
        raise SearchError(f"{file}: no such file")
    texts: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for number, line in read_lines(file):
        try:
            check_text(line)
        except FieldError as error:
            raise error.at(file, number) from None
        name, _, text = (part.strip() for part in line.partition("\t"))
        if not name or not text:
            raise SearchError(f"{file}:{number}: expected an id, a tab and a question, got {line.strip()[:80]!r}")
        if name in texts:
            raise SearchError(f"{file}:{number}: the id {name} stands in line {line_of[name]} already")
        texts[name], line_of[name] = text, number
    if not texts:
        raise SearchError(f"{file}: no questions; write a line `id<TAB>question` for each")
    return list(texts), list(texts.values())


def shown(found: Sequence[Source]) -> Text:
    """Passages as the terminal shows them: rank, score, id, source, and the text with its best matches marked."""
    whole = Text()
    for one in found:
        whole.append(f"{one.rank}. {one.score:.3f}  ", style="bold")
        whole.append(f"{one.id}  {one.source}  {one.url}".rstrip() + "\n", style="dim")
        whole.append_text(marked(one))
        whole.append("\n\n")
    return whole


def marked(one: Source) -> Text:
    """A passage's text with its best matches marked."""
    text = Text(one.text)
    for span in one.spans:
        text.stylize("bold reverse", span.start, span.end)
    return text


def run_search(
    cfg: Config,
    asked: str,
    *,
    name: str = INITIAL,
    k: int = 5,
    sources: Sequence[str] = (),
    hybrid: bool = False,
    trec: str | None = None,
) -> None:
    """`jmlr search`: one question, whose passages are printed, or ``@FILE`` with many, for a TREC run file.

    Args:
      cfg: of the run directory.
      asked: the question, or ``@`` and a file for :func:`read_questions`.
      name: whose retriever and index, ``initial`` or a phase.
      k, sources, hybrid: see :meth:`jmlr_jax.answering.retrieval.Searcher.search`.
      trec: file to write the ranking to.

    Raises:
      SearchError: as the search; also a file of questions without ``trec``, and ids that a run file cannot
        hold.
      DistributedError: the processes were asked different things.
      IndexUnusable: there is no index to ask.
    """
    if asked.startswith("@") and trec is None:
        raise SearchError(f"{asked}: a file of questions gives a run file; say where with --trec FILE")
    check_same("what is asked", [asked, name, k, list(sources), hybrid], "start the same command in every process")
    ids, texts = from_first(lambda: read_questions(asked[1:])) if asked.startswith("@") else (["1"], [asked])
    run = Run.open(cfg)
    searcher = run_searcher(run, name)
    rows, scores = searcher.search(texts, k, sources, hybrid)

    def tell() -> None:
        if trec is not None:
            _write_run(run, trec, ids, rows, scores, "hybrid" if hybrid else "maxsim")
        if not asked.startswith("@"):
            console(out=True).print(shown(searcher.found(texts[0], rows[0], scores[0])))

    on_first(tell)


def _write_run(run: Run, trec: str, ids: list[str], rows_NxK: np.ndarray, score_NxK: np.ndarray, tag: str) -> None:
    """The TREC run file; of the passages only those that were found are read."""
    passage_ids = {row: run.prepared.passages[row].id for row in np.unique(rows_NxK[rows_NxK >= 0]).tolist()}
    try:
        write_trec(trec, ids, passage_ids, rows_NxK, score_NxK, tag)
    except ValueError as error:
        raise SearchError(f"--trec {trec}: {error}") from None
    console().print(f"{trec}: {len(ids)} questions, {int((rows_NxK >= 0).sum())} passages")
