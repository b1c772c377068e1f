"""The endpoints in front of an upstream: a request is checked as everywhere, then forwarded as it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.exchange import Exchange, exchange_of
from llmlite.serve.inbox import ClientGone
from llmlite.serve.messages_answer import MessageRetelling
from llmlite.serve.messages_schema import CountRequest, MessagesRequest
from llmlite.serve.responses_answer import ResponseRetelling
from llmlite.serve.responses_schema import ResponsesRequest
from llmlite.serve.retelling import Retelling
from llmlite.serve.routes.answering import require_json
from llmlite.serve.schema import ChatRequest, CompletionRequest
from llmlite.serve.upstream.answer import events, retold, retold_stream, stream, usage_of, whole
from llmlite.serve.upstream.pool import Pool
from llmlite.serve.upstream.relay import Relay, upstream_error
from llmlite.serve.upstream.sse import Event

KEPT = ("created", "owned_by", "max_model_len", "meta", "llmlite")
"""What is passed on of an upstream's model object; the rest, as paths on its disk, is nobody's concern."""

CHAT_PATH = "/v1/chat/completions"

router = APIRouter()


def pool_of(request: Request) -> Pool:
    """The upstreams of the app that a request came to."""
    found = request.app.state.models
    assert isinstance(found, Pool)
    return found


@router.get("/health")
@router.get("/ready")
async def health(request: Request) -> Response:
    """200 while an upstream is well, 503 when none is."""
    pool = pool_of(request)
    if not pool.well:
        raise pool.down()
    running = sum(upstream.outstanding for upstream in pool.upstreams)
    counts = {"running": running, "waiting": 0, "upstreams": len(pool.upstreams), "well": len(pool.well)}
    return JSONResponse({"status": "ok", **counts})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The upstreams' models."""
    pool = pool_of(request)
    return JSONResponse({"object": "list", "data": [card(pool, name) for name in pool.names]})


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> Response:
    """One of them."""
    return JSONResponse(card(pool_of(request), model))


def card(pool: Pool, name: str) -> dict[str, Any]:
    """OpenAI's model object, from what the upstream says of it."""
    said = {key: value for key, value in pool.card(name).items() if key in KEPT}
    if not isinstance(said.get("created"), int):
        said["created"] = pool.created
    if not isinstance(said.get("owned_by"), str):
        said["owned_by"] = "upstream"
    return {**said, "id": name, "object": "model"}


@router.post("/v1/chat/completions", dependencies=[Depends(require_json)])
async def chat(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions."""
    return await forward(request)


@router.post("/v1/completions", dependencies=[Depends(require_json)])
async def completions(body: CompletionRequest, request: Request) -> Response:
    """OpenAI's text completions."""
    return await forward(request)


@router.post("/v1/responses", dependencies=[Depends(require_json)])
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """OpenAI's responses, told from the upstream's chat answer."""
    return await retell(request, body.as_chat(), ResponseRetelling(body), bool(body.stream))


@router.post("/v1/messages", dependencies=[Depends(require_json)])
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Anthropic's messages, told from the upstream's chat answer."""
    return await retell(request, body.as_chat(), MessageRetelling(body), bool(body.stream))


@router.post("/v1/messages/count_tokens", dependencies=[Depends(require_json)])
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """Only where the upstream itself counts: this server has no tokenizer of its model."""
    try:
        return await forward(request)
    except ApiError as error:
        if error.status not in (404, 405) or error.code == "model_not_found":
            raise
        message = "the server behind this one can't count tokens, and this one has no tokenizer of its model"
        raise ApiError(501, message, code="upstream_lacks") from None


async def forward(request: Request) -> Response:
    """Send a checked request on, and its answer back: whole, or streamed from its first event on.

    The body is what was checked, written anew: no second reading of doubled keys reaches the upstream.
    """
    body = await request.json()
    async with answering(request, body) as relay:
        if not body.get("stream"):
            answer = whole(await relay.whole(), body["model"])
            note(exchange_of(request), usage_of(answer), 0)
            return JSONResponse(answer)
        found = counted(request, relay)
        return streaming(relay, stream(found, await anext(found), body["model"]))


async def retell(request: Request, asked: ChatRequest, retelling: Retelling, streamed: bool) -> Response:
    """Ask the upstream's chat endpoint, and put its answer into the words of another API."""
    body = {**asked.model_dump(exclude_unset=True), "stream": True, "stream_options": {"include_usage": True}}
    async with answering(request, body, CHAT_PATH) as relay:
        found = counted(request, relay)
        told = retold(found, await anext(found), retelling)
        if streamed:
            return streaming(relay, retold_stream(told, retelling))
        async for _ in told:
            pass
        return JSONResponse(retelling.result())


async def counted(request: Request, relay: Relay) -> AsyncGenerator[Event]:
    """The events of a stream, their tokens noted for the limits of the caller's key.

    A piece counts as a token until the upstream tells; a prompt whose length it doesn't tell counts as none.
    """
    pieces = 0
    async for event in events(relay):
        data = event.data or {}
        pieces += bool(data.get("choices"))
        note(exchange_of(request), usage_of(data), pieces)
        yield event


def note(exchange: Exchange, usage: dict[str, Any] | None, pieces: int) -> None:
    """Keep what a request has cost until now."""
    if usage is not None:
        exchange.prompt_tokens = usage["prompt_tokens"]
    exchange.generated(0, pieces if usage is None else usage["completion_tokens"])


@asynccontextmanager
async def answering(request: Request, body: dict[str, Any], path: str | None = None) -> AsyncIterator[Relay]:
    """The upstream's answer, which has status 200, until the block ends, or a stream of it that is returned there.

    Raises the upstream's refusal.
    """
    relay = Relay(pool_of(request), path or request.url.path, body, request)
    try:
        head = await relay.head()
        if head.status_code != 200:
            raise upstream_error(head.status_code, head.headers, await relay.whole())
        yield relay
    except ClientGone as error:
        raise as_api_error(error) from None
    finally:
        if not relay.kept:
            relay.close()


def streaming(relay: Relay, told: AsyncIterator[bytes]) -> Response:
    """A stream that ends the relay when it ends."""
    relay.kept = True

    async def sent() -> AsyncIterator[bytes]:
        try:
            async for data in told:
                yield data
        except ClientGone:
            return
        finally:
            relay.close()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(sent(), media_type="text/event-stream", headers=headers)
