"""Question sets and corpora as tensorflow-datasets in ArrayRecord files, written and read without TensorFlow.

Examples keep the order they were given in, so that row ``i`` of a token table is example ``i`` of its split.

Two conditions of tensorflow-datasets that do not show in its signatures: it imports ``importlib_resources`` without
declaring it (our own dependency list does), and a builder's module must live in a package, as this one does.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import tensorflow_datasets as tfds

from jmlr_jax.data.schema import Passage, Question
from jmlr_jax.parallel.progress import track

VERSION = "1.0.0"
PASSAGES_SPLIT = "train"  # what tensorflow-datasets calls the one split of an undivided set
Record = TypeVar("Record", Question, Passage)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the records it is given; splits without records are left out, as the library cannot write them."""

    VERSION = tfds.core.Version(VERSION)
    FEATURES: Mapping[str, Any]

    def __init__(self, data_dir: Path, examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._examples = {split: rows for split, rows in examples.items() if rows}
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def forget_examples(self) -> None:
        """Frees the records: the library keeps every builder in a cache for as long as the process lives."""
        self._examples = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self.FEATURES))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(rows) for split, rows in self._examples.items()}

    def _generate_examples(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(track(rows, len(rows), f"writing {self.name}", "records"))


class Questions(_Builder, skip_registration=True):  # type: ignore[call-arg]
    """A question set with splits train, dev and test."""

    name = "questions"
    FEATURES = {
        "id": tfds.features.Text(),
        "question": tfds.features.Text(),
        "options": tfds.features.Sequence(tfds.features.Text()),
        "answer": tfds.features.Text(),
        "answer_index": tfds.features.Scalar(np.int32),
        "gold_doc_ids": tfds.features.Sequence(tfds.features.Text()),
        "kind": tfds.features.Text(),
        "meta": tfds.features.Text(doc="a JSON object"),
    }


class Corpus(_Builder, skip_registration=True):  # type: ignore[call-arg]
    """A passage corpus, one split."""

    name = "corpus"
    FEATURES = {name: tfds.features.Text() for name in ("id", "title", "text", "source", "url")}


def write_questions(directory: Path, questions: Mapping[str, Sequence[Question]]) -> None:
    """Writes ``directory/questions/VERSION``."""
    rows = {
        split: [
            {
                "id": question.id,
                "question": question.question,
                "options": list(question.options),
                "answer": question.answer,
                "answer_index": question.answer_index,
                "gold_doc_ids": list(question.gold_doc_ids),
                "kind": question.kind,
                "meta": json.dumps(dict(question.meta), ensure_ascii=False),
            }
            for question in records
        ]
        for split, records in questions.items()
    }
    _write(Questions(directory, rows))


def write_corpus(directory: Path, passages: Sequence[Passage]) -> None:
    """Writes ``directory/corpus/VERSION``."""
    _write(Corpus(directory, {PASSAGES_SPLIT: [vars(passage) for passage in passages]}))


def _write(builder: _Builder) -> None:
    tfds.disable_progress_bar()
    downloads = Path(builder.data_path).parent / "downloads"  # made even though nothing is downloaded
    with contextlib.redirect_stdout(io.StringIO()):  # the library reports a download that is none
        builder.download_and_prepare(download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)
    builder.forget_examples()


class Records(Sequence[Record], Generic[Record]):
    """The records of one split, read from disk when asked for."""

    def __init__(self, source: Any, decode: Any) -> None:
        self._source, self._decode = source, decode

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            rows = list(range(*index.indices(len(self))))
            return [self._decode(row) for row in self._source.__getitems__(rows)] if rows else []
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._decode(self._source[index % len(self)])

    def __iter__(self) -> Iterator[Record]:
        for begin in range(0, len(self), 1024):
            yield from self[begin : begin + 1024]


def read_questions_split(directory: Path, split: str) -> Records[Question]:
    """One split as written by :func:`write_questions`; empty if it was."""
    return Records(_source(directory / "questions", split), _question)


def read_passages(directory: Path) -> Records[Passage]:
    """The corpus as written by :func:`write_corpus`."""
    return Records(_source(directory / "corpus", PASSAGES_SPLIT), _passage)


def _source(directory: Path, split: str) -> Any:
    builder = tfds.builder_from_directory(str(directory / VERSION))
    return builder.as_data_source(split) if split in builder.info.splits else ()


def _question(row: Mapping[str, Any]) -> Question:
    return Question(
        id=row["id"].decode(),
        question=row["question"].decode(),
        options=tuple(option.decode() for option in row["options"]),
        answer=row["answer"].decode(),
        answer_index=int(row["answer_index"]),
        gold_doc_ids=tuple(doc.decode() for doc in row["gold_doc_ids"]),
        kind=row["kind"].decode(),
        meta=json.loads(row["meta"]),
    )


def _passage(row: Mapping[str, Any]) -> Passage:
    return Passage(**{name: row[name].decode() for name in Corpus.FEATURES})
