"""The directory an index is kept in.

``DIR/card.json`` names ``data-*`` folders beside it and lists their files with sizes and sha256. Writing goes to fresh
folders, then the card is replaced in one move: at any moment ``DIR`` holds one whole index. Folders that the card does
not name (of a killed writer, or of an index that was replaced) are never read and go with the next save.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from jmlr_jax.errors import JmlrError
from jmlr_jax.files import local_path, write_text
from jmlr_jax.retrieval.code import TokenCode
from jmlr_jax.retrieval.encoding import Encoding
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.fde import FDE
from jmlr_jax.retrieval.scann import Part, ScannIndex
from jmlr_jax.retrieval.tune import Curve, picture
from jmlr_jax.retrieval.vectors import TokenVectors

Kind = Literal["exact", "scann"]
DIGEST_BYTES = 16


class IndexUnusable(JmlrError):
    """An index directory that cannot be used; the message names the file and the remedy."""


class FileEntry(BaseModel):
    """One file of an index, as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


class Folder(BaseModel):
    """One ``data-*`` folder and everything in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    files: dict[str, FileEntry]


class Card(BaseModel):
    """What an index holds, of which model and corpus, and how good it is.

    ``ann_recall`` maps K (as text) to the mean fraction of the exact oracle's K best passages that the index returned
    when it was built, over ``oracle_queries`` questions; empty for an exact index, its own oracle. ``build_seconds``
    has the encoding of the passages in it, but neither oracle nor tuning. ``entries`` counts what is stored: more than
    ``passages`` once updates have left some behind. ``sha256`` is of the rest of the card as it was written: a flipped
    bit in the number of hits would give worse answers in silence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[4] = 4
    kind: Kind
    model_fingerprint: str
    corpus_fingerprint: str
    passages: int
    entries: int
    dim: int
    bits: float
    hits: int
    leaves: int | None
    spare: int
    build_seconds: float
    oracle_queries: int
    ann_recall: dict[str, float]
    ann_recall_target: float | None
    updates: int = 0
    total_bytes: int = 0
    parts: list[Folder] = []
    state: Folder = Folder(name="", files={})
    sha256: str = ""

    def sealed(self) -> Card:
        """The card with the checksum of everything else on it."""
        text = self.model_copy(update={"sha256": ""}).model_dump_json()
        return self.model_copy(update={"sha256": hashlib.sha256(text.encode()).hexdigest()})


class Index:
    """A searchable index and its card. ``search`` is that of :class:`jmlr_jax.retrieval.vectors.Searcher`.

    Attributes:
      searcher: what does the work.
      card: see :class:`Card`.
      digests_Ex16: uint8, of every stored passage (see :func:`passage_digests`); None where none were given.
      curve: what the search was tuned on; None for an exact index and for one that was opened.
    """

    def __init__(
        self,
        searcher: ExactIndex | ScannIndex,
        card: Card,
        digests_Ex16: np.ndarray | None = None,
        curve: Curve | None = None,
        home: Path | None = None,
    ):
        self.searcher, self.card, self.digests_Ex16, self.curve = searcher, card, digests_Ex16, curve
        self._home = home  # where the parts of the card lie

    def __len__(self) -> int:
        return len(self.searcher)

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`."""
        return self.searcher.search(q_NxQxC, k, allowed_N)

    def replaced(self, searcher: ExactIndex | ScannIndex, card: Card, digests_Ex16: np.ndarray | None) -> Index:
        """An index that continues this one: saved to the same directory, it leaves the parts that are there alone."""
        return Index(searcher, card, digests_Ex16, self.curve, self._home)

    def save(self, directory: Path | str) -> None:
        """Writes the index; whatever ``directory`` held before stays whole until the last moment, and is then removed.

        Raises:
          OSError: the disk; the previous index is left as it was.
        """
        directory = local_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        parts = self.card.parts if self._home == directory else []
        if not all((directory / folder.name).is_dir() for folder in parts):
            parts = []  # another index was saved here since
        fresh: list[Path] = []
        try:
            for part in self._parts()[len(parts) :]:
                fresh.append(Path(tempfile.mkdtemp(prefix="data-", dir=directory)))
                _save_part(part, fresh[-1])
                parts = [*parts, _folder(fresh[-1])]
            fresh.append(Path(tempfile.mkdtemp(prefix="data-", dir=directory)))
            self._save_state(fresh[-1])
            state = _folder(fresh[-1])
            total = sum(entry.bytes for folder in (*parts, state) for entry in folder.files.values())
            card = self.card.model_copy(update={"parts": parts, "state": state, "total_bytes": total}).sealed()
            write_text(directory / "card.json", card.model_dump_json(indent=2) + "\n")
        except BaseException:
            for folder in fresh:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.card, self._home = card, directory
        named = {folder.name for folder in (*parts, state)}
        for old in directory.glob("data-*"):
            if old.name not in named:
                shutil.rmtree(old, ignore_errors=True)
        for card_part in directory.glob(".card.json.*.part"):  # of a writer that was killed
            card_part.unlink(missing_ok=True)

    def _parts(self) -> tuple[Part | TokenVectors, ...]:
        return self.searcher.parts if isinstance(self.searcher, ScannIndex) else (self.searcher.vectors,)

    def _save_state(self, folder: Path) -> None:
        if isinstance(self.searcher, ScannIndex):
            np.save(folder / "entries.npy", self.searcher.entry_N, allow_pickle=False)
            _save_encoding(self.searcher.encoding, folder / "encoding.npz")
            if self.searcher.code is not None:
                _save_code(self.searcher.code, folder / "code.npz")
            if self.curve is not None:
                (folder / "tradeoff.json").write_text(self.curve.model_dump_json(indent=1) + "\n", encoding="utf-8")
                (folder / "tradeoff.png").write_bytes(picture(self.curve))
            elif self.card.state.name and self._home is not None:  # opened, changed, saved: the picture stays
                for name in ("tradeoff.json", "tradeoff.png"):
                    if name in self.card.state.files:
                        shutil.copyfile(self._home / self.card.state.name / name, folder / name)
        if self.digests_Ex16 is not None:
            np.save(folder / "digests.npy", self.digests_Ex16, allow_pickle=False)


def open_index(directory: Path | str, model_fingerprint: str, corpus_fingerprint: str | None) -> Index:
    """Opens a saved index for the given retriever and corpus; token vectors are memory-mapped.

    Args:
      directory: see the module.
      model_fingerprint: of the retriever, see :func:`params_fingerprint`.
      corpus_fingerprint: of the tokenised corpus; None opens an index of any corpus, to be updated.

    Raises:
      IndexUnusable: there is no index, it belongs to another model or corpus, or a file is missing, changed or unknown.
    """
    directory = local_path(directory)
    while True:
        text = _card_text(directory)
        try:
            return _open(directory, text, model_fingerprint, corpus_fingerprint)
        except (IndexUnusable, OSError):
            if _card_text(directory) == text:
                raise
            # A save swapped the index under our hands: what we read is gone, and the new one is whole.


def _card_text(directory: Path) -> str:
    try:
        return (directory / "card.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IndexUnusable(f"{directory}: no index here (card.json is missing); build one with `jmlr index`") from None
    except UnicodeDecodeError as error:
        path = directory / "card.json"
        raise IndexUnusable(f"{path}: not a readable index card ({error}); build the index again") from None


def read_card(directory: Path, model_fingerprint: str, corpus_fingerprint: str | None) -> Card:
    """The card of the index of a directory, without a look at what it names; arguments as for :func:`open_index`.

    Raises:
      IndexUnusable: there is no card, it was changed, or it is of another model or corpus.
    """
    return _checked(directory, _card_text(directory), model_fingerprint, corpus_fingerprint)


def _checked(directory: Path, text: str, model_fingerprint: str, corpus_fingerprint: str | None) -> Card:
    path = directory / "card.json"
    try:
        card = Card.model_validate_json(text)
    except ValidationError as error:
        raise IndexUnusable(f"{path}: not a readable index card ({error}); build the index again") from None
    if card.sha256 != card.sealed().sha256:
        raise IndexUnusable(f"{path}: contents changed since it was written; build the index again")
    for what, have, want in (
        ("retriever", card.model_fingerprint, model_fingerprint),
        ("corpus", card.corpus_fingerprint, corpus_fingerprint),
    ):
        if want is not None and have != want:
            raise IndexUnusable(
                f"{path}: built with another {what} ({have[:12]}, now {want[:12]}); build the index again"
            )
    return card


def _open(directory: Path, text: str, model_fingerprint: str, corpus_fingerprint: str | None) -> Index:
    card = _checked(directory, text, model_fingerprint, corpus_fingerprint)
    for folder in (*card.parts, card.state):
        _verify(directory, folder)
    try:
        searcher, digests = _load(directory, card)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise IndexUnusable(f"{directory}: {error}; build the index again") from None
    return Index(searcher, card, digests, home=directory)


def _load(directory: Path, card: Card) -> tuple[ExactIndex | ScannIndex, np.ndarray | None]:
    """The searcher and the digests of a verified directory; raises ValueError where files and card disagree."""
    state = directory / card.state.name
    searcher: ExactIndex | ScannIndex
    if card.kind == "exact":
        data = directory / card.parts[0].name
        arrays = (np.load(data / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("vectors", "keep"))
        searcher = ExactIndex(TokenVectors(*arrays))
        entries = len(searcher)
    else:
        with np.load(state / "encoding.npz", allow_pickle=False) as found:
            fde = FDE(**{name: found[name] for name in FDE._fields})
            encoding = Encoding(fde, found["mean_F"], found["basis_FxD"].astype(np.float32))
        code = _load_code(state / "code.npz") if "code.npz" in card.state.files else None
        parts = [Part.load(directory / folder.name, code) for folder in card.parts]
        rows = np.load(state / "entries.npy", allow_pickle=False)
        searcher = ScannIndex(encoding, code, parts, rows, card.hits, card.leaves, card.spare)
        entries = len(searcher.row_E)
    have, want = [len(searcher), entries, searcher.dim], [card.passages, card.entries, card.dim]
    if have != want:
        raise ValueError(f"the files hold [passages, entries, width] {have}, card.json says {want}")
    digests = np.load(state / "digests.npy", allow_pickle=False) if "digests.npy" in card.state.files else None
    return searcher, digests


def _save_part(part: Part | TokenVectors, folder: Path) -> None:
    if isinstance(part, Part):
        part.save(folder)
    else:
        np.save(folder / "vectors.npy", part.vectors_NxPxC, allow_pickle=False)
        np.save(folder / "keep.npy", part.keep_NxP, allow_pickle=False)


def _save_encoding(encoding: Encoding, path: Path) -> None:
    # The basis is the largest array of a small index, and exact in nothing but being the same for all.
    basis = encoding.basis_FxD.astype(np.float16)
    np.savez(path, allow_pickle=False, mean_F=encoding.mean_F, basis_FxD=basis, **encoding.fde._asdict())


def _save_code(code: TokenCode, path: Path) -> None:
    arrays = {name: getattr(code, name) for name in ("mean_C", "scale_G", "rotate_CxC", "step_C")}
    centroids = code.centroids_GxC.astype(np.float16)  # they are such numbers
    np.savez(path, allow_pickle=False, widths=np.array(code.widths, np.int32), centroids_GxC=centroids, **arrays)


def _load_code(path: Path) -> TokenCode:
    with np.load(path, allow_pickle=False) as found:
        widths = tuple((int(bits), int(count)) for bits, count in found["widths"])
        centroids = found["centroids_GxC"].astype(np.float32)
        mean_C, scale_G, rotate_CxC, step_C = (found[name] for name in ("mean_C", "scale_G", "rotate_CxC", "step_C"))
        return TokenCode(mean_C, centroids, scale_G, rotate_CxC, step_C, widths)


def _verify(directory: Path, folder: Folder) -> None:
    """Raises IndexUnusable unless a data folder holds exactly the files of the card, byte for byte."""
    data = directory / folder.name
    if Path(folder.name).name != folder.name or not folder.name.startswith("data-"):
        raise IndexUnusable(f"{data}: the card names a directory outside the index; build the index again")
    present = set(_files_under(data))
    if missing := sorted(folder.files.keys() - present):
        raise IndexUnusable(f"{data / missing[0]}: missing; build the index again")
    # ScaNN would unpickle a file it was never given: nothing unknown is let in.
    if unknown := sorted(present - folder.files.keys()):
        raise IndexUnusable(f"{data / unknown[0]}: not part of this index; remove it or build the index again")
    for name, want in folder.files.items():
        size = (data / name).stat().st_size
        if size != want.bytes:
            raise IndexUnusable(f"{data / name}: {size} bytes, {want.bytes} were written; build the index again")
        if _entry(data / name) != want:
            raise IndexUnusable(f"{data / name}: contents changed since it was written; build the index again")


def _folder(path: Path) -> Folder:
    return Folder(name=path.name, files={name: _entry(path / name) for name in _files_under(path)})


def _files_under(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def passage_digests(rows: Iterable[np.ndarray]) -> np.ndarray:
    """uint8 [N, 16]: bytes that tell the token ids (int) of one passage from another's.

    >>> one, same, other = passage_digests([np.array([1, 2]), np.array([1, 2], np.int64), np.array([2, 1])])
    >>> (one == same).all(), (one == other).all()
    (np.True_, np.False_)
    """
    found = bytearray()
    for ids in rows:
        found += hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(bytes(found), np.uint8).reshape(-1, DIGEST_BYTES)


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
