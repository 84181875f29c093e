"""The JSON API, version 1: ``/v1/answer /v1/search /v1/embeddings``, and ``/healthz /metrics /openapi.json``."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jmlr_jax.answering.asked import MAX_QUESTION, Asked
from jmlr_jax.answering.engine import DEPTH, Gone
from jmlr_jax.data.schema import MAX_OPTIONS
from jmlr_jax.errors import JmlrError
from jmlr_jax.serving.desk import Desk, Failed, Full, Late, Loading, Ticket
from jmlr_jax.serving.guard import refusal

MAX_TEXTS = 16
RETRY_SECONDS = "1"
STATUS = {Full: (429, "full"), Loading: (503, "loading"), Late: (504, "timeout"), Failed: (500, "failed")}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AnswerBody(_Body):
    """What ``POST /v1/answer`` takes."""

    question: str = Field(max_length=MAX_QUESTION)
    options: list[str] = Field([], max_length=MAX_OPTIONS, description="2 to 10 to choose among; none: in words")
    arm: str | None = Field(None, max_length=64, description="who answers; null: the first of /healthz")
    k: int | None = Field(None, ge=1, le=1000, description="passages read, at most as many as in training")
    sources: list[str] = Field([], max_length=64, description="passages only from there")
    answer_anyway: bool = Field(False, description="also where the answer is less sure than the threshold of dev")
    stream: bool = Field(False, description="server-sent events: passages, said, written, closed_book, answer")


class SearchBody(_Body):
    """What ``POST /v1/search`` takes."""

    query: str = Field(max_length=MAX_QUESTION)
    arm: str | None = Field(None, max_length=64, description="whose retriever")
    k: int = Field(10, ge=1, le=DEPTH)
    sources: list[str] = Field([], max_length=64)


class EmbeddingsBody(_Body):
    """What ``POST /v1/embeddings`` takes."""

    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS)
    arm: str | None = Field(None, max_length=64, description="whose retriever")


class Api:
    """The endpoints.

    Args:
      desk: answers them.
    """

    def __init__(self, desk: Desk):
        self.desk = desk

    async def answer(self, request: Request) -> Response:
        """``POST /v1/answer``."""
        body = await _parsed(AnswerBody, request)
        if isinstance(body, Response):
            return body
        arm = body.arm or self.desk.engine.arms[0]
        try:
            asked = Asked(body.question, tuple(body.options), arm, body.k, tuple(body.sources))
            ticket = self.desk.submit(asked)
        except JmlrError as error:
            return problem(error)
        if body.stream:
            return StreamingResponse(_events(ticket, body.answer_anyway), media_type="text/event-stream")
        return await self._settled(request, ticket, lambda found: found.to_json(body.answer_anyway))

    async def search(self, request: Request) -> Response:
        """``POST /v1/search``."""
        body = await _parsed(SearchBody, request)
        if isinstance(body, Response):
            return body
        arm = body.arm or self.desk.engine.arms[0]
        try:
            ticket = self.desk.submit(lambda engine: engine.search(body.query, arm, body.k, body.sources))
        except JmlrError as error:
            return problem(error)
        shown = ("rank", "id", "source", "url", "text", "score", "spans")

        def form(found: Any) -> dict[str, Any]:
            passages = [{name: value for name, value in asdict(one).items() if name in shown} for one in found]
            return {"version": 1, "query": body.query, "arm": arm, "passages": passages}

        return await self._settled(request, ticket, form)

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        body = await _parsed(EmbeddingsBody, request)
        if isinstance(body, Response):
            return body
        arm = body.arm or self.desk.engine.arms[0]
        try:
            ticket = self.desk.submit(lambda engine: engine.embeddings(body.texts, arm))
        except JmlrError as error:
            return problem(error)

        def form(found: Any) -> dict[str, Any]:
            vectors = [[[round(float(x), 6) for x in token] for token in text] for text in found]
            return {"version": 1, "arm": arm, "embeddings": vectors}

        return await self._settled(request, ticket, form)

    async def health(self, request: Request) -> Response:
        """``GET /healthz``: 200 once questions can be asked."""
        desk = self.desk
        if desk.fault:
            return JSONResponse({"status": "failed", "why": desk.fault}, status_code=500)
        if not desk.ready:
            said = {"status": "loading", "doing": desk.state, "done": desk.done, "of": desk.of}
            return JSONResponse(said, status_code=503, headers={"retry-after": RETRY_SECONDS})
        return JSONResponse({"status": "ready", "arms": list(desk.engine.arms), "version": 1})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _settled(self, request: Request, ticket: Ticket, form: Any) -> Response:
        """The result in its form."""
        try:
            (found,) = await results(request, [ticket])
            return JSONResponse(form(found))
        except JmlrError as error:
            return problem(error)


async def results(request: Request, tickets: Sequence[Ticket]) -> list[Any]:
    """The results of some tickets; what is computed for a client that leaves is given up.

    Raises:
      JmlrError: the error of one of them; Gone: the client has left.
    """
    work = asyncio.ensure_future(asyncio.gather(*(ticket.result() for ticket in tickets)))
    left = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone("the client has left")
        return list(work.result())
    finally:
        for ticket in tickets:
            ticket.cancel()
        for task in (work, left):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, JmlrError):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parsed(kind: type[Any], request: Request) -> Any:
    """The body of a request as it must be, or the response that says what is wrong with it."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        return refusal(422, "invalid", f"{place}: {first['msg']}")


def problem(error: JmlrError) -> Response:
    """An error of a request as its client gets it."""
    status, code = next((found for kind, found in STATUS.items() if isinstance(error, kind)), (422, "invalid"))
    if isinstance(error, Gone):
        status, code = 499, "left"
    return refusal(status, code, str(error), {"retry-after": RETRY_SECONDS} if status in (429, 503) else None)


async def _events(ticket: Ticket, anyway: bool) -> AsyncIterator[str]:
    """Server-sent events of JSON."""
    try:
        async for event, data in visible(ticket, anyway):
            if event == "result":
                event, data = "answer", data.to_json(anyway)
            yield sent(event, json.dumps(data))
    except JmlrError as error:
        yield sent("error", json.dumps({"message": str(error)}))
    finally:
        ticket.cancel()


async def visible(ticket: Ticket, anyway: bool) -> AsyncIterator[tuple[str, Any]]:
    """The events of an answer; where the reader abstains, neither what it chose nor what it wrote, unless `anyway`."""
    withheld = False
    async for event, data in ticket.events():
        if event == "said" and data["abstains"] and not anyway:
            withheld, data = True, {**data, "said": None}
        if not (withheld and event == "written"):
            yield event, data


def sent(event: str, data: str) -> str:
    """One server-sent event.

    >>> sent("written", "two\\nlines")
    'event: written\\ndata: two\\ndata: lines\\n\\n'
    """
    lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return f"event: {event}\n" + "".join(f"data: {line}\n" for line in lines) + "\n"
