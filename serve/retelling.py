"""A chat answer told in the words of another API: OpenAI's Responses, Anthropic's Messages.

What is told is the chat answer's streamed choices, so whatever the chat endpoint can do (tools, structured output) the
other endpoints can, and a whole answer can't differ from a streamed one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from pydantic import ValidationError

from llmlite.serve.answers import Answer, chunks
from llmlite.serve.errors import ApiError, as_api_error, wrong_field
from llmlite.serve.generation import Delta
from llmlite.serve.inbox import Failed, Inbox
from llmlite.serve.schema import ChatRequest

Event = dict[str, Any]
"""One event of a stream, which its field "type" names."""

Usage = Mapping[str, Any]
"""The usage object of a chat completion."""


class Retelling(Protocol):
    """One answer as it is told. Events are made in order; what they told so far is kept for `result`."""

    def opening(self, usage: Usage) -> list[Event]:
        """The events before any text; the prompt's tokens are known."""

    def take(self, choice: Mapping[str, Any]) -> list[Event]:
        """One streamed choice of the chat answer."""

    @property
    def over(self) -> bool:
        """Nothing more is wanted, though the model may go on."""

    def closing(self, usage: Usage) -> list[Event]:
        """The events after the last choice."""

    def failure(self, error: ApiError) -> list[Event]:
        """The events that end a stream in place of the closing ones."""

    def result(self) -> dict[str, Any]:
        """The whole answer, after the closing."""


async def retold_whole(answer: Answer, inbox: Inbox, retelling: Retelling) -> dict[str, Any]:
    """Wait for everything. Raises `Failed`."""
    first = await inbox.next()
    async with aclosing(_told(answer, inbox, first, retelling)) as events:
        async for _ in events:
            pass
    return retelling.result()


async def retold(
    answer: Answer, inbox: Inbox, item: tuple[int, Delta] | None, retelling: Retelling
) -> AsyncIterator[str]:
    """Server-sent events, from the first delta (already taken from the inbox) on."""
    try:
        async with aclosing(_told(answer, inbox, item, retelling)) as events:
            async for event in events:
                yield sent(event)
    except Failed as failed:
        for event in retelling.failure(as_api_error(failed.error)):
            yield sent(event)


async def _told(
    answer: Answer, inbox: Inbox, item: tuple[int, Delta] | None, retelling: Retelling
) -> AsyncGenerator[Event]:
    if item is not None:
        answer.note(*item)
    for event in retelling.opening(answer.usage()):
        yield event
    async with aclosing(chunks(answer, inbox, item)) as found:
        async for chunk in found:
            for choice in chunk["choices"]:
                for event in retelling.take(choice):
                    yield event
            if retelling.over:
                break
    for event in retelling.closing(answer.usage()):
        yield event


def sent(event: Event) -> str:
    """An event as it is streamed."""
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def chat_request(fields: Mapping[str, Any], names: Mapping[str, str], places: Sequence[str]) -> ChatRequest:
    """A request of another API as a chat request. Raises 400 with the field's name in the other API.

    ``names``: what the other API calls a field of a chat request; ``places``: where each message came from.
    """

    def named(param: str) -> str:
        head, _, rest = param.partition(".")
        if head == "messages" and rest:
            number, _, inner = rest.partition(".")
            return f"{places[int(number)]}.{inner}" if inner else places[int(number)]
        return ".".join(part for part in (names.get(head, head), rest) if part)

    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise wrong_field(problem, problem["loc"], named) from None
