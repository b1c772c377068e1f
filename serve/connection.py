"""HTTP connections that can't be held open for nothing: slow headers, answers nobody reads, too many of them."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from llmlite.serve.errors import ApiError

HEADER_SECONDS = 15.0
"""Seconds until a request's headers must be there, from the connection or the last answer on."""

UNREAD_SECONDS = 60.0
"""Seconds that a client may leave an answer unread while more waits to be sent."""


class Connection(H11Protocol):
    """uvicorn's protocol with what it has no setting for. ``most`` is set by `connections`."""

    most: int
    _slow: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            refusal = ApiError(503, f"this server takes {self.most} connections at a time", code="too_many_connections")
            self._refuse(503, refusal)
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._slow is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._slow = _stopped(self._slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._slow, self._unread = _stopped(self._slow), _stopped(self._unread)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread = _stopped(self._unread)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error object, too, unless it follows a request whose answer is on its way."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._refuse(400, ApiError(400, "this is not a valid HTTP request"))

    def _expect_headers(self) -> None:
        self._slow = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _refuse(self, status: int, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        reason = {400: "Bad Request", 503: "Service Unavailable"}[status]
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\nRetry-After: 5\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def connections(most: int) -> type[Connection]:
    """The protocol of a server that takes so many connections at a time."""
    return type("Connection", (Connection,), {"most": most})


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, after the one that there may be was stopped."""
    if timer is not None:
        timer.cancel()
    return None
