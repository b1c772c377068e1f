"""Anthropic's Message object, its stream of events and its error object, told from a chat answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from llmlite.serve.errors import ApiError, anthropic_body
from llmlite.serve.messages_schema import MessagesRequest
from llmlite.serve.retelling import Event, Usage
from llmlite.serve.text import TextStream


class MessageRetelling:
    """See `Retelling`. Content blocks come one after another: text, then each use of a tool.

    The stop sequences are looked for here, in the text alone; once one is met, the rest of the answer is not wanted.
    """

    def __init__(self, request: MessagesRequest) -> None:
        self._request = request
        self._id = f"msg_{uuid.uuid4().hex}"
        self._text = TextStream(tuple(request.stop_sequences or ()))
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        return self._text.stopped

    def opening(self, usage: Usage) -> list[Event]:
        self._usage = _counted(usage)
        return [{"type": "message_start", "message": self.result() | {"stop_reason": None}}]

    def take(self, choice: Mapping[str, Any]) -> list[Event]:
        if self.over:
            return []
        self._finish = choice["finish_reason"] or self._finish
        delta = choice["delta"]
        events = self._said(self._text.push((delta.get("content") or "").encode()))
        for part in delta.get("tool_calls") or []:
            events += self._called(part)
        return events

    def closing(self, usage: Usage) -> list[Event]:
        self._usage = _counted(usage)
        events = [*self._said(self._text.finish()), *self._close()]
        ending = {"stop_reason": self._reason(), "stop_sequence": self._text.stop}
        events.append({"type": "message_delta", "delta": ending, "usage": self._usage})
        return [*events, {"type": "message_stop"}]

    def failure(self, error: ApiError) -> list[Event]:
        return [anthropic_body(error)]

    def result(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": list(self._blocks),
            "stop_reason": self._reason(),
            "stop_sequence": self._text.stop,
            "usage": self._usage,
        }

    def _reason(self) -> str:
        if self._text.stopped:
            return "stop_sequence"
        return {"length": "max_tokens", "tool_calls": "tool_use"}.get(self._finish or "", "end_turn")

    def _said(self, text: str) -> list[Event]:
        if not text:
            return []
        events = []
        if not self._blocks or self._blocks[-1]["type"] != "text":
            events = [*self._close(), *self._open({"type": "text", "text": ""})]
        self._blocks[-1]["text"] += text
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def _called(self, part: Mapping[str, Any]) -> list[Event]:
        """A piece of a function call; the first one of a call has its id and name."""
        function = part.get("function") or {}
        events = []
        if part.get("id"):
            events = self._said(self._text.finish())
            block = {"type": "tool_use", "id": part["id"], "name": function["name"], "input": {}}
            events += [*self._close(), *self._open(block)]
        if function.get("arguments"):
            self._arguments += function["arguments"]
            events.append(self._delta({"type": "input_json_delta", "partial_json": function["arguments"]}))
        return events

    def _open(self, block: dict[str, Any]) -> list[Event]:
        self._blocks.append(block)
        return [{"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _close(self) -> list[Event]:
        """The event that says the last block is whole."""
        if not self._blocks:
            return []
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _parsed(self._arguments)
            self._arguments = ""
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


def _counted(usage: Usage) -> dict[str, Any]:
    """Tokens of the prompt that were in the cache are told apart from those that had to be read."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _parsed(arguments: str) -> dict[str, Any]:
    """The input of a tool. What max_tokens cut off is no JSON and becomes empty; the stop reason says that it was."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
