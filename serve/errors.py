"""Every way a request can fail, as the OpenAI error object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from llmlite.serve.engines.base import NoRoom
from llmlite.serve.inbox import ClientGone
from llmlite.serve.scheduler import EngineDead, QueueFull, ShuttingDown, TooLate
from llmlite.serve.schema import BRANCHES
from llmlite.serve.structured.matcher import GrammarTooHard

UNION_BRANCHES = (*BRANCHES, "<message>", "<function_call>", "<function_call_output>")

log = logging.getLogger("llmlite.serve")

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

ANTHROPIC_PATH = "/v1/messages"
"""Where errors have Anthropic's shape."""

ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What the client is told: an HTTP status, a sentence, the field it is about and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        return {"error": {"message": _printable(self.message), "type": kind, "param": param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """As whoever asks at ``path`` expects it."""
        told = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
        return JSONResponse(anthropic_body(self) if told else self.body(), self.status, self.headers)


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object, which has no room for the field and the code."""
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.body()["error"]["message"]}}


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of an error that came from the scheduler or the engine."""
    match error:
        case ApiError():
            return error
        case QueueFull(retry_after=seconds):
            message = f"too many requests are waiting; try again in {seconds} s"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
        case EngineDead():
            message = "the engine has stopped and is being opened again"
            return ApiError(503, message, code="engine_dead", headers={"Retry-After": "2"})
        case ShuttingDown():
            return ApiError(503, "the server is shutting down", code="shutting_down")
        case NoRoom():
            return ApiError(503, f"this request could not be finished: {error}", code="no_room")
        case TooLate(seconds=seconds):
            return ApiError(504, f"the request took longer than the {seconds:g} s it had", code="timeout")
        case GrammarTooHard():
            return ApiError(400, f"the grammar could not be followed to its end: {error}", code="grammar_too_hard")
        case ClientGone():
            return ApiError(499, "the client hung up")
        case _:
            return ApiError(500, "an internal error ended this request; the server's log has it", code="internal_error")


def install(app: FastAPI) -> None:
    """Have every failure of ``app`` answered with an error object."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _first_problem(error).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"there is no {request.url.path} on this server",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
        return ApiError(error.status_code, message, headers=headers).response(request.url.path)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)


def _methods(request: Request) -> str:
    """What a path takes: the router itself names those of its first route alone."""
    routes, scope = request.app.routes, request.scope
    taken = [m for m in METHODS if any(r.matches({**scope, "method": m})[0] == Match.FULL for r in routes)]
    return ", ".join(taken)


def _first_problem(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][1]}")
    if problem["loc"] == ("body",) and "param" not in problem.get("ctx", {}):
        what = "has a field name that is no text" if problem["type"] == "string_unicode" else "must be a JSON object"
        return ApiError(400, f"the body {what}")
    return wrong_field(problem, problem["loc"][1:])


def wrong_field(
    problem: Mapping[str, Any], place: tuple[str | int, ...], named: Callable[[str], str] = str
) -> ApiError:
    """A problem that pydantic found at ``place`` of a body, as a refusal; ``named``: what the client calls a field."""
    context = problem.get("ctx", {})
    param = named(context.get("param") or _field_path((*place, *context.get("field", "").split("."))))
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: this server does not know this field", param, "unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"{param}: is required", param, "missing_required_parameter")
    if problem["type"] == "unsupported":
        return ApiError(400, f"{param}: {problem['msg']}", param, "unsupported_parameter")
    return ApiError(400, f"{param}: {_lower(problem['msg'])}", param, "invalid_value")


def _field_path(loc: tuple[str | int, ...]) -> str:
    """As in messages.0.content, without the branches of unions, which pydantic puts in."""
    return ".".join(str(part) for part in loc if part != "" and part not in UNION_BRANCHES)


def _printable(text: str) -> str:
    """A client's own words may hold half a surrogate pair, which no response can carry."""
    return text.encode("utf-8", "replace").decode()


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
