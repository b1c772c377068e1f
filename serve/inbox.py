"""Where the engine thread's deltas reach the event loop, one inbox for each request."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Protocol

from fastapi import Request

from llmlite.serve.exchange import exchange_of
from llmlite.serve.generation import Delta, Work
from llmlite.serve.scheduler import Scheduler, Sink


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class Failed(Exception):
    """A sequence of the request ended badly; ``error`` says how."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Times(Protocol):
    """Where the times of tokens are counted, in seconds."""

    def first_token(self, model: str, seconds: float) -> None: ...

    def next_tokens(self, model: str, seconds: float, tokens: int) -> None: ...


class Watch:
    """Tells `Times` when the tokens of one request's sequences come."""

    def __init__(self, times: Times, model: str) -> None:
        self._times = times
        self._model = model
        self._begun = time.monotonic()
        self._last: dict[int, tuple[float, int]] = {}

    def see(self, index: int, delta: Delta) -> None:
        """One delta of a sequence has come."""
        now = time.monotonic()
        before, generated = self._last.get(index, (self._begun, 0))
        new = delta.generated - generated
        if new and index not in self._last:
            self._times.first_token(self._model, now - before)
        elif new:
            self._times.next_tokens(self._model, now - before, new)
        if new:
            self._last[index] = (now, delta.generated)


class Inbox:
    """Submits one request's work and receives its deltas. Watches the connection: a hang-up cancels the work.

    Made and used on the event loop. Raises what `Scheduler.submit` raises.
    """

    def __init__(self, scheduler: Scheduler, works: list[Work], request: Request, watch: Watch) -> None:
        self._scheduler = scheduler
        self._times = watch
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        self._unfinished = len(works)
        self._tickets = scheduler.submit(works, [self._sink(index) for index in range(len(works))])
        self._exchange = exchange_of(request)
        self._exchange.prompt_tokens += sum(len(work.prompt) for work in works if work.choice == 0)
        self._watch = asyncio.create_task(self._watch_connection(request))

    async def next(self) -> tuple[int, Delta] | None:
        """The next delta and the index of its sequence; None when all have finished. Raises `Failed`."""
        if self._unfinished == 0:
            return None
        index, delta = await self._queue.get()
        if isinstance(delta, Exception):
            raise Failed(delta)
        self._times.see(index, delta)
        self._unfinished -= delta.finish is not None
        self._exchange.generated(index, delta.generated)
        return index, delta

    def close(self) -> None:
        """Take back what still runs or waits."""
        self._watch.cancel()
        self._scheduler.cancel(self._tickets)

    def _sink(self, index: int) -> Sink:
        def deliver(delta: Delta | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server is gone, and the client with it
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delta))

        return deliver

    async def _watch_connection(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._scheduler.cancel(self._tickets)
        self._queue.put_nowait((0, ClientGone("the client hung up")))
