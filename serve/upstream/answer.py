"""An upstream's answer as the client gets it: under the name that the client knows, checked, and ended properly."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx

from llmlite.serve.errors import ApiError
from llmlite.serve.retelling import Retelling, sent
from llmlite.serve.upstream.relay import Relay, upstream_error
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


async def stream(found: AsyncGenerator[Event], first: Event, name: str) -> AsyncIterator[bytes]:
    """The events as the client gets them, ``first`` being taken already. A failure is sent as an error object."""
    try:
        yield _sent(first, name)
        async for event in found:
            yield _sent(event, name)
    except ApiError as error:
        yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"


async def retold(
    found: AsyncGenerator[Event], first: Event | None, retelling: Retelling
) -> AsyncGenerator[dict[str, Any]]:
    """A chat stream as the events of another API. Raises 502 where it breaks.

    How many tokens the prompt has, the upstream tells at the end: the opening says 0. An answer that is over before
    the upstream ends counts a token for each piece of text.
    """
    usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for told in retelling.opening(usage):
        yield told
    while first is not None and not retelling.over:
        for choice in _choices(first):
            usage["completion_tokens"] += 1
            usage["total_tokens"] += 1
            for told in retelling.take(choice):
                yield told
        usage = usage_of(first.data or {}) or usage
        first = await anext(found, None)
    for told in retelling.closing(usage):
        yield told


async def retold_stream(told: AsyncGenerator[dict[str, Any]], retelling: Retelling) -> AsyncIterator[bytes]:
    """The same as bytes; a failure is told in the other API's words."""
    try:
        async for event in told:
            yield sent(event).encode()
    except ApiError as error:
        for event in retelling.failure(error):
            yield sent(event).encode()


def _choices(event: Event) -> list[dict[str, Any]]:
    """The streamed choices in one event, with all fields that a retelling reads."""
    data = event.data or {}
    if data.get("error") is not None:
        raise upstream_error(502, httpx.Headers(), json.dumps(data).encode())
    choices = data.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _broken(Malformed("choices that are none"))
    empty = {"index": 0, "delta": {}, "finish_reason": None, "logprobs": None}
    return [{**empty, **{key: value for key, value in choice.items() if value is not None}} for choice in choices]


def usage_of(data: dict[str, Any]) -> dict[str, Any] | None:
    """The usage object of a chat answer or chunk, where it has a proper one."""
    usage = data.get("usage")
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return usage if isinstance(usage, dict) and all(isinstance(usage.get(key), int) for key in counts) else None


def _sent(event: Event, name: str) -> bytes:
    """The bytes as they came, unless the model has another name in them."""
    if event.data is not None and rename(event.data, name):
        return event.with_data(event.data)
    return event.raw


def _broken(error: Malformed) -> ApiError:
    return ApiError(502, f"the server behind this one sent {error}", code="upstream_malformed")
