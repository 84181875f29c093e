"""Tokenizers: any Hugging Face directory with a fast tokenizer, or small ones trained on the data at hand.

Text is always encoded without special tokens, and text that spells one (``</s>``, ``[MASK]``) is plain text: the layout
adds them, nobody else.
"""

from __future__ import annotations

import json
import shutil
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import local_path

BYTES = 256
MAX_BYTES = 1 << 28  # of one file of a tokenizer; the largest published ones have a tenth of it
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
SENTENCEPIECE = "tokenizer.model"
KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_MAX_LETTERS = 1000  # of the retriever's alphabet; rarer ones are unknown
_GENERATOR_SPECIALS = ("<pad>", "<s>", "</s>")


class TokenizerError(JmlrError, ValueError):
    """A tokenizer that lacks what the layout needs."""


@dataclass(frozen=True)
class RetrieverIds:
    """Token ids of the retriever's layout; ``vocab_size`` is above every id that the tokenizer can give."""

    cls: int
    sep: int
    mask: int
    pad: int
    query_marker: int
    passage_marker: int
    vocab_size: int

    def around(self, side: Literal["query", "passage"]) -> tuple[tuple[int, int], tuple[int]]:
        """Tokens before and after the text: ``[CLS] marker`` and ``[SEP]``."""
        marker = self.query_marker if side == "query" else self.passage_marker
        return (self.cls, marker), (self.sep,)


@dataclass(frozen=True)
class GeneratorIds:
    """Token ids of the generator's layout; where a tokenizer has no begin or padding token, the end token serves.

    Attributes:
        eos: what an answer ends with.
        head: what a prompt begins with in place of `bos`, the opening of a chat template.
        tail: what stands between question and answer, the template's turn.
        stops: what ends a generated answer beside `eos`.
    """

    bos: int
    eos: int
    pad: int
    vocab_size: int
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()

    @property
    def begin(self) -> int | tuple[int, ...]:
        """What a prompt begins with."""
        return self.head or self.bos

    @property
    def ends(self) -> tuple[int, ...]:
        """What a generated answer ends with: the end token, and what stops it beside."""
        return (self.eos, *self.stops)


def load_tokenizer(directory: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a local directory; nothing is downloaded and no code of the directory is run.

    Raises:
        TokenizerError: if the directory holds no tokenizer with a fast implementation.
    """
    folder = local_path(directory)
    if not folder.is_dir():
        raise TokenizerError(f"{directory}: no such tokenizer directory")
    _check_size(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # the engine's own is a plain Exception
        raise TokenizerError(f"{directory}: {_why(folder, error)}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{directory}: only a slow tokenizer; save a fast one (tokenizer.json) beside it")
    return tokenizer


def _check_size(folder: Path) -> None:
    """Refuses files that the library would read whole and that no tokenizer needs to be so large."""
    for name in FILES:
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size > MAX_BYTES:
            raise TokenizerError(f"{folder / name}: has {size:,} bytes; no tokenizer needs more than {MAX_BYTES:,}")


def _why(folder: Path, error: Exception) -> str:
    """What kept a tokenizer from being loaded, and what can be."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kind = said["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"not a tokenizer that transformers can load: {first}"
    cannot = "not a tokenizer that transformers can load"
    here = f"the library tokenizers {metadata.version('tokenizers')}"
    if kind not in KINDS:
        return f"{cannot}: its model is of type {kind!r}; {here} reads {', '.join(KINDS)}"
    return (
        f"{cannot}: tokenizer.json ({kind}) was written for another version than {here} ({first}); save it again with "
        "that one, or install the one that wrote it"
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, source: str, directory: str) -> None:
    """Writes a tokenizer that was loaded from the directory `source`, and the SentencePiece model that may be there.

    Nothing here reads that file; llama.cpp's converter takes Gemma's vocabulary from nowhere else.
    """
    tokenizer.save_pretrained(directory)
    model = local_path(source) / SENTENCEPIECE
    if model.is_file():
        shutil.copyfile(model, Path(directory) / SENTENCEPIECE)


def encoder(tokenizer: PreTrainedTokenizerFast, *, continues: bool = False) -> Tokenizer:
    """A copy of the tokenizer's engine that neither cuts, pads nor reads special tokens out of text.

    With ``continues`` it encodes text that goes on from text before it: SentencePiece models otherwise put a space in
    front of every piece they are given, and a prompt joined from pieces would hold spaces that nobody wrote.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if continues:
        spec["normalizer"] = _without_leading_space(spec["normalizer"])
        spec["pre_tokenizer"] = _without_leading_space(spec["pre_tokenizer"])
    spec["post_processor"] = None  # it would add special tokens
    engine = Tokenizer.from_str(json.dumps(spec))
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine


def _without_leading_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer specification without what prepends a space."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        inner = [kept for kept in map(_without_leading_space, part[name]) if kept is not None]
        return {**part, name: inner}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part


def train_retriever_tokenizer(texts: Sequence[str], cfg: RetrieverConfig, directory: str) -> None:
    """Trains a lower-casing WordPiece of at most ``cfg.tokenizer_vocab`` tokens and saves it as a directory.

    Equal texts give an equal tokenizer. The trainer itself numbers word-inner letters (``##a``) in the order of a hash
    map that differs from run to run, and breaks ties by these numbers. So it is handed the letters as reserved tokens
    in a fixed order, and the vocabulary it finds goes into a fresh model where only the real special ones are reserved.
    """
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    specials += [marker for marker in dict.fromkeys((cfg.query_marker, cfg.passage_marker)) if marker not in specials]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(string.punctuation)
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    by_count = sorted((letter for letter in counts if not letter.isspace()), key=lambda x: (-counts[x], x))
    letters = sorted(by_count[: min(_MAX_LETTERS, cfg.tokenizer_vocab // 4)])
    inner = [letter for letter in letters if letter not in string.punctuation]  # punctuation stands alone
    reserved = [*letters, *(f"##{letter}" for letter in inner)]

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    size = cfg.tokenizer_vocab - len(specials)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=reserved, limit_alphabet=0, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    found = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocabulary = {token: number for number, token in enumerate([*specials, *(token for token, _ in found)])}
    engine = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    engine.add_special_tokens(specials)
    engine.normalizer = normalizer
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, engine.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)


def train_generator_tokenizer(
    texts: Sequence[str], vocab_size: int, directory: str, *, lowercase: bool = False
) -> None:
    """Trains a byte-level BPE and saves it as a directory: any text has tokens, and common words are single ones.

    With ``lowercase`` it reads, and so writes, small letters only.

    Raises:
        TokenizerError: if ``vocab_size`` cannot hold the bytes and the special tokens.
    """
    if vocab_size < BYTES + len(_GENERATOR_SPECIALS):
        least = BYTES + len(_GENERATOR_SPECIALS)
        raise TokenizerError(f"generator.tokenizer_vocab={vocab_size} must be at least {least} (bytes, special tokens)")
    engine = Tokenizer(models.BPE())
    if lowercase:
        engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_GENERATOR_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", engine.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=engine, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def retriever_ids(tokenizer: PreTrainedTokenizerFast, cfg: RetrieverConfig) -> RetrieverIds:
    """Ids of the retriever's layout; raises TokenizerError naming the token that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()

    def special(name: str) -> int:
        number = getattr(tokenizer, f"{name}_token_id")
        if number is None:
            raise TokenizerError(f"retriever.tokenizer: {tokenizer.name_or_path} has no {name} token")
        return int(number)

    def marker(name: str) -> int:
        token = getattr(cfg, name)
        if token not in vocabulary:
            raise TokenizerError(
                f"retriever.{name}={token!r} is not a token of {tokenizer.name_or_path}; published ColBERTs use "
                "[unused0] for queries and [unused1] for passages"
            )
        return int(vocabulary[token])

    return RetrieverIds(
        cls=special("cls"),
        sep=special("sep"),
        mask=special("mask"),
        pad=special("pad"),
        query_marker=marker("query_marker"),
        passage_marker=marker("passage_marker"),
        vocab_size=ids_below(tokenizer),
    )


def generator_ids(tokenizer: PreTrainedTokenizerFast) -> GeneratorIds:
    """Ids of the generator's layout; raises TokenizerError if there is no end token."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TokenizerError(f"generator.tokenizer: {tokenizer.name_or_path} has no end token (eos_token)")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return GeneratorIds(bos=int(bos), eos=int(eos), pad=int(pad), vocab_size=ids_below(tokenizer))


def ids_below(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number that every id of the tokenizer is below; more than its tokens where ids are left out."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def punctuation_table(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, skip: bool) -> np.ndarray:
    """``skip_V`` bool: True for tokens that are one ASCII punctuation mark (ColBERT); all False unless ``skip``."""
    skip_V = np.zeros(vocab_size, bool)
    if skip:
        vocabulary = tokenizer.get_vocab()
        skip_V[[vocabulary[mark] for mark in string.punctuation if mark in vocabulary]] = True
    return skip_V
