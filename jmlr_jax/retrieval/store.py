"""Building an index, and the directory it is kept in.

``DIR/card.json`` names one data directory beside it and lists its files with sizes and sha256. Writing goes to a
fresh data directory, then the card is replaced in one move: at any moment ``DIR`` holds one whole index.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from jmlr_jax.config import IndexConfig
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import write_text
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.scann import ScannIndex
from jmlr_jax.retrieval.vectors import TokenVectors

Kind = Literal["exact", "scann"]


class IndexUnusable(JmlrError):
    """An index directory that cannot be used; the message names the file and the remedy."""


class FileEntry(BaseModel):
    """One file of an index, as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


class Card(BaseModel):
    """What an index holds, of which model and corpus, and how good it is.

    ``recall`` maps K (as text) to the mean share of the exact oracle's K best passages that the index returns,
    over ``oracle_queries`` questions; empty for an exact index, which is its own oracle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    kind: Kind
    model_fingerprint: str
    corpus_fingerprint: str
    passages: int
    passage_tokens: int
    dim: int
    rerank: int
    build_seconds: float
    oracle_queries: int
    recall: dict[str, float]
    data_dir: str = ""
    total_bytes: int = 0
    files: dict[str, FileEntry] = {}


class Index:
    """A searchable index and its card. ``search`` is that of :class:`jmlr_jax.retrieval.vectors.Searcher`."""

    def __init__(self, searcher: ExactIndex | ScannIndex, card: Card):
        self._searcher, self.card = searcher, card

    @property
    def vectors(self) -> TokenVectors:
        """Token vectors of the corpus, for exact scores."""
        return self._searcher.vectors

    def search(self, q_NxQxC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`."""
        return self._searcher.search(q_NxQxC, k)

    def save(self, directory: Path | str) -> None:
        """Writes the index; whatever ``directory`` held before stays whole until the last moment, and is then removed.

        Raises:
          OSError: the disk; the previous index is left as it was.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        data = Path(tempfile.mkdtemp(prefix="data-", dir=directory))
        try:
            np.save(data / "vectors.npy", self.vectors.vectors_NxPxC, allow_pickle=False)
            np.save(data / "keep.npy", self.vectors.keep_NxP, allow_pickle=False)
            if isinstance(self._searcher, ScannIndex):
                self._searcher.save(data)
            files = {name: _entry(data / name) for name in _files_under(data)}
            update = {
                "data_dir": data.name,
                "files": files,
                "total_bytes": sum(entry.bytes for entry in files.values()),
            }
            card = self.card.model_copy(update=update)
            write_text(directory / "card.json", card.model_dump_json(indent=2) + "\n")
        except BaseException:
            shutil.rmtree(data, ignore_errors=True)
            raise
        self.card = card
        for old in directory.glob("data-*"):
            if old != data:
                shutil.rmtree(old, ignore_errors=True)


def build_index(
    vectors: TokenVectors,
    cfg: IndexConfig,
    *,
    model_fingerprint: str,
    corpus_fingerprint: str,
    sample_q_NxQxC: np.ndarray,
    recall_at: tuple[int, ...],
    seed: int = 0,
) -> Index:
    """Builds the index that ``cfg.kind`` names ("auto": exact below ``cfg.exact_below`` passages) and measures it.

    Args:
      vectors: encoded corpus.
      cfg: kind, encoding and re-ranking settings.
      model_fingerprint: of the retriever that made the vectors, see :func:`params_fingerprint`.
      corpus_fingerprint: of the tokenised corpus.
      sample_q_NxQxC: questions for recall against the exact oracle; at most ``cfg.oracle_queries`` are used.
      recall_at: the K at which recall is measured, such as ``train.candidates``.
      seed: of the encodings' random draws.
    """
    start = time.perf_counter()
    kind = cfg.kind if cfg.kind != "auto" else ("exact" if len(vectors) < cfg.exact_below else "scann")
    searcher = ExactIndex(vectors) if kind == "exact" else ScannIndex.build(vectors, cfg, seed)
    seconds = time.perf_counter() - start
    recall: dict[str, float] = {}
    questions = 0
    if isinstance(searcher, ScannIndex):
        sample = sample_q_NxQxC[: cfg.oracle_queries]
        questions = len(sample)
        recall = {str(k): r for k, r in recall_against_oracle(searcher, sample, recall_at).items()}
    _, passage_tokens, dim = vectors.vectors_NxPxC.shape
    card = Card(
        kind=searcher.kind,
        model_fingerprint=model_fingerprint,
        corpus_fingerprint=corpus_fingerprint,
        passages=len(vectors),
        passage_tokens=passage_tokens,
        dim=dim,
        rerank=cfg.rerank,
        build_seconds=round(seconds, 3),
        oracle_queries=questions,
        recall=recall,
    )
    return Index(searcher, card)


def recall_against_oracle(searcher: ScannIndex, q_NxQxC: np.ndarray, ks: tuple[int, ...]) -> dict[int, float]:
    """Mean share of the exact k best passages that the index's k best contain, for each k; empty without questions."""
    if not len(q_NxQxC) or not ks:
        return {}
    deepest = min(max(ks), len(searcher.vectors))
    want, _ = ExactIndex(searcher.vectors).search(q_NxQxC, deepest)
    got, _ = searcher.search(q_NxQxC, deepest)
    return {k: float(np.mean([np.isin(w[:k], g[:k]).mean() for w, g in zip(want, got, strict=True)])) for k in ks}


def open_index(directory: Path | str, model_fingerprint: str, corpus_fingerprint: str) -> Index:
    """Opens a saved index for the given retriever and corpus; token vectors are memory-mapped.

    Raises:
      IndexUnusable: there is no index, it belongs to another model or corpus, or a file is missing, changed or unknown.
    """
    directory = Path(directory)
    path = directory / "card.json"
    try:
        card = Card.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IndexUnusable(f"{directory}: no index here (card.json is missing); build one with `jmlr index`") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise IndexUnusable(f"{path}: not a readable index card ({error}); build the index again") from None
    for what, have, want in (
        ("retriever", card.model_fingerprint, model_fingerprint),
        ("corpus", card.corpus_fingerprint, corpus_fingerprint),
    ):
        if have != want:
            raise IndexUnusable(
                f"{path}: built with another {what} ({have[:12]}, now {want[:12]}); build the index again"
            )
    data = directory / card.data_dir
    _verify(data, card)
    try:
        vectors = TokenVectors(
            np.load(data / "vectors.npy", mmap_mode="r", allow_pickle=False),
            np.load(data / "keep.npy", mmap_mode="r", allow_pickle=False),
        )
    except ValueError as error:
        raise IndexUnusable(f"{data}: {error}; build the index again") from None
    if vectors.vectors_NxPxC.shape != (card.passages, card.passage_tokens, card.dim):
        raise IndexUnusable(
            f"{data / 'vectors.npy'}: shape {list(vectors.vectors_NxPxC.shape)}, the card says "
            f"{[card.passages, card.passage_tokens, card.dim]}; build the index again"
        )
    searcher = ExactIndex(vectors) if card.kind == "exact" else ScannIndex.load(data, vectors, card.rerank)
    return Index(searcher, card)


def _verify(data: Path, card: Card) -> None:
    """Raises IndexUnusable unless the data directory holds exactly the files of the card, byte for byte."""
    if Path(card.data_dir).name != card.data_dir or not card.data_dir.startswith("data-"):
        raise IndexUnusable(f"{data}: the card names a directory outside the index; build the index again")
    present = set(_files_under(data))
    if missing := sorted(card.files.keys() - present):
        raise IndexUnusable(f"{data / missing[0]}: missing; build the index again")
    # ScaNN would unpickle a file it was never given: nothing unknown is let in.
    if unknown := sorted(present - card.files.keys()):
        raise IndexUnusable(f"{data / unknown[0]}: not part of this index; remove it or build the index again")
    for name, want in card.files.items():
        size = (data / name).stat().st_size
        if size != want.bytes:
            raise IndexUnusable(f"{data / name}: {size} bytes, {want.bytes} were written; build the index again")
        if _entry(data / name) != want:
            raise IndexUnusable(f"{data / name}: contents changed since it was written; build the index again")


def _files_under(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def params_fingerprint(tree: object) -> str:
    """sha256 (hex) over paths, shapes, dtypes and bytes of every leaf of a tree of arrays.

    >>> one = params_fingerprint({"a": np.zeros(2, np.float32)})
    >>> one == params_fingerprint({"a": np.zeros(2, np.float32)})
    True
    >>> one == params_fingerprint({"a": np.zeros((1, 2), np.float32)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {np.shape(leaf)} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
