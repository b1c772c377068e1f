"""One request on its way to an upstream, and the answer on its way back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import Request

from llmlite.serve.errors import ApiError
from llmlite.serve.inbox import ClientGone
from llmlite.serve.upstream.pool import NOT_SENT, Pool, Upstream
from llmlite.serve.upstream.sse import Malformed, parse_object

log = logging.getLogger("llmlite.serve")

AHEAD = 8
"""Pieces of an answer that may lie here unread: a client that reads slowly slows the upstream down."""


class Relay:
    """Sends a body to the upstream that the pool chooses. Watches the client: a hang-up ends the request there at once.

    Made and used on the event loop. One task owns the connection from its beginning to its end. ``kept``: a stream
    outlives the endpoint, and closes it.
    """

    def __init__(self, pool: Pool, path: str, body: dict[str, Any], request: Request) -> None:
        self._pool = pool
        self._path = path
        self._body = body
        self._items: asyncio.Queue[httpx.Response | bytes | Exception | None] = asyncio.Queue(AHEAD)
        self.kept = False
        self._ended = False
        self._task = asyncio.create_task(self._run())
        self._watch = asyncio.create_task(self._watch_connection(request))

    async def head(self) -> httpx.Response:
        """The answer's status and headers. Raises `ApiError` where no upstream gives one, `ClientGone`."""
        item = await self._next()
        assert isinstance(item, httpx.Response)
        return item

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's bytes as they come. Raises `ApiError` where it breaks off, `ClientGone`."""
        while (item := await self._next()) is not None:
            assert isinstance(item, bytes)
            yield item

    async def whole(self) -> bytes:
        """All of the answer's bytes. Raises as `body` does."""
        return b"".join([piece async for piece in self.body()])

    def close(self) -> None:
        """Hang up on the upstream, where it has not finished."""
        self._watch.cancel()
        self._end()

    def _end(self) -> None:
        """Cancel the task, once: a second time would break into its hanging up and leave the connection open."""
        if not self._ended:
            self._ended = True
            self._task.cancel()

    async def _next(self) -> httpx.Response | bytes | None:
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def _run(self) -> None:
        tried: list[Upstream] = []
        try:
            while not await self._tried(tried):
                pass
            await self._items.put(None)
        except ApiError as error:
            await self._items.put(error)
        except httpx.TimeoutException:
            seconds = self._pool.patience
            message = f"the server behind this one sent nothing for {seconds:.0f} s"
            await self._items.put(ApiError(504, message, code="upstream_timeout"))
        except httpx.HTTPError as error:
            log.warning("an upstream failed while it answered: %s: %s", type(error).__name__, error)
            message = "the server behind this one broke off before it had answered"
            await self._items.put(ApiError(502, message, code="upstream_failed"))

    async def _tried(self, tried: list[Upstream]) -> bool:
        """Have one upstream answer; False where it took no connection, and the next one is to be asked."""
        target = self._pool.choose(self._body["model"], tried)
        tried.append(target.upstream)
        body = json.dumps({**self._body, "model": target.model}).encode()
        target.upstream.outstanding += 1
        try:
            response = await self._pool.send(target, self._path, body)
            try:
                await self._items.put(response)
                async for piece in response.aiter_raw():
                    await self._items.put(piece)
            finally:
                await response.aclose()
        except NOT_SENT:
            return False
        finally:
            target.upstream.outstanding -= 1
        return True

    async def _watch_connection(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._end()
        while not self._items.empty():
            self._items.get_nowait()
        self._items.put_nowait(ClientGone("the client hung up"))


def upstream_error(status: int, headers: httpx.Headers, body: bytes) -> ApiError:
    """What the client is told of an upstream's refusal: its own words in this API's form.

    A refusal of this server's key is no fault of the client's: 502.
    """
    if status in (401, 403):
        return ApiError(502, "the server behind this one refuses this server's key", code="upstream_key")
    if status < 400:
        return ApiError(502, f"the server behind this one answered with status {status}", code="upstream_failed")
    try:
        found = parse_object(body)
    except Malformed:
        found = {}
    error = found.get("error", found)
    error = error if isinstance(error, dict) else {"message": error}
    message, param, code = (error.get(key) for key in ("message", "param", "code"))
    kept = {"Retry-After": headers["retry-after"]} if "retry-after" in headers else {}
    return ApiError(
        status,
        message if isinstance(message, str) else f"the server behind this one answered with status {status}",
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
        kept,
    )
