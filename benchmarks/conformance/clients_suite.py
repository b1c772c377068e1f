"""The clients of OpenAI and Anthropic against this server, every answer checked against their types.

Run by pytest in the clients' environment; CONFORMANCE_URL is the server, whose model may say what it likes: what is
looked at is the shape of the answers, and that what was asked for is what came.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

URL = os.environ["CONFORMANCE_URL"]
OPENAI: dict[str, Any] = {
    "base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 600, "_strict_response_validation": True
}  # fmt: skip
ASKED: list[Any] = [{"role": "user", "content": "Name a city and a country."}]
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"enum": [1, 2, 3, 4, 5, 6, 7, 8, 9]}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PLACE, "strict": True}}
COMMON: dict[str, Any] = {"model": "model", "temperature": 0.0, "seed": 1, "max_tokens": 24}


class Place(BaseModel):
    """Short by its schema: a small model would not end a free text."""

    city: Literal["Paris", "Oslo"]
    days: Literal[1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def client() -> openai.OpenAI:
    return openai.OpenAI(**OPENAI)


@pytest.fixture(scope="module")
def claude() -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=URL, api_key="none", max_retries=0, timeout=600, _strict_response_validation=True
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").object == "model"


def test_chat_whole_and_streamed_are_equal(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=2, **COMMON)
    scores = whole.choices[0].logprobs
    assert scores is not None and scores.content is not None and whole.usage is not None
    ended = whole.choices[0].finish_reason == "stop"  # by a token that is no part of the text
    assert len(scores.content) == whole.usage.completion_tokens - ended
    chunks = list(
        client.chat.completions.create(messages=ASKED, stream=True, stream_options={"include_usage": True}, **COMMON)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_choices_and_stop(client: openai.OpenAI) -> None:
    asked = {**COMMON, "temperature": 1.0, "n": 3, "stop": [" the", "."]}
    choices = client.chat.completions.create(messages=ASKED, **asked).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert all("." not in (choice.message.content or "") for choice in choices)


def test_parse(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="model", messages=ASKED, response_format=Place, temperature=0, max_tokens=200, frequency_penalty=1.0
    )
    assert isinstance(parsed.choices[0].message.parsed, Place)


def test_tools_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "messages": ASKED, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, **COMMON,
        "max_tokens": 60,
    }  # fmt: skip
    calls = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert calls is not None and isinstance(calls[0], openai.types.chat.ChatCompletionMessageFunctionToolCall)
    Place.model_validate_json(calls[0].function.arguments)
    told: list[Any] = [
        *ASKED, {"role": "assistant", "tool_calls": [calls[0].model_dump()]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
    ]  # fmt: skip
    assert client.chat.completions.create(messages=told, tools=[TOOL], **COMMON).choices
    with client.chat.completions.stream(**asked) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.delta" in kinds
    assert final is not None and final[0].function.arguments == calls[0].function.arguments


def test_completions_with_echo_and_token_ids(client: openai.OpenAI) -> None:
    """The first token of an echo has the score null, as in OpenAI's API, for which the client's types have no room."""
    lenient = openai.OpenAI(**{**OPENAI, "_strict_response_validation": False})
    asked: dict[str, Any] = {**COMMON, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = lenient.completions.create(prompt="The sky is blue", **asked).choices[0]
    assert answer.text == "The sky is blue"
    assert answer.logprobs is not None and answer.logprobs.token_logprobs is not None
    first, *others = answer.logprobs.token_logprobs
    assert first is None and others and max(others) <= 0
    assert client.completions.create(prompt=[[100, 200], [300]], **COMMON).choices[1].index == 1


def test_responses_whole_streamed_and_parsed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "model", "input": "Name a city.", "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as events:
        assert events.get_final_response().output_text == whole.output_text
    parsed = client.responses.parse(**{**asked, "max_output_tokens": 200, "temperature": 0.7}, text_format=Place)
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Place)


def test_embeddings(client: openai.OpenAI) -> None:
    one, two = client.embeddings.create(model="model", input=["a cat", "a dog"], encoding_format="float").data
    assert len(one.embedding) == len(two.embedding)
    assert math.isclose(sum(x * x for x in one.embedding), 1, rel_tol=1e-4)


def test_async_client_and_errors() -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(**OPENAI) as client:
            answers = [client.chat.completions.create(messages=ASKED, **COMMON) for _ in range(4)]
            texts = {answer.choices[0].message.content for answer in await asyncio.gather(*answers)}
            assert len(texts) == 1
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(messages=ASKED, **{**COMMON, "model": "another"})
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(messages=ASKED, **{**COMMON, "max_tokens": 10**6})
            assert refused.value.code == "context_length_exceeded"

    asyncio.run(ask())


def test_anthropic_messages_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "max_tokens": 24, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(system="Be brief.", **asked)
    with claude.messages.stream(system="Be brief.", **asked) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    assert claude.messages.count_tokens(model="model", messages=ASKED, system="Be brief.").input_tokens == (
        whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    )


def test_anthropic_tools_and_errors(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "model", "messages": ASKED, "max_tokens": 60, "extra_body": {"temperature": 0},
        "tools": [{"name": "weather", "input_schema": PLACE}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    (block,) = [block for block in claude.messages.create(**asked).content if block.type == "tool_use"]
    Place.model_validate_json(json.dumps(block.input))
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        claude.messages.create(**{**asked, "max_tokens": 2000}, thinking={"type": "enabled", "budget_tokens": 1024})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**asked, "model": "another"})
