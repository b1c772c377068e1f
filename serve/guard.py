"""What is checked before a request is read: its key and the size of its body."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlite.serve.errors import ApiError

OPEN = frozenset({"/health", "/ready"})
"""What never needs a key: a load balancer has none."""


class Guard:
    """ASGI middleware. ``keys`` empty: anyone may ask."""

    def __init__(self, app: ASGIApp, max_body: int, keys: frozenset[str]) -> None:
        self._app = app
        self._max_body = max_body
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, limited, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        offered = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"  # the latter is Anthropic's
        if self._keys and scope["path"] not in OPEN and not self._known(offered):
            message = "an API key is needed: send the header 'Authorization: Bearer KEY' (or 'x-api-key: KEY')"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            return ApiError(413, self._too_large(), headers={"Connection": "close"})
        return None

    def _known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return False
        offered = key.strip().encode()
        return any(hmac.compare_digest(offered, known.encode()) for known in self._keys)

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body} bytes"
