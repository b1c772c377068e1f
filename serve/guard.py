"""What is checked before a request reaches a route: its host, its key and the key's limits, its body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlite.serve.errors import ApiError
from llmlite.serve.exchange import Exchange, exchange_of
from llmlite.serve.keys import Keyring
from llmlite.serve.limits import Caller
from llmlite.serve.logs import log_body, log_exchange
from llmlite.serve.routes import web
from llmlite.serve.settings import ServeSettings
from llmlite.serve.sizes import check_body

OPEN = frozenset({"/health", "/ready"}) | web.PATHS
"""Paths that need no key: what load balancers ask, and the chat page, which asks its user for one."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})

BODY_SECONDS = 60.0
"""Seconds until a body must be there whole."""

HELD_BODIES = 16
"""Bodies of the largest size that may be held at a time, while they arrive."""


class Record:
    """ASGI middleware, the outermost: each request is an `Exchange`, and a line in the log when it ends.

    ``running`` has the ids of those that have not ended.
    """

    def __init__(self, app: ASGIApp, running: set[str]) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope["method"], scope["path"])
        scope.setdefault("state", {})["exchange"] = exchange

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", exchange.id.encode())]
            await send(message)

        self._running.add(exchange.id)
        try:
            await self._app(scope, receive, noted)
        except Exception:
            exchange.status = exchange.status or 500  # answered further out, where this can't see it
            raise
        finally:
            self._running.remove(exchange.id)
            log_exchange(exchange)


class Guard:
    """ASGI middleware within `Record`. ``draining`` tells that the server is about to end and takes nothing new.

    With an empty keyring anyone may ask. On loopback the Host header must then name this machine: else a page from
    elsewhere could have its own name resolved to this address, and read answers as if they came from its own server.
    Where a key is asked for, such a page has none.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, keys: Keyring, draining: Callable[[], bool]) -> None:
        self._app = app
        self._keys = keys
        self._draining = draining
        self._log_prompts = settings.log_prompts
        self._max_body = settings.max_body
        self._max_text = settings.max_text
        local = settings.loopback and not keys and not settings.insecure
        self._names = LOOPBACK_NAMES | {settings.host} if local else None
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._admit(scope)
        except ApiError as refusal:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        try:
            await self._serve(scope, receive, send)
        finally:
            if caller is not None:
                exchange = exchange_of(scope)
                caller.leave(exchange.prompt_tokens + exchange.generated_tokens)

    def _admit(self, scope: Scope) -> Caller | None:
        """Raises what a request is refused with before its body is read."""
        headers = Headers(scope=scope)
        if self._names is not None and _host(headers.get("host", "")) not in self._names:
            message = (
                "the Host header names another machine: use localhost or 127.0.0.1, or serve with --api-key-file "
                "(or --insecure), which allows any name"
            )
            raise ApiError(403, message, code="host_not_allowed")
        caller = self._known(scope, headers)
        if scope["method"] != "POST":
            return None
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        if self._draining():
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if caller is not None:
            caller.admit()
        return caller

    def _known(self, scope: Scope, headers: Headers) -> Caller | None:
        if not self._keys or scope["path"] in OPEN:
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [bearer.strip()] if scheme.lower() == "bearer" else []
        caller = self._keys.find([*offered, headers.get("x-api-key", "").strip()])
        if caller is None:
            message = "an API key is needed: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        exchange_of(scope).caller = caller.name
        return caller

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(receive)
            if body is None:
                return  # the client is gone
            check_body(body, self._max_text)
        except ApiError as refusal:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        if self._log_prompts:
            log_body(exchange_of(scope), body)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up. Raises 408, 413 and 503."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    if size > self._max_body:
                        raise self._too_large()
                    if self._held > HELD_BODIES * self._max_body:
                        busy = "other requests' bodies fill the memory that there is for them; try again"
                        raise ApiError(503, busy, code="busy", headers={"Retry-After": "1", "Connection": "close"})
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            late = f"the body was not there after {BODY_SECONDS:.0f} s"
            raise ApiError(408, late, headers={"Connection": "close"}) from None
        finally:
            self._held -= size

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body} bytes", headers={"Connection": "close"})


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()
