"""A sequence that the scheduler has accepted, and how one can be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from llmlite.serve.generation import Delta, Generation

Sink = Callable[[Delta | Exception], None]
"""Called on the engine thread with each delta, or once with what ended the sequence; must not raise or block."""


class QueueFull(Exception):
    """No more may wait. ``retry_after``: seconds until a place is free, by the measured time of a sequence."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class ShuttingDown(Exception):
    """The server is ending: what runs is finished, nothing new is begun."""


class TooLate(Exception):
    """The request's time is over. ``seconds``: how long it had."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(eq=False)
class RequestState:
    """The sequences of one request: once one of them has started, all are finished, a shutdown notwithstanding."""

    started: bool = False


@dataclass(eq=False)
class Ticket:
    """A sequence that was accepted; `Scheduler.cancel` takes it back. ``deadline``: of time.monotonic()."""

    generation: Generation
    sink: Sink
    request: RequestState = field(default_factory=RequestState)
    cancelled: bool = False
    started: float = 0.0
    deadline: float = math.inf
    counted: bool = False  # in the statistics, its prompt
    behind: Ticket | None = None  # the sequence that is computing the beginning of this one's prompt
    shared: int = 0  # how many tokens of it
