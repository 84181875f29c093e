"""The web pages: a question and its answer under one address, the same with and without JavaScript."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlencode, urlsplit

import jinja2
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from jmlr_jax.answering.asked import MAX_QUESTION, NOTICE, Answer, Asked
from jmlr_jax.answering.home import ABOUT, Arm
from jmlr_jax.errors import JmlrError
from jmlr_jax.serving.api import problem, results, sent, visible
from jmlr_jax.serving.desk import Desk, Ticket

HEATS = 4  # shades of matched words
REFRESH = 2  # seconds until a page that waits for the models asks again


@dataclass(frozen=True)
class Form:
    """What the form holds."""

    q: str = ""
    options: tuple[str, ...] = ()
    arm: str = ""
    beside: str = ""
    sources: tuple[str, ...] = ()
    k: int | None = None
    anyway: bool = False

    @classmethod
    def of(cls, params: QueryParams) -> Form:
        """From an address; what is not a number where one belongs is left out."""
        options = tuple(line.strip() for line in params.get("options", "").splitlines() if line.strip())
        k = params.get("k", "")
        number = int(k) if k.isascii() and k.isdecimal() and len(k) < 6 else None
        q, arm, beside = (params.get(name, "").strip() for name in ("q", "arm", "beside"))
        return cls(q, options, arm, beside, tuple(params.getlist("source")), number, params.get("anyway") == "1")

    def link(self, path: str = "/ask", **changed: Any) -> str:
        """The address under which the same is asked."""
        found = {**vars(self), **changed}
        pairs = [("q", found["q"]), ("options", "\n".join(found["options"])), ("arm", found["arm"])]
        pairs += [("beside", found["beside"])] + [("source", source) for source in found["sources"]]
        pairs += [("k", str(found["k"] or "")), ("anyway", "1" if found["anyway"] else "")]
        return f"{path}?{urlencode([(name, value) for name, value in pairs if value])}"

    @property
    def arms(self) -> tuple[str, ...]:
        """Who is asked, one or two."""
        return (self.arm, self.beside) if self.beside and self.beside != self.arm else (self.arm,)

    def asked(self, arm: str) -> Asked:
        """The question to one of them; AskError where it cannot be asked so."""
        return Asked(self.q, self.options, arm, self.k, self.sources)


class Pages:
    """The pages.

    Args:
      desk: answers what they ask.
    """

    def __init__(self, desk: Desk):
        self.desk = desk
        self._made = jinja2.Environment(
            loader=jinja2.PackageLoader("jmlr_jax.serving"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
        )
        self._made.filters |= {
            "about": lambda arm: ABOUT.get(arm, arm),
            "signed": signed,
            "pieces": pieces,
            "web": web,
            "largest": largest,
        }
        self._made.globals |= {"notice": NOTICE, "refresh": None, "page": "", "loading": None, "fault": ""}
        self._made.globals["columns"] = []
        self._made.globals |= vars(self._made.get_template("macros.html").module)

    async def home(self, request: Request) -> Response:
        """``/``: the form, and questions to try."""
        waits = not self.desk.ready and not self.desk.fault
        return self._page("ask.html", Form(), page="ask", loading=self.desk if waits else None, fault=self.desk.fault)

    async def ask(self, request: Request) -> Response:
        """``/ask?q=...``: a question and its answer; the answer alone, as it comes, where htmx asks for it."""
        form = Form.of(request.query_params)
        form = form if form.arm else Form(**{**vars(form), "arm": self.desk.engine.arms[0]})
        part = "hx-request" in request.headers and "hx-history-restore-request" not in request.headers
        show = partial(self._page, "result.html" if part else "ask.html", form, page="ask")
        if not form.q:
            return RedirectResponse("/", status_code=303) if not part else show(fault="question: is empty", status=422)
        if not self.desk.ready and not self.desk.fault:
            # The whole page waits; a part of it could not ask again by itself.
            return Response(headers={"hx-redirect": form.link()}) if part else show(loading=self.desk, status=503)
        tickets: list[Ticket] = []
        try:
            asked = [form.asked(arm) for arm in form.arms]
            if part:
                return show(
                    columns=[{"arm": one.arm, "answer": None, "stream": self._stream(form, one)} for one in asked]
                )
            tickets = [self.desk.submit(one) for one in asked]
            found = await results(request, tickets)
        except JmlrError as error:
            return show(fault=str(error), status=problem(error).status_code)
        finally:
            for ticket in tickets:
                ticket.cancel()
        return show(columns=[self._column(form, place, one) for place, one in enumerate(found)])

    async def stream(self, request: Request) -> Response:
        """``/ask/stream``: one arm's answer as it comes, in pieces of the page."""
        form = Form.of(request.query_params)
        place = 1 if request.query_params.get("place") == "1" else 0
        try:
            ticket = self.desk.submit(form.asked(form.arm or self.desk.engine.arms[0]))
        except JmlrError as error:
            said = self._template("result.html", fault=str(error))
            return StreamingResponse(iter([sent("answer", said), sent("close", "")]), media_type="text/event-stream")
        return StreamingResponse(self._events(form, place, ticket), media_type="text/event-stream")

    async def corpus(self, request: Request) -> Response:
        """``/corpus``: passages, indexes, models, and how sure each arm is."""
        desk = self.desk
        counts = Counter(desk.engine.sources_N.tolist()).most_common()
        arms = [{"name": name, "facts": facts(desk.engine.arm(name))} for name in desk.engine.arms if desk.ready]
        text = self._template(
            "corpus.html",
            page="corpus",
            passages=len(desk.engine.sources_N),
            most=desk.engine.most,
            sources=counts[:100],
            arms=arms,
            loading=None if desk.ready else desk,
        )
        return HTMLResponse(text)

    def entrance(self, wrong: bool) -> Response:
        """Where a browser gives the token."""
        return HTMLResponse(self._template("enter.html", wrong=wrong), status_code=401)

    def missing(self, title: str, why: str, status: int) -> Response:
        """A page that says what is not there."""
        return HTMLResponse(self._template("missing.html", title=title, why=why), status_code=status)

    def _template(self, name: str, **values: Any) -> str:
        return self._made.get_template(name).render(**values)

    def _page(self, name: str, form: Form, status: int = 200, **values: Any) -> Response:
        engine = self.desk.engine
        waits = values.get("loading") is not None
        text = self._template(
            name,
            form=form,
            arms=engine.arms,
            most=engine.most,
            limit=MAX_QUESTION,
            sources=sorted(set(engine.sources_N.tolist())),
            examples=self._examples() if not form.q else [],
            refresh=REFRESH if waits else None,
            **values,
        )
        headers = {"vary": "HX-Request"} | ({"retry-after": str(REFRESH)} if waits or status == 429 else {})
        return HTMLResponse(text, status_code=status, headers=headers)

    def _examples(self) -> list[dict[str, Any]]:
        arm = self.desk.engine.arms[0]
        return [
            {"question": q.question, "options": q.options, "link": Form(q.question, tuple(q.options), arm).link()}
            for q in self.desk.engine.home.examples()
        ]

    def _stream(self, form: Form, asked: Asked) -> str:
        place = form.arms.index(asked.arm)
        return form.link("/ask/stream", arm=asked.arm, beside="") + f"&place={place}"

    def _column(self, form: Form, place: int, answer: Answer) -> dict[str, Any]:
        """An answer as the page shows it; `place` tells its passages from those of the one beside it."""
        found = answer.to_json(form.anyway)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        return {"name": f"a{place}", "arm": answer.asked.arm, "answer": found, "json": text, "link": form.link()}

    async def _events(self, form: Form, place: int, ticket: Ticket) -> AsyncIterator[str]:
        column: dict[str, Any] = {"name": f"a{place}"}
        passages: Sequence[Any] = ()
        try:
            async for event, data in visible(ticket, form.anyway):
                if event == "passages":
                    passages = data
                    shown = self._template("passages.html", passages=data, effects=False, column=column)
                    yield sent(event, shown)
                elif event == "said":
                    a = {
                        "passages": [{**one, "read": True} for one in passages],
                        "written": "",
                        "calibrated": False,
                        **data,
                    }
                    yield sent(event, self._template("said.html", a=a, column=column))
                elif event == "written":
                    yield sent(event, self._template("written.html", text=data))
                elif event == "result":
                    whole = self._column(form, place, data)
                    yield sent("answer", self._template("answer.html", column=whole))
        except JmlrError as error:
            yield sent("answer", self._template("result.html", fault=str(error)))
        finally:
            ticket.cancel()
        yield sent("close", "")


def signed(x: float) -> str:
    """A number with its sign, the minus a true one.

    >>> signed(0.5), signed(-0.25) == "\N{MINUS SIGN}0.25", signed(-0.001)
    ('+0.50', True, '0.00')
    """
    return "0.00" if abs(x) < 0.005 else f"{x:+.2f}".replace("-", "\N{MINUS SIGN}")


def largest(passages: Sequence[Mapping[str, Any]]) -> float:
    """The effect that fills a bar: the largest of these, but no less than a tenth, so that chance looks like little."""
    return max([0.1, *(abs(one["without"]) for one in passages if one["without"] is not None)])


def web(url: str) -> bool:
    """Whether an address from the corpus may become a link: not what a browser would run."""
    try:
        return urlsplit(url.strip()).scheme in ("http", "https")
    except ValueError:
        return False


def pieces(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A passage's text cut at its marked words: ``text`` and ``heat``, 0 where nothing is marked, else 1 to 4.

    >>> spans = [{"start": 2, "end": 6, "weight": 0.5}, {"start": 7, "end": 9, "weight": 1.0}]
    >>> [(p["text"], p["heat"]) for p in pieces({"text": "a drug is", "spans": spans})]
    [('a ', 0), ('drug', 2), (' ', 0), ('is', 4)]
    """
    text, at, found = source["text"], 0, []
    most = max((span["weight"] for span in source["spans"]), default=1.0)
    for span in source["spans"]:
        start = max(span["start"], at)
        if start > at:
            found.append({"text": text[at:start], "heat": 0})
        if span["end"] > start:
            heat = max(1, min(HEATS, round(HEATS * span["weight"] / most)))
            found.append({"text": text[start : span["end"]], "heat": heat})
            at = span["end"]
    return found + ([{"text": text[at:], "heat": 0}] if at < len(text) else [])


def facts(arm: Arm) -> list[tuple[str, str]]:
    """What a page says of an arm."""
    llama, trust = arm.reader.cfg, arm.trust
    found = [("Reader", f"{llama.num_layers} layers, width {llama.hidden_size}, {llama.vocab_size:,} tokens")]
    if arm.searcher is not None:
        bert, index = arm.searcher.corpus.retriever, arm.searcher.index.held[0][1]
        found.append(("Retriever", f"{bert.bert.num_layers} layers, vectors of {bert.dim}"))
        recall = ", ".join(f"ANN recall@{k} {r:.3f}" for k, r in index.card.ann_recall.items())
        found.append(("Index", f"{index.card.kind}, {len(index):,} passages" + (f", {recall}" if recall else "")))
    found.append(("Passages", "BM25" if arm.lexical else "its retriever's" if arm.searcher else "none"))
    if trust.uncalibrated:
        return [*found, ("How sure", trust.uncalibrated)]
    least = "never sure enough" if trust.least is None else f"answers from {100 * trust.least:.0f}% on"
    said = f"{least}, to keep errors within {100 * trust.max_risk:.0f}%; temperature {trust.temperature:.2f}"
    return [*found, ("How sure", f"{said}; {trust.questions} dev questions")]
