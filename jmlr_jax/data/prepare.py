"""``jmlr prepare``: from a configuration to everything training reads, in one directory.

Order: sources (read, split, filter), tokenizers, tokens, builders, baselines, card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config import Config
from jmlr_jax.config_models import GeneratorConfig, RetrieverConfig
from jmlr_jax.data import chat, prepare_report
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
    TokenizerError,
    encoder,
    generator_ids,
    load_tokenizer,
    punctuation_table,
    retriever_ids,
    save_tokenizer,
    train_generator_tokenizer,
    train_retriever_tokenizer,
)
from jmlr_jax.files import digest, local_path

TRAINING_TEXTS = 100_000  # texts a tokenizer is trained on at most, evenly spread over the corpus


def prepare(
    cfg: Config, folder: str | Path, console: Console | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Writes the data of a configuration and returns the card, the content of ``prepare.json``, written last.

    Args:
        cfg: sections ``data``, ``retriever`` and ``generator`` matter, and the seed for the embedded world.
        folder: on a local disk (token tables are memory-mapped); made if it is not there.
        console: where the statistics go; none if not given.
        keep: prepared data whose tokenizers are taken instead of training new ones, since weights know their ids.

    Raises:
        RecordError, TemplateError, TokenizerError: see those.
        InputError: no questions, no passages, a path missing in the configuration, or questions that do not fit their
            configured lengths while ``data.on_error`` is ``stop``.
        FileNotFoundError: an input file is not there.
    """
    check_templates(cfg)
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = _prepare_into(cfg, folder, keep)
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False))
    if console:
        prepare_report.show(card, console)
    return card


def _prepare_into(cfg: Config, out: Path, keep: Path | None) -> dict[str, Any]:
    """Writes everything but the card, which it returns."""
    sources = read_sources(cfg)
    prompts = Prompts(cfg.retriever, cfg.generator)
    if keep is None:
        _make_tokenizers(cfg, prompts, sources, out)
    else:
        shutil.copytree(keep / "tokenizers", out / "tokenizers")
    retriever = load_tokenizer(str(out / "tokenizers" / "retriever"))
    generator = load_tokenizer(str(out / "tokenizers" / "generator"))
    r_ids = retriever_ids(retriever, cfg.retriever)
    g_ids = chat.layout(generator_ids(generator), generator, cfg.generator)
    _check_vocabulary("retriever.bert", cfg.retriever.bert.vocab_size, r_ids.vocab_size)
    _check_vocabulary("generator.llama", cfg.generator.llama.vocab_size, g_ids.vocab_size)
    skip_V = punctuation_table(retriever, r_ids.vocab_size, skip=cfg.retriever.skip_punctuation)
    save_array(out / "tokens" / "skip.npy", skip_V)

    engines = encoder(retriever), encoder(generator, continues=True)
    tables = TableWriter(cfg, prompts, *engines, r_ids, g_ids, out / "tokens")
    row_of = {passage.id: row for row, passage in enumerate(sources.passages)}
    tables.write_passages(sources.passages)
    questions = {split: tables.write_split(split, sources.questions[split], row_of) for split in SPLITS}
    write_questions(out, questions)
    write_corpus(out, sources.passages)
    return {
        "retriever_ids": dataclasses.asdict(r_ids),
        "generator_ids": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(g_ids).items()},
        "lengths": {
            "query": cfg.retriever.query_length,
            "passage": cfg.retriever.passage_length,
            "reference": cfg.generator.passage_length,
            "question": cfg.generator.question_length,
            "answer": cfg.generator.answer_length,
        },
        "augment_queries": cfg.retriever.augment_queries,
        "max_options": max((len(q.options) for split in SPLITS for q in questions[split]), default=0),
        "fingerprints": _fingerprints(out, sources.passages, questions),
        "passages": len(sources.passages),
        "questions": {split: len(questions[split]) for split in SPLITS},
        "cuts": tables.cuts,
        "dropped": [str(misfit) for misfit in tables.dropped],
        **sources.notes,
        "leakage": prepare_report.leakage_notes(sources.leakage),
        "baselines": prepare_report.baselines(prompts, questions, sources.passages, row_of),
    }


@dataclass
class TableWriter:
    """Tokenises and saves.

    Attributes:
        retriever, generator: engines of :func:`jmlr_jax.data.tokenizers.encoder`.
        directory: where tables are written.
        cuts: name of a table -> what was cut, see :class:`jmlr_jax.data.tokenise.CutCount`.
        dropped: why questions were left out.
    """

    cfg: Config
    prompts: Prompts
    retriever: Tokenizer
    generator: Tokenizer
    retriever_ids: RetrieverIds
    generator_ids: GeneratorIds
    directory: Path
    cuts: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: list[Misfit] = field(default_factory=list)

    def write_passages(self, passages: list[Passage]) -> None:
        """Tables ``passages`` (retriever) and ``references`` (generator)."""
        before, after = self.retriever_ids.around("passage")
        texts = [self.prompts.retrieved(passage) for passage in passages]
        limit = self.cfg.retriever.passage_length
        table, cut = tokenise(self.retriever, texts, limit, "passages", before=before, after=after)
        self._save("passages", table, cut)
        texts = [self.prompts.reference(passage) for passage in passages]
        limit = self.cfg.generator.passage_length
        self._save("references", *tokenise(self.generator, texts, limit, "references"))

    def write_split(self, split: str, questions: list[Question], row_of: dict[str, int]) -> list[Question]:
        """All tables of a split; returns the questions that fit, whose rows these are."""
        asked, cut, too_long = tokenise_questions(self.generator, self.prompts, questions, self.generator_ids.tail)
        eos = self.generator_ids.eos
        said, unanswerable = tokenise_answers(self.generator, self.prompts, questions, eos)
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
        table, cut = tokenise(self.retriever, texts, limit, "queries", before=before, after=after)
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
    if cfg.retriever.tokenizer_place is None:
        texts = [*map(prompts.retrieved, passages), *map(prompts.query, train)]
        train_retriever_tokenizer(texts, cfg.retriever, directory)
    else:
        save_tokenizer(_given_tokenizer("retriever", cfg.retriever), cfg.retriever.tokenizer_place, directory)
    directory = str(out / "tokenizers" / "generator")
    if cfg.generator.tokenizer_place is None:
        texts = [prompts.reference(passage) for passage in passages]
        texts += [prompts.question(question.question, question.options) for question in train]
        texts += [prompts.answer(question) for question in train]
        train_generator_tokenizer(
            texts, cfg.generator.tokenizer_vocab, directory, lowercase=cfg.generator.tokenizer_lowercase
        )
    else:
        save_tokenizer(_given_tokenizer("generator", cfg.generator), cfg.generator.tokenizer_place, directory)


def _given_tokenizer(half: str, cfg: RetrieverConfig | GeneratorConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that a configuration names; where the weights bring one of their own, its ids must be the same."""
    assert cfg.tokenizer_place is not None
    tokenizer = load_tokenizer(cfg.tokenizer_place)
    if cfg.source in ("scratch", cfg.tokenizer_place):
        return tokenizer
    try:
        own = load_tokenizer(cfg.source)
    except TokenizerError:  # weights alone; what they cannot hold is refused when they are loaded
        return tokenizer
    given = tokenizer.get_vocab()
    other = next((token for token, number in sorted(own.get_vocab().items()) if given.get(token) != number), None)
    if other is not None:
        raise TokenizerError(
            f"{half}.tokenizer={cfg.tokenizer_place}: not the tokenizer of {half}.source={cfg.source} ({other!r} is "
            f"{own.get_vocab()[other]} there and {given.get(other)} here); leave {half}.tokenizer out"
        )
    return tokenizer


def _fingerprints(out: Path, passages: list[Passage], questions: dict[str, list[Question]]) -> dict[str, str]:
    """sha256 of what others are made from: ``passages`` and each split are of records and their tokens together."""
    corpus = _digest(dataclasses.astuple(passage) for passage in passages)
    found = {
        "corpus": corpus,
        "questions": _digest((split, dataclasses.astuple(q)) for split in SPLITS for q in questions[split]),
        "passages": _digest([corpus, *_tables(out, "passages", "references", "skip")]),
    }
    for split in SPLITS:
        found[split] = _digest([*map(dataclasses.astuple, questions[split]), *_tables(out, f"{split}.")])
    return found | {f"{half}_tokenizer": digest(out / "tokenizers" / half) for half in ("retriever", "generator")}


def _tables(out: Path, *beginnings: str) -> list[str]:
    """Digests of the token tables whose names begin so."""
    return [digest(file) for file in sorted((out / "tokens").iterdir()) if file.name.startswith(beginnings)]


def _digest(records: Iterable[Any]) -> str:
    hasher = hashlib.sha256()
    for record in records:
        hasher.update(json.dumps(record, ensure_ascii=False).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()
