"""The HTTP side: requests in, work to the scheduler, answers out as OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

import llmlite
from llmlite.serve import errors
from llmlite.serve.guard import Guard, Record
from llmlite.serve.keys import Keyring
from llmlite.serve.metrics import Counting, Metrics
from llmlite.serve.models import Models, ModelSpec
from llmlite.serve.routes import (
    chat,
    completions,
    embeddings,
    messages,
    models,
    responses,
    status,
    tokens,
    upstream,
    web,
)
from llmlite.serve.settings import ServeSettings
from llmlite.serve.sizes import check_sizes
from llmlite.serve.upstream.pool import Pool

PARTS = (status, models, chat, completions, embeddings, responses, messages, tokens, web)
ROUTERS = (*(part.router for part in PARTS), status.metrics_router)
FRONT_ROUTERS = (upstream.router, status.metrics_router, web.router)


def create_app(specs: Sequence[ModelSpec], settings: ServeSettings, keys: Keyring | None = None) -> FastAPI:
    """The server around some models, each of which runs on an engine thread of its own.

    The first model is loaded when the app starts, the others when they are first asked for. ``keys`` stand in for
    the file of the settings. ``state`` has ``models``, ``keys`` and ``running``, the ids of the requests that run.
    Raises `InputError` for an API key file that can't be used.
    """
    return _app(Models(specs, settings), ROUTERS, settings, keys)


def create_front(pool: Pool, settings: ServeSettings, keys: Keyring | None = None) -> FastAPI:
    """The same server in front of others: ``state.models`` is the pool. Raises as `create_app`."""
    return _app(pool, FRONT_ROUTERS, settings, keys)


def _app(served: Models | Pool, routers: Sequence[APIRouter], settings: ServeSettings, keys: Keyring | None) -> FastAPI:
    if keys is None:
        keys = Keyring([]) if settings.api_key_file is None else Keyring.read(settings.api_key_file)
    running: set[str] = set()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await served.start()
        yield
        await served.close()

    checks = [Depends(check_sizes)]
    app = FastAPI(title="llmlite", version=llmlite.__version__, lifespan=lifespan, dependencies=checks)
    app.state.models, app.state.keys, app.state.running = served, keys, running
    app.state.metrics = metrics = Metrics(served if isinstance(served, Models) else None)
    # The last one added is the outermost: what it sees is logged, and a browser's preflight has no key.
    app.add_middleware(Guard, settings=settings, keys=keys, draining=lambda: served.draining)
    app.add_middleware(Counting, metrics=metrics)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )  # fmt: skip
    app.add_middleware(Record, running=running)
    errors.install(app)
    for router in routers:
        app.include_router(router)
    return app
