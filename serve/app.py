"""The HTTP side: requests in, work to the scheduler, answers out as OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

import llmlite
from llmlite.serve import errors
from llmlite.serve.guard import Guard
from llmlite.serve.models import Models, ModelSpec
from llmlite.serve.routes import chat, completions, messages, models, responses, status, upstream
from llmlite.serve.settings import ServeSettings
from llmlite.serve.upstream.pool import Pool

ROUTERS = (status.router, models.router, chat.router, completions.router, responses.router, messages.router)
FRONT_ROUTERS = (upstream.router,)


def create_app(specs: Sequence[ModelSpec], settings: ServeSettings) -> FastAPI:
    """The server around some models, each of which runs on an engine thread of its own.

    The first model is loaded when the app starts, the others when they are first asked for. ``state.models`` has
    them. Raises `InputError` for an API key file that can't be used.
    """
    return _app(Models(specs, settings), ROUTERS, settings)


def create_front(pool: Pool, settings: ServeSettings) -> FastAPI:
    """The same server in front of others, which ``state.models`` has; raises as `create_app`."""
    return _app(pool, FRONT_ROUTERS, settings)


def _app(served: Models | Pool, routers: Sequence[APIRouter], settings: ServeSettings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await served.start()
        yield
        await served.close()

    app = FastAPI(title="llmlite", version=llmlite.__version__, lifespan=lifespan)
    app.state.models = served
    app.add_middleware(Guard, max_body=settings.max_body, keys=settings.api_keys())
    errors.install(app)
    for router in routers:
        app.include_router(router)
    return app
