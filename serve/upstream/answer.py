"""An upstream's answer as the client gets it: under the name that the client knows, checked, and ended properly."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from llmlite.serve.errors import ApiError
from llmlite.serve.inbox import ClientGone
from llmlite.serve.upstream.relay import Relay
from llmlite.serve.upstream.sse import Event, Malformed, Splitter, parse_object


def whole(text: bytes, name: str) -> dict[str, Any]:
    """The answer object, with the model called ``name``. Raises 502 for what is no object."""
    try:
        answer = parse_object(text)
    except Malformed as error:
        raise _broken(error) from None
    rename(answer, name)
    return answer


def rename(answer: dict[str, Any], name: str) -> bool:
    """Put the model's name that the client knows in place of the upstream's; whether that changed anything."""
    changed = False
    for holder in (answer, answer.get("response"), answer.get("message")):
        if isinstance(holder, dict) and holder.get("model", name) != name:
            holder["model"] = name
            changed = True
    return changed


async def events(relay: Relay) -> AsyncGenerator[Event]:
    """The events of a stream, each whole. Raises 502 where one is malformed or the stream ends too early."""
    splitter, last = Splitter(), False
    try:
        async for data in relay.body():
            for event in splitter.feed(data):
                last = last or event.last
                yield event
    except Malformed as error:
        raise _broken(error) from None
    if not last:
        raise ApiError(502, "the server behind this one ended its answer too early", code="upstream_failed")


async def stream(relay: Relay, found: AsyncGenerator[Event], first: Event, name: str) -> AsyncIterator[bytes]:
    """The events as the client gets them, ``first`` being taken already. A failure is sent as an error object."""
    try:
        yield _sent(first, name)
        async with aclosing(found):
            async for event in found:
                yield _sent(event, name)
    except ApiError as error:
        yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"
    except ClientGone:
        return
    finally:
        relay.close()


def _sent(event: Event, name: str) -> bytes:
    """The bytes as they came, unless the model has another name in them."""
    if event.data is not None and rename(event.data, name):
        return event.with_data(event.data)
    return event.raw


def _broken(error: Malformed) -> ApiError:
    return ApiError(502, f"the server behind this one sent {error}", code="upstream_malformed")
