"""Templates of the configuration, checked and filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from jmlr_jax.config import Config
from jmlr_jax.config_models import GeneratorConfig, RetrieverConfig
from jmlr_jax.data.schema import LETTERS, Passage, Question
from jmlr_jax.errors import JmlrError

_FIELDS = {
    "retriever.query_template": ("question", "last_sentence", "options"),
    "retriever.passage_template": ("title", "text"),
    "generator.passage_template": ("title", "text"),
    "generator.question_template": ("question", "options"),
    "generator.option_template": ("letter", "option"),
    "generator.answer_template": ("answer",),
}


class TemplateError(JmlrError, ValueError):
    """A template of the configuration that cannot be filled in."""


def check_templates(cfg: Config) -> None:
    """Raises TemplateError if a template names a field it may not, or is malformed."""
    for key in _FIELDS:
        section, name = key.split(".")
        check_template(key, getattr(getattr(cfg, section), name))


def check_template(key: str, template: str) -> None:
    """Checks one template of the configuration, ``key`` being its dotted name; raises TemplateError."""
    allowed = ", ".join(f"{{{name}}}" for name in _FIELDS[key])
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise TemplateError(f"{key}: {error} in {template!r}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in _FIELDS[key]:
            raise TemplateError(f"{key}: unknown field {{{name}}} in {template!r}; it may use {allowed}")
        if spec or conversion:
            raise TemplateError(f"{key}: {{{name}}} takes no format or conversion in {template!r}")


def last_sentence(text: str) -> str:
    """The last sentence of a text, where exam questions ask what their case report leads up to.

    >>> last_sentence("A man of 54 has 2.5 mg/dL. His foot hurts! What helps?"), last_sentence("Which drug")
    ('What helps?', 'Which drug')
    """
    parts = re.split(r"(?<=[.?!])\s+|(?<=[\u3002\uff1f\uff01])", text.strip())
    return next((part for part in reversed(parts) if part), text)


@dataclass(frozen=True)
class Prompts:
    """Renders the pieces of a checked configuration; braces in questions and passages are plain text."""

    retriever: RetrieverConfig
    generator: GeneratorConfig

    def query(self, question: Question) -> str:
        """What the retriever (and BM25) is asked; ``{options}`` are the options joined by spaces."""
        return self.asked(question.question, question.options)

    def asked(self, text: str, options: Sequence[str] = ()) -> str:
        """The same, from a question's text and options alone."""
        fields = {"question": text, "last_sentence": last_sentence(text), "options": " ".join(options)}
        return self.retriever.query_template.format(**fields)

    def retrieved(self, passage: Passage) -> str:
        """What the retriever (and BM25) indexes."""
        return self.retriever.passage_template.format(title=passage.title, text=passage.text).strip()

    def reference(self, passage: Passage) -> str:
        """A passage as the generator reads it."""
        return self.generator.passage_template.format(title=passage.title, text=passage.text)

    def options(self, options: Sequence[str]) -> str:
        """The list of options, lettered and joined by spaces."""
        template = self.generator.option_template
        return " ".join(template.format(letter=LETTERS[i], option=option) for i, option in enumerate(options))

    def question(self, question: str, options: Sequence[str]) -> str:
        """The question as the generator reads it."""
        return self.generator.question_template.format(question=question, options=self.options(options))

    def answer(self, question: Question, option: int | None = None) -> str:
        """The right answer as the generator writes it, or that of another ``option``; a letter if so configured."""
        index = question.answer_index if option is None else option
        if not question.options:
            said = question.answer
        elif self.generator.answer_form == "letter":
            said = LETTERS[index]
        else:
            said = question.options[index]
        return self.generator.answer_template.format(answer=said)
