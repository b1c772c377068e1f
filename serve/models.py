"""Which models this server has: loaded when asked for, unloaded when idle, opened again when their engine died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from llmlite.errors import LlmliteError
from llmlite.serve.engines import Opened
from llmlite.serve.errors import ApiError
from llmlite.serve.service import Service
from llmlite.serve.settings import ServeSettings

log = logging.getLogger("llmlite.serve")

GLANCE = 0.5
"""Seconds between two looks at the models: for a dead engine, which is opened again, and an idle one."""

RESTART_AFTER = (0.0, 1.0, 5.0, 30.0)
"""Seconds until an engine is opened again after its first, second, ... death in a row."""

LEAVING = 5.0
"""Seconds that requests have to hear that their model is closed, before it is freed."""

PEACE = 60.0
"""Seconds of life after which a death is the first again."""


@dataclass(frozen=True)
class ModelSpec:
    """A model by the name that clients use; ``open`` loads it, on a thread of its own.

    ``adapters``: names of low-rank adapters, each of which clients use like a model of its own.
    """

    name: str
    open: Callable[[], Opened]
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """What a request asked for by a model's name: the service and the adapter on top of it, None for the bare model."""

    service: Service
    name: str
    adapter: str | None


class Model:
    """One model's life: unloaded, loading, ready, dead. Used on the event loop."""

    def __init__(self, spec: ModelSpec, settings: ServeSettings) -> None:
        self.spec = spec
        self.service: Service | None = None
        self.failure: str | None = None
        self.restarts = 0
        self._draining = False
        self._settings = settings
        self._lock = asyncio.Lock()
        self._users = 0
        self._deaths = 0
        self._used = time.monotonic()
        self._loaded = 0.0
        self._again = 0.0

    @property
    def alive(self) -> bool:
        """It is loaded and its engine runs."""
        return self.service is not None and not self.service.scheduler.dead

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Service]:
        """The loaded service, which is not unloaded before this ends. Raises 503 while the engine is dead."""
        service = await self._ready()
        self._users += 1
        try:
            yield service
        finally:
            self._users -= 1
            self._used = time.monotonic()

    async def load(self) -> Service:
        """Open the artifact, if it isn't. Raises what opening raises."""
        async with self._lock:
            if self.service is None:
                opened = await asyncio.to_thread(self.spec.open)
                self.service = Service(opened, self._settings, self.spec)
                self.service.scheduler.start()
                if self._draining:  # it was not, when loading began
                    self.service.scheduler.drain()
                self.failure = None
                self._loaded = self._used = time.monotonic()
            return self.service

    def drain(self) -> None:
        """Refuse what is new and what has not begun, also where that waits for the model to be loaded."""
        self._draining = True
        if self.service is not None:
            self.service.scheduler.drain()

    async def unload(self) -> None:
        """Stop the engine thread, which tells who waits for it; free the weights when they have left."""
        async with self._lock:
            service, self.service = self.service, None
            if service is None:
                return
            await asyncio.to_thread(service.stop)
            await self._left()
            await asyncio.to_thread(service.stop_reading)
            await self._left()
            try:
                await asyncio.to_thread(service.close)
            except Exception as error:  # whatever a dead engine does, another is opened in its place
                log.error("%s could not be freed in good order", self.spec.name, exc_info=error)

    async def _left(self) -> None:
        """Wait until nobody uses the model, for a time."""
        end = time.monotonic() + LEAVING
        while self._users and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def look(self, idle: float | None) -> None:
        """Do what is due: open a dead engine again, unload one that nobody used for ``idle`` seconds."""
        now = time.monotonic()
        if self.service is not None and self.service.scheduler.dead:
            self._bury(now)
            await self.unload()
        if self.failure is not None and now >= self._again:
            await self._revive()
        elif idle is not None and self.service is not None and not self._users and now - self._used > idle:
            log.info("%s was idle for %.0f s and is unloaded", self.spec.name, idle)
            await self.unload()

    def _bury(self, now: float) -> None:
        self._deaths = 1 if now - self._loaded > PEACE else self._deaths + 1
        self._again = now + RESTART_AFTER[min(self._deaths, len(RESTART_AFTER)) - 1]
        self.failure = "its engine has stopped"

    async def _revive(self) -> None:
        try:
            await self.load()
            self.restarts += 1
            log.warning("the engine of %s was opened again", self.spec.name)
        except Exception as error:  # whatever it is, it is tried again later
            self._bury(time.monotonic())
            log.error("the engine of %s can't be opened again", self.spec.name, exc_info=error)

    async def _ready(self) -> Service:
        if self.service is not None and not self.service.scheduler.dead:
            return self.service
        if self.failure is not None or self.service is not None:
            message = f"the model {self.spec.name!r} is not ready: its engine has stopped and is being opened again"
            raise ApiError(503, message, code="engine_dead", headers={"Retry-After": "2"})
        try:
            return await self.load()
        except LlmliteError as error:
            raise ApiError(503, f"the model {self.spec.name!r} can't be loaded: {error}", code="load_failed") from None


class Models:
    """All models of a server by the names that clients use. The first one is loaded at the start."""

    def __init__(self, specs: Sequence[ModelSpec], settings: ServeSettings) -> None:
        self.models = [Model(spec, settings) for spec in specs]
        self._settings = settings
        self._by_name: dict[str, tuple[Model, str | None]] = {}
        for model in self.models:
            self._by_name[model.spec.name] = (model, None)
            self._by_name.update({adapter: (model, adapter) for adapter in model.spec.adapters})
        self.created = int(time.time())
        self.draining = False
        self._watches: list[asyncio.Task[None]] = []

    @property
    def names(self) -> list[str]:
        """Models and adapters, in the order in which they were named."""
        return list(self._by_name)

    def find(self, name: str) -> tuple[Model, str | None]:
        """The model, and the adapter on it, that clients call ``name``; raises 404 for an unknown name."""
        if name not in self._by_name:
            known = ", ".join(repr(known) for known in self.names)
            message = f"the model {name!r} is not served here; this server has {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return self._by_name[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Served]:
        """What ``name`` stands for, loaded; it stays loaded until this ends. Raises 404 and 503."""
        model, adapter = self.find(name)
        async with model.use() as service:
            yield Served(service, name, adapter)

    async def start(self) -> None:
        """Load the first model and begin to look after all."""
        await self.models[0].load()
        self._watches = [asyncio.create_task(self._look_after(model)) for model in self.models]

    def drain(self) -> None:
        """Refuse what is new and what has not begun; what runs goes on."""
        self.draining = True
        for model in self.models:
            model.drain()

    async def close(self) -> None:
        """Stop every engine."""
        for watch in self._watches:
            watch.cancel()
        for model in self.models:
            await model.unload()

    async def _look_after(self, model: Model) -> None:
        while not self.draining:
            await asyncio.sleep(GLANCE)
            await model.look(self._settings.idle_unload)
