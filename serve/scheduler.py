"""One thread owns the engine. Requests wait in a bounded queue; up to ``engine.slots`` sequences run in turns.

Each turn gives every running sequence one bounded piece of work, a prefill chunk or a token, so that a long prompt
never stalls its neighbours and a cancelled sequence is gone before the next turn. What a scheduler with batched
steps must replace is `_turn` alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from llmlite.serve.engines.base import Engine, EngineBroken
from llmlite.serve.generation import Delta, Generation, Work
from llmlite.serve.stats import Stats

T = TypeVar("T")

log = logging.getLogger("llmlite.serve")

Sink = Callable[[Delta | Exception], None]
"""Called on the engine thread with each delta, or once with what ended the sequence; must not raise or block."""


class QueueFull(Exception):
    """No more may wait. ``retry_after``: seconds until a place is free, by the measured time of a sequence."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class EngineDead(Exception):
    """The engine thread has ended; nothing can run until the engine is opened again."""


class ShuttingDown(Exception):
    """The server is ending: what runs is finished, nothing new is begun."""


@dataclass(eq=False)
class _Request:
    """The sequences of one request: once one of them has started, all are finished, a shutdown notwithstanding."""

    started: bool = False


@dataclass(eq=False)
class Ticket:
    """A sequence that was accepted; `Scheduler.cancel` takes it back."""

    generation: Generation
    sink: Sink
    prompt_tokens: int
    request: _Request = field(default_factory=_Request)
    cancelled: bool = False
    started: float = 0.0
    counted: int | None = None


@dataclass(frozen=True)
class Call(Generic[T]):
    """A function that the engine thread is to run, and where its outcome goes."""

    future: Future[T]
    function: Callable[[], T]

    def run(self) -> None:
        """On the engine thread. Raises `EngineBroken`, which ends that thread; anything else is the caller's alone."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except EngineBroken as broken:
            self.future.set_exception(EngineDead(str(broken)))
            raise
        except Exception as error:  # it belongs to whoever called
            self.future.set_exception(error)

    def refuse(self, why: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(why)


class Scheduler:
    """Runs `Work` on an engine. All methods may be called from any thread."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[Call[Any]] = deque()
        self._running: list[Ticket] = []  # touched by the engine thread alone
        self._seconds = 0.0  # how long a sequence runs, a moving average
        # Why nothing is accepted any more, made anew for everyone: each raise adds its frames to an exception.
        self._refusal: Callable[[], Exception] | None = None
        self._stop = False
        self._dead = False
        self._ended = False
        self._stats = Stats()
        self._thread = threading.Thread(target=self._own, name="engine", daemon=True)

    @property
    def dead(self) -> bool:
        """The engine thread has ended by itself."""
        return self._dead

    @property
    def stats(self) -> Stats:
        """What the engine thread has counted so far, and how many sequences run and wait now."""
        self._stats.running, self._stats.waiting = len(self._running), len(self._waiting)
        return self._stats

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, works: list[Work], sinks: list[Sink]) -> list[Ticket]:
        """Queue the sequences of one request, all or none. Raises `QueueFull`, `EngineDead` or `ShuttingDown`.

        Where nobody waits, a request with more sequences than may wait is accepted all the same.
        """
        request = _Request()
        tickets = [
            Ticket(Generation(work, self._engine), sink, len(work.prompt), request)
            for work, sink in zip(works, sinks, strict=True)
        ]
        with self._changed:
            if self._refusal is not None:
                raise self._refusal()
            if self._waiting and len(self._waiting) + len(tickets) > self._max_queue:
                raise QueueFull(max(1, math.ceil(self._seconds / self._engine.slots)))
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """Forget these: waiting ones at once, running ones before their next step. Finished ones don't mind."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def ping(self) -> Future[dict[str, int]]:
        """The engine thread's own answer, given between two turns: how many sequences run and wait."""
        with self._changed:
            refusal = self._refusal
        if refusal is not None:
            failed: Future[dict[str, int]] = Future()
            failed.set_exception(refusal())
            return failed
        return self.call(lambda: {"running": len(self._running), "waiting": len(self._waiting)})

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread, between two turns; it should take no longer than one.

        The future has what it returned or raised, or `EngineDead` or `ShuttingDown` once the thread ends: work that
        goes in many calls is finished while the scheduler drains. One that is cancelled is not run.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stop or self._ended:
                future.set_exception((self._refusal or _shutting_down)())
            else:
                self._calls.append(Call(future, function))
                self._changed.notify()
        return future

    def drain(self) -> None:
        """Refuse what is new and what has not begun; what runs goes on."""
        with self._changed:
            refusal = self._refusal = self._refusal or _shutting_down
            dropped = [ticket for ticket in self._waiting if not ticket.request.started]
            self._waiting = deque(ticket for ticket in self._waiting if ticket.request.started)
        for ticket in dropped:
            ticket.sink(refusal())

    def stop(self) -> None:
        """End the engine thread after its present turn and wait for that."""
        self.drain()
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _own(self) -> None:
        refusal: Callable[[], Exception] = _shutting_down
        try:
            while self._prepare():
                self._turn()
        except BaseException as broken:  # the thread's last words: whoever waits must hear of them
            log.critical("the engine thread has ended", exc_info=broken)
            refusal = partial(EngineDead, str(broken))
            self._dead = True
        self._end(refusal)

    def _prepare(self) -> bool:
        """Wait for something to do, admit what there is room for, run what was called. False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._running or self._waiting or self._calls)
            while self._waiting and len(self._running) < self._engine.slots:
                ticket = self._waiting.popleft()
                ticket.request.started = True
                ticket.started = time.monotonic()
                self._running.append(ticket)
            calls = len(self._calls)
        for _ in range(calls):
            self._calls.popleft().run()
        return not self._stop

    def _turn(self) -> None:
        for ticket in list(self._running):
            if ticket.cancelled:
                self._retire(ticket, keep=True)
                continue
            begun = time.monotonic()
            try:
                delta = ticket.generation.advance()
            except EngineBroken:
                raise
            except Exception as error:  # it belongs to this request: its client is told, its neighbours go on
                log.error("a request failed", exc_info=error)
                self._retire(ticket, keep=False)
                ticket.sink(error)
                continue
            self._stats.steps += 1
            self._stats.step_seconds += time.monotonic() - begun
            if delta is None:
                continue
            self._count(ticket, delta)
            if delta.finish:
                self._retire(ticket, keep=True)
            ticket.sink(delta)

    def _count(self, ticket: Ticket, delta: Delta) -> None:
        if ticket.counted is None:  # the first delta: the prompt was read
            self._stats.prompt_tokens += ticket.prompt_tokens
            self._stats.cached_tokens += delta.reused
            self._stats.prefix_hits += delta.reused > 0
        self._stats.generated_tokens += delta.generated - (ticket.counted or 0)
        ticket.counted = delta.generated

    def _retire(self, ticket: Ticket, keep: bool) -> None:
        ticket.generation.close(keep)  # first: should it raise, the ticket is still there to be told
        self._running.remove(ticket)
        lasted = time.monotonic() - ticket.started
        self._seconds = lasted if self._seconds == 0 else 0.8 * self._seconds + 0.2 * lasted

    def _end(self, refusal: Callable[[], Exception]) -> None:
        with self._changed:
            self._refusal = refusal
            self._ended = True
            orphans = [*self._running, *self._waiting]
            self._running, self._waiting = [], deque()
            calls, self._calls = self._calls, deque()
        for call in calls:
            call.refuse(refusal())
        for ticket in orphans:
            ticket.sink(refusal())


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down")
