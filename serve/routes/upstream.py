"""The endpoints in front of an upstream: a request is checked as everywhere, then forwarded as it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from llmlite.serve.errors import as_api_error
from llmlite.serve.inbox import ClientGone
from llmlite.serve.routes.answering import require_json
from llmlite.serve.schema import ChatRequest, CompletionRequest
from llmlite.serve.upstream.answer import events, stream, whole
from llmlite.serve.upstream.pool import Pool
from llmlite.serve.upstream.relay import Relay, upstream_error

KEPT = ("created", "owned_by", "max_model_len", "meta", "llmlite")
"""What is passed on of an upstream's model object; the rest, as paths on its disk, is nobody's concern."""

router = APIRouter()


def pool_of(request: Request) -> Pool:
    """The upstreams of the app that a request came to."""
    found = request.app.state.models
    assert isinstance(found, Pool)
    return found


@router.get("/health")
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


async def forward(request: Request) -> Response:
    """Send a checked request on, and its answer back: whole, or streamed from its first event on.

    The body is what was checked, written anew: no second reading of doubled keys reaches the upstream.
    """
    body = await request.json()
    relay = Relay(pool_of(request), request.url.path, body, request)
    streaming = False
    try:
        head = await relay.head()
        if head.status_code != 200:
            raise upstream_error(head.status_code, head.headers, await relay.whole())
        if not body.get("stream"):
            return JSONResponse(whole(await relay.whole(), body["model"]))
        found = events(relay)
        first = await anext(found)
        streaming = True
    except ClientGone as error:
        raise as_api_error(error) from None
    finally:
        if not streaming:
            relay.close()
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        stream(relay, found, first, body["model"]), media_type="text/event-stream", headers=headers
    )
