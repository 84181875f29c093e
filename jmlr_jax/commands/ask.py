"""`jmlr ask`: a question, or one after the other, answered in the terminal beside the passages that made the answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jmlr_jax.answering.asked import NOTICE, VERSION, Answer, Asked, Said
from jmlr_jax.answering.engine import Engine
from jmlr_jax.answering.home import ABOUT, open_home
from jmlr_jax.commands.search import marked
from jmlr_jax.config import Config
from jmlr_jax.errors import JmlrError
from jmlr_jax.parallel.distributed import console

PROMPT = "question (options after |): "
BAR = 12  # characters of an effect's bar


def run_ask(
    cfg: Config,
    question: str | None,
    *,
    arm: str | None = None,
    options: Sequence[str] = (),
    sources: Sequence[str] = (),
    k: int | None = None,
    anyway: bool = False,
    as_json: bool = False,
) -> None:
    """Answers a question; without one, those that are typed or piped in, a line each: ``question | option | option``.

    Args:
      cfg: its run directory is a run, or what ``jmlr export --with-index`` wrote.
      arm: who answers; None for the first there is, jmlr where it was trained.
      options, sources, k: see :class:`jmlr_jax.answering.asked.Asked`.
      anyway: the answer is given also where it is less sure than the threshold that was chosen on dev.
      as_json: a line of JSON for each question instead, with ``error`` for one that cannot be asked.

    Raises:
      JmlrError: no such arm, no index, or a question that cannot be asked so; of questions typed in, the error is told
        and the next one is read.
    """
    if question is not None:  # what is wrong with it is told before models are opened
        Asked(question, tuple(options), k=k)
    engine = Engine(open_home(cfg))
    name = arm or engine.arms[0]
    engine.arm(name)
    show = _print_json if as_json else _print_answer

    def ask(text: str, among: Sequence[str]) -> None:
        show(engine, Asked(text, tuple(among), name, k, tuple(sources)), anyway)

    if question is not None:
        ask(question, options)
        return
    for place, line in _lines():
        text, *among = (part.strip() for part in line.split("|"))
        try:
            ask(text, among or options)
        except JmlrError as error:
            print(f"jmlr: {place}{error}", file=sys.stderr)
            if as_json:
                refused = {"version": VERSION, "question": text, "options": among, "error": {"message": str(error)}}
                print(json.dumps(refused), flush=True)


def _lines() -> Iterator[tuple[str, str]]:
    """Questions as they come: from a prompt with a memory on a terminal, else from standard input, with their lines."""
    if not sys.stdin.isatty():
        yield from ((f"line {number}: ", line) for number, line in enumerate(sys.stdin, 1) if line.strip())
        return
    import readline  # noqa: F401  input() then edits lines and remembers them

    print(f"{NOTICE} Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield "", line


def _print_json(engine: Engine, asked: Asked, anyway: bool) -> None:
    print(json.dumps(engine.answer(asked).to_json(anyway), ensure_ascii=False), flush=True)


def _print_answer(engine: Engine, asked: Asked, anyway: bool) -> None:
    """The answer as it comes, then in full."""
    out = console(out=True)
    if not out.is_terminal:
        out.print(shown(engine.answer(asked), anyway))
        return
    with Live(console=out, transient=True) as live:

        def told(number: int, event: str, data: Any) -> None:
            if event == "written":
                live.update(Text(data, style="italic"), refresh=True)

        answer = engine.answer(asked, told)
    out.print(shown(answer, anyway))


def shown(answer: Answer, anyway: bool) -> Group:
    """An answer as a terminal shows it."""
    parts: list[Any] = [_headline(answer, anyway)]
    if answer.said.choices:
        parts.append(_choices(answer))
    else:
        parts.append(Text(f"without passages: {_named(answer.closed_book)}\n", style="dim"))
    if answer.passages:
        parts.append(Text("Passages, the best last, as they were read", style="bold"))
        for one in reversed(answer.passages):
            line = Text(f"[{one.rank}] {one.score:.3f}  {one.id}  {one.source}  {one.url}".rstrip(), style="dim")
            parts += [line, marked(one), _effects(one.read, one.without, one.alone), Text()]
    else:
        parts.append(Text("No passages were read.", style="dim"))
    parts.append(Text(f"{NOTICE} {answer.seconds:.1f} s, {ABOUT.get(answer.asked.arm, answer.asked.arm)}", style="dim"))
    return Group(*parts)


def _headline(answer: Answer, anyway: bool) -> Text:
    head = Text()
    if answer.abstains and not anyway:
        head.append("No answer: ", style="bold yellow")
        head.append(f"{answer.why}. --answer-anyway shows it.\n")
        return head
    head.append(_named(answer.said), style="bold")
    head.append(f"   {100 * answer.said.probability:.0f}% sure")
    head.append(f", passages changed its log-likelihood by {answer.effect:+.2f}\n")
    if answer.said.letter and answer.written and answer.written != answer.said.text:
        head.append(f"in its own words: {answer.written}\n", style="italic")
    if answer.why:
        head.append(f"{answer.why}\n", style="yellow")
    if answer.shortened:
        head.append("the beginning of the question was too long and was not read\n", style="yellow")
    return head


def _named(said: Said) -> str:
    return f"{said.letter}) {said.text}" if said.letter else said.text or "(nothing)"


def _choices(answer: Answer) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "option", "with passages", "without"):
        table.add_column(name, justify="right" if "with" in name else "left")
    for one, bare in zip(answer.said.choices, answer.closed_book.choices, strict=True):
        shares = (f"{100 * c.probability:.0f}%" for c in (one, bare))
        table.add_row(one.letter, Text(one.text), *shares)
    return table


def _effects(read: bool, without: float | None, alone: float | None) -> Text:
    """How a passage moved the answer, in words and as a bar."""
    if not read or without is None or alone is None:
        return Text("did not fit into the prompt", style="dim")
    bar = "█" * min(BAR, round(4 * abs(without)))
    text = Text(f"the answer {'owes it' if without >= 0 else 'loses by it'} ")
    text.append(f"{abs(without):.2f} ", style="bold")
    text.append(bar, style="green" if without >= 0 else "red")
    return text.append(f"  alone against none: {alone:+.2f}")
