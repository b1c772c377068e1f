"""OpenAI's Response object and its stream of typed events, told from a chat answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from llmlite.serve.errors import ApiError
from llmlite.serve.responses_schema import ResponsesRequest
from llmlite.serve.retelling import Event, Usage


class ResponseRetelling:
    """See `Retelling`. Output items come one after another: the message, then each function call."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._request = request
        self._id = _new_id("resp")
        self._created = int(time.time())
        self._completed: int | None = None
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        return False

    def opening(self, usage: Usage) -> list[Event]:
        response = self.result()
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def take(self, choice: Mapping[str, Any]) -> list[Event]:
        self._finish = choice["finish_reason"] or self._finish
        delta = choice["delta"]
        events = []
        scores = (choice["logprobs"] or {}).get("content") or []
        if delta.get("content") or scores:
            events += self._said(delta.get("content") or "", scores)
        for part in delta.get("tool_calls") or []:
            events += self._called(part)
        return events

    def closing(self, usage: Usage) -> list[Event]:
        events = [] if self._items else self._open_message()  # an answer of no text is a message all the same
        status = "incomplete" if self._finish == "length" else "completed"
        events += self._close_item(status)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self._usage = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        self._completed = int(time.time())
        return [*events, self._event(f"response.{status}", response=self.result())]

    def failure(self, error: ApiError) -> list[Event]:
        self._error = {"code": "server_error", "message": error.message}
        return [self._event("response.failed", response=self.result())]

    def result(self) -> dict[str, Any]:
        asked = self._request
        status, output = self._status(), list(self._items)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed if status == "completed" else None,
            "status": status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": None,
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_whole_tool(tool) for tool in asked.tools or []],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": self._usage,
            "user": asked.user,
        }

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if self._usage is None:
            return "in_progress"
        return "incomplete" if self._finish == "length" else "completed"

    def _said(self, text: str, scores: list[dict[str, Any]]) -> list[Event]:
        events = []
        if not self._items or self._items[-1]["type"] != "message":
            events = [*self._close_item("completed"), *self._open_message()]
        part = self._items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += scores
        where = self._where() | {"content_index": 0}
        return [*events, self._event("response.output_text.delta", **where, delta=text, logprobs=scores)]

    def _open_message(self) -> list[Event]:
        item: dict[str, Any] = {
            "id": _new_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        events = self._open_item(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events.append(
            self._event("response.content_part.added", **self._where(), content_index=0, part={**part, "logprobs": []})
        )
        item["content"] = [part]
        return events

    def _called(self, part: Mapping[str, Any]) -> list[Event]:
        """A piece of a function call; the first one of a call has its id and name."""
        function = part.get("function") or {}
        events = []
        if part.get("id"):
            item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": part["id"],
                    "name": function["name"], "arguments": ""}  # fmt: skip
            events = [*self._close_item("completed"), *self._open_item(item)]
        if function.get("arguments"):
            self._items[-1]["arguments"] += function["arguments"]
            delta = function["arguments"]
            events.append(self._event("response.function_call_arguments.delta", **self._where(), delta=delta))
        return events

    def _open_item(self, item: dict[str, Any]) -> list[Event]:
        self._items.append(item)
        place = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=place, item=dict(item))]

    def _close_item(self, status: str) -> list[Event]:
        """The events that say the last item is whole."""
        if not self._items:
            return []
        item, where = self._items[-1], self._where()
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            where_part = where | {"content_index": 0}
            events = [
                self._event("response.output_text.done", **where_part, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", **where_part, part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **where, **done)]
        events.append(self._event("response.output_item.done", output_index=where["output_index"], item=item))
        return events

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


def _whole_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as it was given, with the fields that the answer's type demands."""
    return {"parameters": None, "strict": None, **tool}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
