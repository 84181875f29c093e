"""Chat templates: what an instruct model expects around a prompt, and what ends its answers.

A template is rendered once around a mark. What stands before the mark begins every prompt, what follows it ends the
question, and the token after an assistant's words ends the answer; the passages, the question and the answer between
them are tokenised as ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config_models import GeneratorConfig
from jmlr_jax.data.tokenizers import GeneratorIds, TokenizerError
from jmlr_jax.files import any_path
from jmlr_jax.parallel.distributed import console

_MARK = "@@jmlr@@"
GENERATION = "generation_config.json"


def layout(ids: GeneratorIds, tokenizer: PreTrainedTokenizerFast, cfg: GeneratorConfig) -> GeneratorIds:
    """The ids with what generation stops at and, with ``generator.chat``, the template's pieces.

    A tokenizer with a template that is not used is told in one line.

    Raises:
        TokenizerError: no template, one that does not show the user's words as they are, or no token after an answer.
    """
    stops = _stop_ids(cfg.source)
    if not cfg.chat:
        if tokenizer.chat_template is not None:
            console().print("generator: the tokenizer has a chat template; generator.chat=true would prompt through it")
        return replace(ids, stops=_beside(ids.eos, stops))
    head, tail = _split(_rendered(tokenizer, cfg.system, None))
    after = _split(_rendered(tokenizer, cfg.system, _MARK + _MARK), _MARK + _MARK)[1]
    pieces = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in (head, tail, after)]
    special = set(tokenizer.added_tokens_decoder)
    if not pieces[2] or pieces[2][0] not in special:
        raise TokenizerError(
            f"generator.chat: after an answer the template writes {after!r}, which begins with no special token, so "
            "nothing would end an answer; set generator.chat=false"
        )
    least = len(pieces[0]) + cfg.passage_length + cfg.question_length + cfg.answer_length
    if least > cfg.max_length:
        raise TokenizerError(
            f"generator.max_length={cfg.max_length} cannot hold the opening of the chat template ({len(pieces[0])} "
            f"tokens), a passage, the question and its answer; set it to {least} or more"
        )
    end = pieces[2][0]
    return replace(ids, eos=end, head=pieces[0], tail=pieces[1], stops=_beside(end, [*stops, ids.eos]))


def _rendered(tokenizer: PreTrainedTokenizerFast, system: str | None, answer: str | None) -> str:
    """The text of a conversation: the mark as the user's words and, if given, an answer."""
    if tokenizer.chat_template is None:
        raise TokenizerError("generator.chat: the tokenizer has no chat template; set generator.chat=false")
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": _MARK}]
    turns += [{"role": "assistant", "content": answer}] if answer is not None else []
    asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer is None, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(turns, **asked))
    except (TemplateError, ValueError, TypeError) as error:
        raise TokenizerError(f"generator.chat: the tokenizer's template refuses the prompt ({error})") from error


def _split(text: str, mark: str = _MARK) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise TokenizerError("generator.chat: the tokenizer's template does not show what it is given once, as it is")
    before, _, after = text.partition(mark)
    return before, after


def _stop_ids(source: str) -> list[int]:
    """``eos_token_id`` of a checkpoint's generation_config.json."""
    if source == "scratch" or not (file := any_path(source) / GENERATION).exists():
        return []
    try:
        said = json.loads(file.read_text()).get("eos_token_id")
        return [] if said is None else [int(x) for x in (said if isinstance(said, list) else [said])]
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{file}: eos_token_id cannot be read ({error}); download it again, or remove it"
        ) from None


def _beside(end: int, more: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(number for number in more if number != end))
