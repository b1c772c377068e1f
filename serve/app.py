"""The HTTP side: requests in, work to the scheduler, answers out as OpenAI's objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import llmlite
from llmlite.serve import errors
from llmlite.serve.answers import Answer, ChatAnswer, CompletionAnswer, stream, whole
from llmlite.serve.engines.base import ChatTemplateError, Engine
from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.generation import Work
from llmlite.serve.guard import Guard
from llmlite.serve.inbox import Failed, Inbox
from llmlite.serve.scheduler import EngineDead, QueueFull, ShuttingDown
from llmlite.serve.schema import ChatRequest, CompletionRequest, Generating
from llmlite.serve.service import Service
from llmlite.serve.settings import ServeSettings

COMPLETION_TOKENS = 16
"""What /v1/completions generates at most where the request doesn't say: the default of OpenAI's API."""

PATIENCE = 30.0
"""Seconds /health waits for the engine thread, which answers between two pieces of work."""


def create_app(
    engine: Engine, settings: ServeSettings, name: str = "model", manifest: dict[str, Any] | None = None
) -> FastAPI:
    """The server around one engine, which the app owns from now on: it is used on the app's engine thread alone.

    ``name`` is the model's id for clients (``settings.name`` goes before it), ``manifest`` what llmlite.json says.
    The app's ``state.service`` has the scheduler. Raises `InputError` for an API key file that can't be used.
    """
    service = Service(engine, settings, settings.name or name, manifest)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.stop)

    app = FastAPI(title="llmlite", version=llmlite.__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Guard, max_body=settings.max_body, keys=settings.api_keys())
    errors.install(app)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        try:
            status = await asyncio.wait_for(asyncio.wrap_future(service.scheduler.ping()), PATIENCE)
        except TimeoutError:
            message = f"the engine has not answered for {PATIENCE:.0f} s"
            raise ApiError(503, message, code="engine_silent") from None
        except (EngineDead, ShuttingDown) as error:
            raise as_api_error(error) from None
        return JSONResponse({"status": "ok", **status})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        service.check_model(model)
        return JSONResponse(service.model_card())

    @app.post("/v1/chat/completions", dependencies=[Depends(_require_json)])
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        try:
            prompt = await service.encode([message.plain() for message in body.messages])
        except ChatTemplateError as error:
            raise ApiError(400, str(error), "messages", "chat_template") from None
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        works = service.works(body, prompt, "messages", limit, top)
        lengths = [len(prompt)] * len(works)
        return await _answer(
            service, request, body, works, ChatAnswer(service, lengths, body.include_usage, top is not None)
        )

    @app.post("/v1/completions", dependencies=[Depends(_require_json)])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        works: list[Work] = []
        echoes: list[tuple[str | list[int], list[int]] | None] = []
        scored = bool(body.echo) and body.logprobs is not None
        n = body.n or 1
        for given in body.prompts():
            prompt = await _prompt_ids(service, given)
            room = max(1, service.engine.context - len(prompt))
            limit = min(COMPLETION_TOKENS, room) if body.max_tokens is None else body.max_tokens
            choices = service.works(body, prompt, "prompt", limit, body.logprobs)
            works += [replace(work, score_prompt=scored) for work in choices]
            echoes += [(given, prompt) if body.echo else None] * n
        lengths = [len(work.prompt) for work in works]
        answer = CompletionAnswer(service, lengths, n, body.include_usage, body.logprobs is not None, echoes)
        return await _answer(service, request, body, works, answer)


def _require_json(request: Request) -> None:
    """Nothing but application/json: a page in a browser can't send that to a local server without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON: send Content-Type: application/json, not {kind!r}")


async def _prompt_ids(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await service.encode(prompt)
    if not all(0 <= token < service.engine.vocab_size for token in prompt):
        message = f"prompt: token ids must lie between 0 and {service.engine.vocab_size - 1}"
        raise ApiError(400, message, "prompt", "invalid_value")
    return prompt


async def _answer(service: Service, request: Request, body: Generating, works: list[Work], answer: Answer) -> Response:
    """Queue the work. Answer when all is there; streamed, when the first delta is, so that a failure has a status."""
    try:
        inbox = Inbox(service.scheduler, works, request)
    except (QueueFull, EngineDead, ShuttingDown) as error:
        raise as_api_error(error) from None
    streaming = False
    try:
        if not body.stream:
            return JSONResponse(await whole(answer, inbox))
        first = await inbox.next()
        streaming = True
    except Failed as failure:
        raise as_api_error(failure.error) from failure.error
    finally:
        if not streaming:
            inbox.close()
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(answer, inbox, first), media_type="text/event-stream", headers=headers)
