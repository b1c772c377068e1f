"""Server-sent events, cut out of a byte stream that may be split anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MAX_EVENT = 16 * 2**20
"""Bytes of one event; a stream that sends more without an end is broken."""

END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
LINES = re.compile(rb"\r\n|\n|\r")
LAST = ("message_stop", "response.completed", "response.incomplete", "response.failed", "error")
"""The types of events after which nothing need come: of Anthropic's messages and of OpenAI's responses."""


class Malformed(Exception):
    """What came is no stream of events with JSON in them."""


@dataclass(frozen=True)
class Event:
    """One event: the bytes it came as, and its data: an object, or None for a comment and for [DONE].

    ``last``: the stream may end here.
    """

    raw: bytes
    data: dict[str, Any] | None
    last: bool

    def with_data(self, data: dict[str, Any]) -> bytes:
        """The event with other data; its other lines as they came."""
        others = [line for line in LINES.split(self.raw) if line and not line.startswith(b"data:")]
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        return b"\n".join([*others, b"data: " + text, b"", b""])


class Splitter:
    """Takes bytes as they come and gives the events that are whole."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes. Raises `Malformed`."""
        seen = max(0, len(self._rest) - 3)  # where an end may begin that data completes
        self._rest += data
        events = []
        while found := END.search(self._rest, seen):
            events.append(_event(bytes(self._rest[: found.end()])))
            del self._rest[: found.end()]
            seen = 0
        if len(self._rest) > MAX_EVENT:
            raise Malformed(f"an event of more than {MAX_EVENT} bytes")
        return events


def _event(raw: bytes) -> Event:
    lines = [line[5:].removeprefix(b" ") for line in LINES.split(raw) if line.startswith(b"data:")]
    if not lines and not all(
        line.startswith((b":", b"event:", b"id:", b"retry:")) for line in LINES.split(raw) if line
    ):
        raise Malformed("something that is no server-sent event")
    text = b"\n".join(lines).strip()
    if text in (b"", b"[DONE]"):
        return Event(raw, None, bool(text))
    data = parse_object(text)
    return Event(raw, data, data.get("type") in LAST or data.get("error") is not None)


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises `Malformed` for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise Malformed(f"data that is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise Malformed("JSON that is no object")
    return data
