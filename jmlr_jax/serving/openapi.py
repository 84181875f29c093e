"""The OpenAPI description of the JSON API, from the very models that read its requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jmlr_jax.answering.asked import NOTICE, VERSION
from jmlr_jax.serving.api import AnswerBody, EmbeddingsBody, SearchBody

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
_NUMBER, _TEXT, _WHOLE, _FLAG = ({"type": name} for name in ("number", "string", "integer", "boolean"))


def _record(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields), "properties": fields}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _maybe(of: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [of, {"type": "null"}]}


_SPAN = _record(start=_WHOLE, end=_WHOLE, weight=_NUMBER)
_FOUND = {"rank": _WHOLE, "id": _TEXT, "source": _TEXT, "url": _TEXT, "text": _TEXT, "score": _NUMBER}
_PASSAGE = _record(**_FOUND, spans=_list(_SPAN))
_SOURCE = _record(**_FOUND, spans=_list(_SPAN), read=_FLAG, without=_maybe(_NUMBER), alone=_maybe(_NUMBER))
_CHOICE = _record(letter=_TEXT, text=_TEXT, nll=_NUMBER, probability=_NUMBER)
_SAID = _record(text=_TEXT, letter=_TEXT, nll=_NUMBER, probability=_NUMBER, choices=_list(_CHOICE))
_ANSWER = _record(
    version=_WHOLE,
    notice=_TEXT,
    question=_TEXT,
    options=_list(_TEXT),
    arm=_TEXT,
    k=_maybe(_WHOLE),
    sources=_list(_TEXT),
    said=_maybe(_SAID),
    choices=_list(_CHOICE),
    closed_book=_SAID,
    written=_TEXT,
    nll_none=_NUMBER,
    effect=_NUMBER,
    passages=_list(_SOURCE),
    calibrated=_FLAG,
    threshold=_maybe(_NUMBER),
    abstains=_FLAG,
    why=_TEXT,
    shortened=_FLAG,
    seconds=_NUMBER,
)
RESULTS = {
    "Answer": _ANSWER,
    "Passages": _record(version=_WHOLE, query=_TEXT, arm=_TEXT, passages=_list(_PASSAGE)),
    "Embeddings": _record(version=_WHOLE, arm=_TEXT, embeddings=_list(_list(_list(_NUMBER)))),
    "Error": _ERROR,
}
_STATUSES = {
    "413": "the body is too large",
    "415": "the body is not JSON",
    "422": "a field is wrong; the message names it",
    "429": "too many requests wait; Retry-After says when to ask again",
    "503": "the models are being loaded",
    "504": "it took too long",
}


def description(version: str, token: bool) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
      version: of the package.
      token: whether clients need one.
    """
    paths = {
        "/v1/answer": _post("An answer beside its sources.", AnswerBody, "Answer", stream=True),
        "/v1/search": _post("The best passages.", SearchBody, "Passages"),
        "/v1/embeddings": _post("Token vectors of questions.", EmbeddingsBody, "Embeddings"),
        "/healthz": _get("Whether questions can be asked; names of the arms.", "application/json"),
        "/metrics": _get("Counters, as Prometheus reads them.", "text/plain"),
    }
    bodies = {kind.__name__: kind.model_json_schema() for kind in (AnswerBody, SearchBody, EmbeddingsBody)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jmlr serve", "version": f"{VERSION} ({version})", "description": NOTICE},
        "paths": paths,
        "components": {"schemas": bodies | RESULTS},
    }
    if token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def _post(summary: str, body: type[BaseModel], result: str, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{result}"}}}
    if stream:
        content["text/event-stream"] = {"schema": _TEXT}
    failed = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    wanted = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": wanted},
            "responses": {
                "200": {"description": summary, "content": content},
                **{status: {"description": why, **failed} for status, why in _STATUSES.items()},
            },
        }
    }


def _get(summary: str, kind: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": summary, "content": {kind: {}}}}}}
