"""The tokenizer inside a GGUF file, from ``tokenizer.ggml.*``: byte-level BPE, or SentencePiece's without a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jmlr_jax.hf.gguf_file import GGUFFile
from jmlr_jax.hf.io import HFError

_ELSEWHERE = "import the model's Hugging Face directory instead"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type
_SPACE = "\u2581"  # as SentencePiece writes it
_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's name -> the format's


def _split(pattern: str) -> list[Any]:
    """Cuts text where the pattern says, then into bytes."""
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# How text is cut before its bytes are merged, by tokenizer.ggml.pre; the models' published tokenizers say the same.
# "default" is not among them: llama.cpp and transformers split it differently, so the file does not say.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALISED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PRE: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],  # which brings GPT-2's pattern
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _split(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_MARKS}"),
    "qwen2": _split(rf"{_LETTERS}|\p{{N}}|{_MARKS}"),
    "tekken": _split(rf"{_CAPITALISED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
# Of these a word that is a token is taken whole, whatever the merges say, and text begins with the begin token unless
# tokenizer.ggml.add_bos_token says otherwise.
_WHOLE_WORDS = ("llama-bpe", "tekken")


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a file: ids, special tokens, how text is split, chat template.

    Raises:
        HFError: it is of another kind, splits text in a way that is not known here, or is incomplete.
    """
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.fields.items()}
    where = f"{file.path}: tokenizer.ggml"
    if said.get("model") == "llama" and not said.get("add_space_prefix", True):
        return _finished(_sentencepiece(said, where), said, file, where, begins=True)
    if said.get("model") != "gpt2":
        raise HFError(
            f"{where}.model is {said.get('model')!r}; read here is 'gpt2', which is byte-level BPE, and 'llama', which "
            f"is SentencePiece's, with add_space_prefix false: {_ELSEWHERE}"
        )
    pre = _SAME.get(str(said.get("pre")), str(said.get("pre")))
    if pre not in _PRE:
        stated = f"is {pre!r}" if "pre" in said else "is missing"
        known = ", ".join(sorted({*_PRE, *_SAME}))
        raise HFError(f"{where}.pre {stated}, so how text is split is not known; known are {known}: {_ELSEWHERE}")
    return _finished(_engine(said, pre, where), said, file, where, begins=pre in _WHOLE_WORDS)


def _finished(
    engine: Tokenizer, said: Mapping[str, Any], file: GGUFFile, where: str, *, begins: bool
) -> PreTrainedTokenizerFast:
    """The tokenizer around its engine: special tokens by their names, those that text begins and ends with, template.

    Args:
        begins: whether text begins with the begin token where the file does not say.
    """
    tokens, ids = said["tokens"], special_ids(file)
    named = {f"{name}_token": tokens[ids[f"{name}_token_id"]] for name in _SPECIALS if f"{name}_token_id" in ids}
    ends = {"bos": said.get("add_bos_token", begins), "eos": said.get("add_eos_token", False)}
    if lost := [name for name, added in ends.items() if added and f"{name}_token" not in named]:
        raise HFError(f"{where}.{lost[0]}_token_id is missing, and the token is to be added; convert the model again")
    first, last = ([named[f"{name}_token"]] if added else [] for name, added in ends.items())
    if first or last:
        engine.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=[(token, tokens.index(token)) for token in {*first, *last}],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, **named)
    tokenizer.chat_template = file.fields.get("tokenizer.chat_template")
    return tokenizer


def special_ids(file: GGUFFile) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id``, ``unk_token_id`` and ``pad_token_id``, as far as the file has them.

    Raises:
        HFError: one is no id of its tokenizer.
    """
    size, ids = len(file.fields.get("tokenizer.ggml.tokens", ())), {}
    for name, theirs in _SPECIALS.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        number = file.fields.get(key)
        if number is None:
            continue
        if not 0 <= number < size:
            raise HFError(f"{file.path}: {key} is {number}, of {size} tokens; convert the model again")
        ids[f"{name}_token_id"] = int(number)
    return ids


def _sentencepiece(said: Mapping[str, Any], where: str) -> Tokenizer:
    """BPE over characters, spaces written as ``\u2581``, what it has no token for as bytes.

    A file has no merges, only a score for every token: of all neighbours that a token joins, those with the highest
    score are joined first.
    """
    tokens, kinds = _tokens(said, ("tokens", "scores", "token_type"), where)
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise HFError(f"{where}.tokens holds a token twice; convert the model again")
    joined = [
        (-said["scores"][number], ids[token[:at]], ids[token[at:]])
        for number, token in enumerate(tokens)
        if kinds[number] == _NORMAL
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(joined)]
    unknown = said.get("unknown_token_id")
    name = None if unknown is None else tokens[unknown]
    engine = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token=name, fuse_unk=True))
    engine.normalizer = normalizers.Replace(" ", _SPACE)
    engine.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_tokens(_added(tokens, kinds))
    return engine


def _tokens(said: Mapping[str, Any], needed: tuple[str, ...], where: str) -> tuple[list[str], list[int]]:
    """Tokens and their types; HFError if a field that is needed is missing or has another length."""
    missing = [f"{where}.{key} is missing" for key in needed if key not in said]
    if missing:
        raise HFError("\n".join(f"{fault}: {_ELSEWHERE}" for fault in missing))
    tokens, kinds = said["tokens"], said["token_type"]
    for key in ("token_type", "scores"):
        if key in needed and len(said[key]) != len(tokens):
            raise HFError(f"{where}.{key} has {len(said[key])} entries, tokens {len(tokens)}; convert the model again")
    return tokens, kinds


def _added(tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    """Tokens that are taken out of a text before all else."""
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _engine(said: Mapping[str, Any], pre: str, where: str) -> Tokenizer:
    """Vocabulary, merges and splitting; special tokens are known as such."""
    tokens, kinds = _tokens(said, ("tokens", "merges", "token_type"), where)
    # Unused rows, which only fill up the embedding, are no tokens.
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != _UNUSED}
    if len(vocabulary) < len(tokens) - kinds.count(_UNUSED):
        raise HFError(f"{where}.tokens holds a token twice; convert the model again")
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    lost = next((m for m in merges if len(m) != 2 or any(x not in vocabulary for x in (*m, "".join(m)))), None)
    if lost is not None:
        raise HFError(f"{where}.merges joins {' and '.join(map(repr, lost))}, of which one is no token; {_ELSEWHERE}")
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(_PRE[pre])
    engine.decoder = decoders.ByteLevel()
    engine.add_tokens(_added(tokens, kinds))
    return engine
