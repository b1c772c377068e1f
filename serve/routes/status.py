"""GET /health asks every loaded engine, /ready whether requests should be sent here, /metrics what was counted."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from llmlite.serve.documents import Health, Ready, answers
from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.models import Model
from llmlite.serve.routes.answering import metrics_of, models_of
from llmlite.serve.scheduler import EngineDead, ShuttingDown

PATIENCE = 30.0
"""Seconds /health waits for an engine thread, which answers between two steps."""

# FastAPI would document the errors of an endpoint that answers text as text.
PLAIN_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "Why the server can't answer",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status in ("4XX", "5XX")
}

router = APIRouter()
metrics_router = APIRouter()


@router.get("/health", responses=answers(Health))
async def health(request: Request) -> Response:
    """200 when every loaded engine's own thread has answered; 503 where one is dead, silent or shutting down."""
    loads = await asyncio.gather(*(ask(model) for model in models_of(request).models))
    total = {key: sum(load[key] for load in loads) for key in ("running", "waiting")}
    return JSONResponse({"status": "ok", **total})


@router.get("/ready", responses=answers(Ready))
async def ready(request: Request) -> Response:
    """200 when the first model is loaded and the server takes requests; 503 before that and while it drains."""
    models = models_of(request)
    first = models.models[0]
    if models.draining:
        raise as_api_error(ShuttingDown())
    if not first.alive:
        raise ApiError(503, f"the model {first.spec.name!r} is not loaded", code="not_ready")
    return JSONResponse({"status": "ready"})


@metrics_router.get(
    "/metrics", response_class=PlainTextResponse, responses={**answers(None, "text/plain"), **PLAIN_ERRORS}
)
async def metrics(request: Request) -> Response:
    """Counts for Prometheus, in its text format."""
    counted = metrics_of(request)
    return Response(counted.text(), media_type=counted.content_type)


async def ask(model: Model) -> dict[str, int]:
    """How many sequences run and wait, as the engine thread itself says."""
    if model.failure is not None:
        raise ApiError(503, f"{model.spec.name}: {model.failure}; it is being opened again", code="engine_dead")
    if model.service is None:
        return {"running": 0, "waiting": 0}
    try:
        return await asyncio.wait_for(asyncio.wrap_future(model.service.scheduler.ping()), PATIENCE)
    except TimeoutError:
        message = f"{model.spec.name}: the engine has not answered for {PATIENCE:.0f} s"
        raise ApiError(503, message, code="engine_silent") from None
    except (EngineDead, ShuttingDown) as error:
        raise as_api_error(error) from None
