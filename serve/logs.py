"""Log lines on standard error, written by a thread of their own: whoever reads them slowly stops nobody."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from llmlite.serve.exchange import Exchange

requests = logging.getLogger("llmlite.serve.requests")

ROOM = 10_000
"""Lines that may wait to be written; more are dropped, and counted."""

PATIENCE = 2.0
"""Seconds given to the last lines when the server ends."""


class Writer(logging.Handler):
    """Puts formatted lines into a bounded queue, from which a thread writes them."""

    def __init__(self, stream: TextIO, room: int = ROOM) -> None:
        super().__init__()
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, for a short time."""
        end = time.monotonic() + PATIENCE
        try:
            self._lines.put(None, timeout=PATIENCE)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass  # nobody reads standard error, and its thread ends with the process
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self.dropped = self.dropped, 0
            if dropped:
                line += f"\n{dropped} log lines before this one were dropped: standard error was read too slowly"
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # standard error is closed: the server serves on without a log
                self.dropped += dropped + 1


@contextmanager
def logging_to(stream: TextIO = sys.stderr, level: str = "info") -> Iterator[None]:
    """Have this package and uvicorn log to ``stream`` while it lasts."""
    writer = Writer(stream)
    formatter = logging.Formatter("{asctime} {levelname:<7} {message}", "%Y-%m-%dT%H:%M:%S%z", style="{")
    writer.setFormatter(formatter)
    loggers = {"llmlite": level.upper(), "uvicorn": "ERROR" if level == "error" else "WARNING"}
    for name, least in loggers.items():
        logger = logging.getLogger(name)
        logger.addHandler(writer)
        logger.setLevel(least)
        logger.propagate = False
    try:
        yield
    finally:
        for name in loggers:
            logger = logging.getLogger(name)
            logger.removeHandler(writer)
            logger.propagate = True
        writer.close()


def log_exchange(exchange: Exchange) -> None:
    """The line of one request. It holds nothing that was asked or answered."""
    requests.info(
        "%s %s %s %s %d in=%d out=%d %.3fs",
        exchange.id, exchange.caller or "-", exchange.method, printable(exchange.path), exchange.status,
        exchange.prompt_tokens, exchange.generated_tokens, exchange.seconds,
    )  # fmt: skip


def log_body(exchange: Exchange, body: bytes) -> None:
    """What was asked, on one line."""
    requests.info("%s asked %s", exchange.id, printable(body.decode("utf-8", "replace"), most=len(body)))


def printable(text: str, most: int = 200) -> str:
    """A client's words as part of one line: no line break or terminal sequence gets through."""
    cut = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
