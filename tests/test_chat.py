"""Chat templates: a prompt from pieces is what the template renders, answers end as turns do, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config_models import GeneratorConfig, RetrieverConfig
from jmlr_jax.data.chat import layout
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import Question
from jmlr_jax.data.tokenise import tokenise_questions
from jmlr_jax.data.tokenizers import TokenizerError, encoder, generator_ids, load_tokenizer, train_generator_tokenizer
from jmlr_jax.method.prompt import read_prompt, reading_width

WORDS = "Reference: My Question: the kidney hardens. What helps? drug liver You are a careful doctor user model Answer"
# As Gemma 3's (a system text joins the user's turn), Llama 3's and Qwen 3's (which answers after empty thoughts).
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT = GeneratorConfig(
    chat=True, passage_template="Reference: {title}. {text}\n\n", question_template="My Question: {question} {options}",
    answer_template="{answer}", question_length=90, passage_length=80, answer_length=20, max_length=400,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the specials of a template."""
    place = tmp_path_factory.mktemp("chat")
    train_generator_tokenizer([WORDS], 300, str(place))
    tokenizer = load_tokenizer(str(place))
    tokenizer.add_tokens(["<turn>", "<end>"], special_tokens=True)
    tokenizer.save_pretrained(place)
    return place


def with_template(folder: Path, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", [None, "You are a careful doctor."])
@pytest.mark.parametrize("template", [GEMMA, QWEN], ids=["gemma", "qwen"])
def test_the_pieces_are_the_rendered_conversation(folder: Path, template: str, system: str | None) -> None:
    """Token by token, answer and its end included."""
    tokenizer, cfg = with_template(folder, template), CHAT.model_copy(update={"system": system})
    ids = layout(generator_ids(tokenizer), tokenizer, cfg)
    engine, prompts = encoder(tokenizer, continues=True), Prompts(RetrieverConfig(), cfg)
    question = Question(
        id="q", question="What helps? The liver hardens.", options=("drug", "liver"), answer="drug", answer_index=0
    )
    asked, _, misfits = tokenise_questions(engine, prompts, [question], ids.tail)
    assert not misfits
    passage = "Reference: kidney. the kidney hardens.\n\n"
    piece = engine.encode(passage, add_special_tokens=False).ids
    answer = [*engine.encode("drug", add_special_tokens=False).ids, ids.eos]
    question_ids, length = asked.padded(np.array([0]), cfg.question_length, ids.pad)
    batch = {
        "reader_ids_BxKxL": jnp.array([[piece, piece]]),
        "reader_len_BxK": jnp.array([[len(piece), len(piece)]]),
        "question_ids_BxS": jnp.asarray(question_ids),
        "question_len_B": jnp.asarray(length),
    }
    total = reading_width(batch, cfg.max_length, len(answer), ids.begin)
    assert total == len(ids.head) + 2 * len(piece) + cfg.question_length + len(answer)
    said = jnp.array([answer]), jnp.array([len(answer)])
    tokens, n, _ = read_prompt(batch, total=total, bos_id=ids.begin, pad_id=ids.pad, answer=said)
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": passage * 2 + prompts.question(question.question, question.options)}]
    asked_text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    wanted = tokenizer(asked_text + "drug<end>", add_special_tokens=False).input_ids
    assert tokens[0, : int(n[0])].tolist() == wanted
    assert tokenizer.convert_ids_to_tokens(ids.eos) == "<end>" and ids.stops == (tokenizer.eos_token_id,)
    fits, _, too_long = tokenise_questions(engine, prompts, [question], (*ids.tail, *[5] * 80))
    assert [misfit.limit for misfit in too_long] == [cfg.question_length], "the template's turn has room of its own"


def test_stop_ids_come_from_the_checkpoint(folder: Path) -> None:
    tokenizer = with_template(folder, GEMMA)
    file, end = folder / "generation_config.json", tokenizer.convert_tokens_to_ids("<end>")
    plain = GeneratorConfig(source=str(folder))
    assert layout(generator_ids(tokenizer), tokenizer, plain).stops == ()
    for said, wanted in ((end, (end,)), ([2, end], (end,)), (2, ())):
        file.write_text(json.dumps({"eos_token_id": said}))
        found = layout(generator_ids(tokenizer), tokenizer, plain)
        assert (found.eos, found.stops, found.begin) == (2, wanted, 1)
    file.unlink()


def test_a_template_that_is_not_used_is_told(folder: Path, capsys: Any) -> None:
    for template, told in ((GEMMA, True), (None, False)):
        tokenizer = with_template(folder, template)
        layout(generator_ids(tokenizer), tokenizer, GeneratorConfig())
        assert ("generator.chat=true would prompt through it" in capsys.readouterr().err) == told


REFUSED = {
    "has no chat template": (None, {}),
    "refuses the prompt": ("{{ raise_exception('no system turn') }}", {}),
    "does not show what it is given": ("{{ messages[0]['content'] | upper }}", {}),
    "begins with no special token": (QWEN.replace("<end>", "."), {}),
    "generator.max_length=200 cannot hold the opening": (GEMMA, {"max_length": 192 + 8}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(folder: Path, message: str) -> None:
    template, more = REFUSED[message]
    tokenizer = with_template(folder, template)
    with pytest.raises(TokenizerError, match=message):
        cfg = CHAT.model_copy(update={"system": "You are a careful doctor. " * 3, **more})
        layout(generator_ids(tokenizer), tokenizer, cfg)


def test_a_system_text_needs_a_template() -> None:
    with pytest.raises(ValueError, match="set chat=true"):
        GeneratorConfig(system="You are a careful doctor.")
