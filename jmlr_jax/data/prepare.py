"""``jmlr prepare``: from a configuration to everything training reads, in one directory.

Order: sources (read, split, filter), tokenizers, tokens, builders, baselines, card.
The directory appears whole or not at all; with unchanged inputs nothing is done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from tokenizers import Tokenizer

from jmlr_jax.config import Config
from jmlr_jax.data import prepare_report
from jmlr_jax.data.batches import CARD
from jmlr_jax.data.builders import write_corpus, write_questions
from jmlr_jax.data.prompts import Prompts, check_templates
from jmlr_jax.data.schema import SPLITS, InputError, Passage, Question
from jmlr_jax.data.sources import Sources, read_sources
from jmlr_jax.data.token_table import TokenTable, save_array
from jmlr_jax.data.tokenise import CutCount, Misfit, tokenise, tokenise_answers, tokenise_questions
from jmlr_jax.data.tokenizers import (
    GeneratorIds,
    RetrieverIds,
    encoder,
    generator_ids,
    load_tokenizer,
    punctuation_table,
    retriever_ids,
    train_generator_tokenizer,
    train_retriever_tokenizer,
)

LAYOUT = 1  # raise when what is written changes, so that directories of older code are prepared again
TRAINING_TEXTS = 100_000  # texts a tokenizer is trained on at most, evenly spread over the corpus


def prepare(cfg: Config, out_dir: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Prepares the data of a configuration and returns the card, the content of ``prepare.json``.

    Args:
        cfg: the configuration; sections ``data``, ``retriever`` and ``generator`` and the seed matter.
        out_dir: a directory on a local disk (token tables are memory-mapped); replaced if its inputs differ.
        console: where the statistics and progress go; none if not given.

    Raises:
        RecordError, TemplateError, TokenizerError: see those.
        InputError: no questions, no passages, a path missing in the configuration, or questions that do not fit their
            configured lengths while ``data.on_error`` is ``stop``.
        FileNotFoundError: an input file is not there.
    """
    out = Path(out_dir).absolute()
    check_templates(cfg)
    inputs = _inputs_fingerprint(cfg)
    if (out / CARD).is_file():
        card = json.loads((out / CARD).read_text())
        if card["inputs"] == inputs:
            if console:
                console.print(f"{out}: prepared already, inputs unchanged")
            return card
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
    part.mkdir(parents=True)
    card = {"inputs": inputs, **_prepare_into(cfg, part, console)}
    (part / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False))
    _replace(part, out)
    if console:
        prepare_report.show(card, console)
    return card


def _prepare_into(cfg: Config, out: Path, console: Console | None) -> dict[str, Any]:
    """Writes everything but the card, which it returns."""
    sources = read_sources(cfg)
    prompts = Prompts(cfg.retriever, cfg.generator)
    _make_tokenizers(cfg, prompts, sources, out)
    retriever = load_tokenizer(str(out / "tokenizers" / "retriever"))
    generator = load_tokenizer(str(out / "tokenizers" / "generator"))
    r_ids, g_ids = retriever_ids(retriever, cfg.retriever), generator_ids(generator)
    _check_vocabulary("retriever.bert", cfg.retriever.bert.vocab_size, r_ids.vocab_size)
    _check_vocabulary("generator.llama", cfg.generator.llama.vocab_size, g_ids.vocab_size)
    skip_V = punctuation_table(retriever, r_ids.vocab_size, skip=cfg.retriever.skip_punctuation)
    save_array(out / "tokens" / "skip.npy", skip_V)

    engines = encoder(retriever), encoder(generator, continues=True)
    tables = _Tables(cfg, prompts, *engines, r_ids, g_ids, out / "tokens", console)
    row_of = {passage.id: row for row, passage in enumerate(sources.passages)}
    tables.write_passages(sources.passages)
    questions = {split: tables.write_split(split, sources.questions[split], row_of) for split in SPLITS}
    write_questions(out, questions)
    write_corpus(out, sources.passages)
    return {
        "retriever_ids": dataclasses.asdict(r_ids),
        "generator_ids": dataclasses.asdict(g_ids),
        "lengths": {
            "query": cfg.retriever.query_length,
            "passage": cfg.retriever.passage_length,
            "reference": cfg.generator.passage_length,
            "question": cfg.generator.question_length,
            "answer": cfg.generator.answer_length,
        },
        "augment_queries": cfg.retriever.augment_queries,
        "max_options": max((len(q.options) for split in SPLITS for q in questions[split]), default=0),
        "fingerprints": {
            "corpus": _digest(dataclasses.astuple(passage) for passage in sources.passages),
            "questions": _digest((split, dataclasses.astuple(q)) for split in SPLITS for q in questions[split]),
            "retriever_tokenizer": _digest_path(out / "tokenizers" / "retriever"),
            "generator_tokenizer": _digest_path(out / "tokenizers" / "generator"),
        },
        "passages": len(sources.passages),
        "questions": {split: len(questions[split]) for split in SPLITS},
        "cuts": tables.cuts,
        "dropped": [str(misfit) for misfit in tables.dropped],
        **sources.notes,
        "leakage": prepare_report.leakage_notes(sources.leakage),
        "baselines": prepare_report.baselines(cfg, prompts, questions, sources.passages, row_of),
    }


@dataclass
class _Tables:
    """Tokenises and saves; keeps count of what was cut and which questions were left out."""

    cfg: Config
    prompts: Prompts
    retriever: Tokenizer
    generator: Tokenizer
    retriever_ids: RetrieverIds
    generator_ids: GeneratorIds
    directory: Path
    console: Console | None
    cuts: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: list[Misfit] = field(default_factory=list)

    def write_passages(self, passages: list[Passage]) -> None:
        """Tables ``passages`` (retriever) and ``references`` (generator)."""
        before, after = self.retriever_ids.around("passage")
        texts = [self.prompts.retrieved(passage) for passage in passages]
        limit = self.cfg.retriever.passage_length
        table, cut = tokenise(
            self.retriever, texts, limit, "passages", before=before, after=after, console=self.console
        )
        self._save("passages", table, cut)
        texts = [self.prompts.reference(passage) for passage in passages]
        limit = self.cfg.generator.passage_length
        self._save("references", *tokenise(self.generator, texts, limit, "references", console=self.console))

    def write_split(self, split: str, questions: list[Question], row_of: dict[str, int]) -> list[Question]:
        """All tables of a split; returns the questions that fit, whose rows these are."""
        asked, cut, too_long = tokenise_questions(self.generator, self.prompts, questions, console=self.console)
        eos = self.generator_ids.eos
        said, unanswerable = tokenise_answers(self.generator, self.prompts, questions, eos, console=self.console)
        misfits = too_long + unanswerable
        if misfits:
            if self.cfg.data.on_error == "stop":
                worst = max(misfits, key=lambda misfit: misfit.needed / misfit.limit)
                raise InputError(
                    f"{split}: {len(misfits)} pieces of questions do not fit, the worst: {worst}. Raise {worst.key} to "
                    f"{worst.needed}, or set data.on_error=skip to leave such questions out"
                )
            self.dropped += misfits
            bad = {misfit.row for misfit in misfits}
            return self.write_split(split, [q for row, q in enumerate(questions) if row not in bad], row_of)

        self._save(f"{split}.questions", asked, cut)
        said.answers.save(self.directory, f"{split}.answers")
        said.options.save(self.directory, f"{split}.options")
        save_array(self.directory / f"{split}.option_starts.npy", said.starts)
        before, after = self.retriever_ids.around("query")
        texts = [self.prompts.query(question) for question in questions]
        limit = self.cfg.retriever.query_length
        table, cut = tokenise(self.retriever, texts, limit, "queries", before=before, after=after, console=self.console)
        self._save(f"{split}.queries", table, cut)
        gold = TokenTable.of([row_of[doc] for doc in q.gold_doc_ids if doc in row_of] for q in questions)
        gold.save(self.directory, f"{split}.gold")
        return questions

    def _save(self, name: str, table: TokenTable, cut: CutCount) -> None:
        table.save(self.directory, name)
        self.cuts[name] = dataclasses.asdict(cut)


def _check_vocabulary(key: str, configured: int, needed: int) -> None:
    if configured and configured < needed:
        raise InputError(f"{key}.vocab_size={configured} is below the tokenizer's {needed}; 0 takes the tokenizer's")


def _make_tokenizers(cfg: Config, prompts: Prompts, sources: Sources, out: Path) -> None:
    """Trains or copies both tokenizers into ``out``; training sees passages and training questions only."""
    step = max(1, -(-len(sources.passages) // TRAINING_TEXTS))
    passages, train = sources.passages[::step], sources.questions["train"][:TRAINING_TEXTS]
    directory = str(out / "tokenizers" / "retriever")
    if cfg.retriever.tokenizer == "train":
        texts = [*map(prompts.retrieved, passages), *map(prompts.query, train)]
        train_retriever_tokenizer(texts, cfg.retriever, directory)
    else:
        load_tokenizer(cfg.retriever.tokenizer).save_pretrained(directory)
    directory = str(out / "tokenizers" / "generator")
    if cfg.generator.tokenizer == "train":
        texts = [prompts.reference(passage) for passage in passages]
        texts += [prompts.question(question.question, question.options) for question in train]
        texts += [prompts.answer(question) for question in train]
        train_generator_tokenizer(
            texts, cfg.generator.tokenizer_vocab, directory, lowercase=cfg.generator.tokenizer_lowercase
        )
    else:
        load_tokenizer(cfg.generator.tokenizer).save_pretrained(directory)


def _inputs_fingerprint(cfg: Config) -> str:
    """sha256 of all that the result depends on: configuration, input files, tokenizers' versions, layout."""
    hasher = hashlib.sha256()
    settings = {
        "layout": LAYOUT,
        "seed": cfg.seed if cfg.data.questions == "world" else None,
        "data": cfg.data.model_dump(),
        "retriever": cfg.retriever.model_dump(exclude={"source", "bert", "lora", "dim", "attend_to_mask_tokens"}),
        "generator": cfg.generator.model_dump(exclude={"source", "llama", "lora", "max_length"}),
        "vocab": [cfg.retriever.bert.vocab_size, cfg.generator.llama.vocab_size],
        "candidates": cfg.train.candidates,
        "libraries": [metadata.version(name) for name in ("tokenizers", "transformers")],
    }
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    paths = [getattr(cfg.data, f"{name}_path") for name in (*SPLITS, "corpus")]
    for tokenizer in (cfg.retriever.tokenizer, cfg.generator.tokenizer):
        paths.append(tokenizer if tokenizer != "train" else None)
    for path in paths:
        if path is not None and epath.Path(path).exists():
            hasher.update(_digest_path(epath.Path(path)).encode())
    if cfg.data.questions == "world":
        hasher.update((Path(__file__).parent / "world.py").read_bytes())
    return hasher.hexdigest()


def _digest(records: Iterable[Any]) -> str:
    hasher = hashlib.sha256()
    for record in records:
        hasher.update(json.dumps(record, ensure_ascii=False).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def _digest_path(path: Any) -> str:
    """sha256 of a file, or of the names and contents of a directory's files."""
    hasher = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_dir():
            continue
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                hasher.update(chunk)
    return hasher.hexdigest()


def _replace(part: Path, out: Path) -> None:
    """Puts ``part`` in the place of ``out``; a crash in between leaves no card there, so the next run starts anew."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)
