"""One thread owns the engine. Requests wait in a bounded queue; what runs goes on together, step by step.

`turns` says what a step holds, `admission` who may run. Between two steps the thread takes in what is new, drops what
was cancelled or is too late, and runs what others call. When the cache is full the sequence that began last leaves it,
to host memory, and comes back first when there is room: no neighbour fails.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from llmlite.serve.admission import Admission
from llmlite.serve.calls import Call, EngineDead
from llmlite.serve.drafting import PromptLookup
from llmlite.serve.engines.base import Engine, EngineBroken, NoRoom, Piece
from llmlite.serve.generation import Delta, Generation, Work
from llmlite.serve.stats import Stats
from llmlite.serve.tickets import QueueFull, RequestState, ShuttingDown, Sink, Ticket, TooLate
from llmlite.serve.turns import Rates, plan, plan_exactly

__all__ = ["EngineDead", "QueueFull", "Scheduler", "SchedulerSettings", "ShuttingDown", "Sink", "Ticket", "TooLate"]

log = logging.getLogger("llmlite.serve")

T = TypeVar("T")
Pieces = list[tuple[Ticket, Piece]]


@dataclass(frozen=True)
class SchedulerSettings:
    """``exact``: one sequence a step, so that a reply depends on nothing else; ``lookup``: guess from the prompt;
    ``timeout``: seconds that a sequence may take from when it was accepted, None for no limit."""

    max_queue: int = 64
    exact: bool = False
    lookup: bool = False
    timeout: float | None = None


class Scheduler:
    """Runs `Work` on an engine. All methods may be called from any thread."""

    def __init__(self, engine: Engine, settings: SchedulerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[Call[Any]] = deque()
        # Touched by the engine thread alone; the first is the one that began first.
        self._running: list[Ticket] = []
        self._suspended: list[Ticket] = []
        self._admission = Admission(engine)
        self._rates = Rates()
        self._turns = 0
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
        self._stats.running, self._stats.waiting = len(self._running), len(self._waiting) + len(self._suspended)
        return self._stats

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, works: list[Work], sinks: list[Sink]) -> list[Ticket]:
        """Queue the sequences of one request, all or none. Raises `QueueFull`, `EngineDead` or `ShuttingDown`.

        Where nobody waits, a request with more sequences than may wait is accepted all the same.
        """
        request = RequestState()
        timeout = self._settings.timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        tickets = [
            Ticket(self._generation(work), sink, request, deadline=deadline)
            for work, sink in zip(works, sinks, strict=True)
        ]
        with self._changed:
            if self._refusal is not None:
                raise self._refusal()
            if self._waiting and len(self._waiting) + len(tickets) > self._settings.max_queue:
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
        """The engine thread's own answer, given between two steps: how many sequences run and wait.

        The future has `EngineDead` or `ShuttingDown` where nothing new is accepted.
        """
        with self._changed:
            if self._refusal is not None:
                refused: Future[dict[str, int]] = Future()
                refused.set_exception(self._refusal())
                return refused
        return self.call(lambda: {"running": len(self._running), "waiting": len(self._waiting) + len(self._suspended)})

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread, between two steps; it should take no longer than one.

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
            _tell(ticket, refusal())

    def stop(self) -> None:
        """End the engine thread after its present step and wait for that."""
        self.drain()
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _generation(self, work: Work) -> Generation:
        guess = self._settings.lookup and self._engine.can_cut and not self._settings.exact
        return Generation(work, self._engine, PromptLookup(work.prompt) if guess else None)

    def _own(self) -> None:
        refusal: Callable[[], Exception] = _shutting_down
        try:
            while self._prepare():
                if self._running:
                    self._turn()
        except BaseException as broken:  # the thread's last words: whoever waits must hear of them
            log.critical("the engine thread has ended", exc_info=broken)
            refusal = partial(EngineDead, str(broken))
            self._dead = True
        self._end(refusal)

    def _prepare(self) -> bool:
        """Wait for something to do, drop what is over, admit what there is room for. False: stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stop or self._running or self._suspended or self._waiting or self._calls
            )
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
        for call in calls:
            call.run()
        self._drop()
        self._admit()
        room = self._engine.room()
        stats = self._stats
        stats.cells_used, stats.cells_total = room.used + room.kept, room.total
        return not self._stop

    def _drop(self) -> None:
        """What was cancelled goes; what is too late is told so."""
        now = time.monotonic()
        for ticket in [*self._running, *self._suspended]:
            if ticket.cancelled or now > ticket.deadline:
                self._retire(ticket, keep=True)
                self._tell_late(ticket)
        with self._changed:
            late = [ticket for ticket in self._waiting if now > ticket.deadline]
            for ticket in late:
                self._waiting.remove(ticket)
        for ticket in late:
            self._tell_late(ticket)

    def _tell_late(self, ticket: Ticket) -> None:
        if not ticket.cancelled and self._settings.timeout is not None:
            _tell(ticket, TooLate(self._settings.timeout))

    def _admit(self) -> None:
        """Sequences that had to leave come back first; then the queue, as far as slots and room go."""
        while self._suspended and self._admission.may_resume(self._suspended[0], self._running):
            ticket = self._suspended[0]
            assert ticket.generation.sequence is not None
            try:
                self._engine.resume(ticket.generation.sequence)
            except NoRoom as full:
                if self._running:
                    break
                self._fail(ticket, full)  # nothing will ever make room for it
                continue
            self._suspended.pop(0)
            self._running.append(ticket)
            self._running.sort(key=lambda ticket: ticket.started)
        while not self._suspended:
            with self._changed:
                ticket = self._admission.next(self._waiting, self._running)
                if ticket is None:
                    return
                self._waiting.remove(ticket)
                ticket.request.started = True
            ticket.behind = None  # else each keeps the one before it, without an end
            ticket.started = time.monotonic()
            self._running.append(ticket)
            self._alone(ticket, ticket.generation.open)

    def _turn(self) -> None:
        if self._settings.exact:
            pieces = plan_exactly(self._running, self._turns)
        else:
            pieces = plan(self._running, self._engine, self._rates)
        self._turns += 1
        begun = time.perf_counter()
        pieces.sort(key=_adapter)
        for _, group in groupby(pieces, key=_adapter):
            self._run([(ticket, piece) for ticket, piece in group if piece.sequence.slot is not None])
        self._stats.steps += 1
        self._stats.step_seconds += time.perf_counter() - begun

    def _run(self, pieces: Pieces) -> None:
        """Run pieces together; what can't be run together for want of room or because one fails is run in parts."""
        if not pieces:
            return
        begun = time.perf_counter()
        try:
            rows = self._engine.step([piece for _, piece in pieces])
        except NoRoom:
            self._make_room(pieces)
            return
        except EngineBroken:
            raise
        except Exception as error:  # it belongs to one of the requests: its client is told, its neighbours go on
            if len(pieces) > 1:
                for ticket, piece in pieces:
                    if piece.sequence.slot is not None:  # one before it may have made it leave
                        self._run([(ticket, piece)])
                return
            self._fail(pieces[0][0], error)
            return
        seconds = time.perf_counter() - begun
        self._note(seconds, pieces)
        for (ticket, _), logits in zip(pieces, rows, strict=True):
            self._alone(ticket, partial(self._take, ticket, logits))

    def _note(self, seconds: float, pieces: Pieces) -> None:
        self._stats.decode_seconds += seconds
        generating = [piece for ticket, piece in pieces if ticket.generation.generated]
        if all(len(piece.tokens) == 1 for piece in generating):
            tokens = sum(len(piece.tokens) for _, piece in pieces)
            self._rates.note(seconds, len(generating), tokens - len(generating))

    def _make_room(self, pieces: Pieces) -> None:
        """Let sequences that generate go before prompts; then the one that began last leaves the cache."""
        generating = [(ticket, piece) for ticket, piece in pieces if ticket.generation.generated]
        if generating and len(generating) < len(pieces):
            self._run(generating)
            return
        if len(self._running) == 1:
            ticket = self._running[0]
            self._fail(ticket, NoRoom("the cache is too small for this sequence"))
            return
        ticket = self._running.pop()
        assert ticket.generation.sequence is not None
        self._engine.suspend(ticket.generation.sequence)
        self._suspended.append(ticket)
        self._suspended.sort(key=lambda ticket: ticket.started)
        self._stats.preemptions += 1
        self._run([(other, piece) for other, piece in pieces if other is not ticket])

    def _take(self, ticket: Ticket, logits: np.ndarray) -> None:
        before = ticket.generation.generated
        delta = ticket.generation.take(logits)
        if delta is None:
            return
        self._count(ticket, delta.generated - before)
        if delta.finish:
            self._retire(ticket, keep=True)
        _tell(ticket, delta)

    def _count(self, ticket: Ticket, generated: int) -> None:
        stats, sequence = self._stats, ticket.generation.sequence
        stats.generated_tokens += generated
        if not ticket.counted and sequence is not None:
            ticket.counted = True
            stats.prompt_tokens += len(ticket.generation.work.prompt)
            stats.cached_tokens += sequence.reused
            stats.prefix_hits += sequence.reused > 0

    def _alone(self, ticket: Ticket, work: Callable[[], object]) -> None:
        """Do what concerns one request; should it fail, its client is told and its neighbours go on."""
        try:
            work()
        except EngineBroken:
            raise
        except Exception as error:  # whatever it is: the client hears of it, and the log
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        log.error("a request failed", exc_info=error)
        self._retire(ticket, keep=False)
        _tell(ticket, error)

    def _retire(self, ticket: Ticket, keep: bool) -> None:
        ticket.generation.close(keep)  # first: should it raise, the ticket is still there to be told
        (self._running if ticket in self._running else self._suspended).remove(ticket)
        lasted = time.monotonic() - ticket.started
        self._seconds = lasted if self._seconds == 0 else 0.8 * self._seconds + 0.2 * lasted

    def _end(self, refusal: Callable[[], Exception]) -> None:
        with self._changed:
            self._refusal = refusal
            self._ended = True
            orphans = [*self._running, *self._suspended, *self._waiting]
            self._running, self._suspended, self._waiting = [], [], deque()
            calls, self._calls = self._calls, deque()
        for call in calls:
            call.refuse(refusal())
        for ticket in orphans:
            _tell(ticket, refusal())


def _tell(ticket: Ticket, what: Delta | Exception) -> None:
    """Hand ``what`` to the ticket's owner; one who can't take it gets no more, and nobody else is harmed."""
    try:
        ticket.sink(what)
    except Exception as error:  # whatever the owner did, the thread has others to serve
        log.error("nobody takes what a sequence says", exc_info=error)
        ticket.cancelled = True


def _adapter(pair: tuple[Ticket, Piece]) -> str:
    return pair[0].generation.work.adapter or ""


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down")
