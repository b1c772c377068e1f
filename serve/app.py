"""The HTTP side: requests in, work to the scheduler, answers out as OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

import llmlite
from llmlite.serve import errors
from llmlite.serve.guard import Guard
from llmlite.serve.metrics import Counting, Metrics
from llmlite.serve.models import Models, ModelSpec
from llmlite.serve.routes import chat, completions, embeddings, messages, models, responses, status, tokens
from llmlite.serve.settings import ServeSettings

ROUTERS = tuple(part.router for part in (status, models, chat, completions, embeddings, responses, messages, tokens))


def create_app(specs: Sequence[ModelSpec], settings: ServeSettings) -> FastAPI:
    """The server around some models, each of which runs on an engine thread of its own.

    The first model is loaded when the app starts, the others when they are first asked for. ``state.models`` has
    them. Raises `InputError` for an API key file that can't be used.
    """
    served = Models(specs, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await served.start()
        yield
        await served.close()

    app = FastAPI(title="llmlite", version=llmlite.__version__, lifespan=lifespan)
    app.state.models = served
    app.state.metrics = metrics = Metrics(served)
    app.add_middleware(Guard, max_body=settings.max_body, keys=settings.api_keys())
    app.add_middleware(Counting, metrics=metrics)
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
