"""Functions that the engine thread runs for others, between two of its steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmlite.serve.engines.base import EngineBroken

T = TypeVar("T")


class EngineDead(Exception):
    """The engine thread has ended; nothing can run until the engine is opened again."""


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
        """On the thread's end."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(why)
