"""What the server refuses: each field, value, message and body it does not serve, by name, as an error object."""

import json

import httpx
import openai
import pytest

from llmlite.serve.schema import ChatRequest, CompletionRequest
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import ScriptedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}

REFUSED_IN_CHAT = {
    "audio": {}, "function_call": "auto", "functions": [{}], "metadata": {"a": "b"}, "modalities": ["audio"],
    "moderation": {"model": "x"}, "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h", "reasoning_effort": "low",
    "service_tier": "flex", "store": True, "verbosity": "low", "web_search_options": {},
}  # fmt: skip
REFUSED_IN_COMPLETIONS = {"best_of": 2, "suffix": "x"}
OUT_OF_RANGE = {
    "temperature": [-0.1, 2.1, "1", True], "top_p": [0, 1.1, "x"], "top_k": [-1, 1.5], "min_p": [-0.1, 1.1],
    "seed": [1.5, 2**63, "1"], "max_tokens": [-1, 0, 1.0, "5", True], "n": [0, 129, 1.0],
    "frequency_penalty": [-2.1, 2.1], "presence_penalty": [-2.1, 2.1], "stream": ["true", 1], "user": [1],
    "stop": [1, [1], "", [""], ["a"] * 17, "\ud800"], "logit_bias": [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}],
}  # fmt: skip


def refused(server, path, field, value):
    body = {"messages": [{"role": "user", "content": "say:a"}]} if path == CHAT else {"prompt": "say:a"}
    data = json.dumps({"model": "model", **body, field: value})
    message = error_of(server.post(path, content=data, headers=JSON), 400, field)
    assert field in message
    return message


@pytest.mark.parametrize(("field", "value"), REFUSED_IN_CHAT.items())
def test_fields_of_chat_that_are_not_served(server, field, value):
    assert "support" in refused(server, CHAT, field, value)


@pytest.mark.parametrize(("field", "value"), REFUSED_IN_COMPLETIONS.items())
def test_fields_of_completions_that_are_not_served(server, field, value):
    assert "support" in refused(server, PLAIN, field, value)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in OUT_OF_RANGE.items() for v in values])
def test_values_out_of_range(server, field, value):
    refused(server, CHAT, field, value)
    refused(server, PLAIN, field, value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(server, number):
    for field in ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"]:
        data = f'{{"model": "model", "prompt": "a", "{field}": {number}}}'
        error_of(server.post(PLAIN, content=data, headers=JSON), 400, field)


def test_no_field_of_the_official_client_is_left_out():
    from openai.types import completion_create_params as plain
    from openai.types.chat import completion_create_params as chat

    for ours, theirs in [(ChatRequest, chat), (CompletionRequest, plain)]:
        known = theirs.CompletionCreateParamsBase.__annotations__
        assert set(known) - set(ours.model_fields) == set()


def test_unknown_fields_are_named(server):
    assert "does not know" in refused(server, CHAT, "tempreature", 1)
    assert "does not know" in refused(server, PLAIN, "messages", [])
    data = json.dumps({"model": "model", "prompt": "a", "bad \ud800 name": 1})
    assert "field name" in error_of(server.post(PLAIN, content=data, headers=JSON), 400)
    error_of(server.post(PLAIN, {"model": "x", "prompt": "a"}), 404, "model")
    message = {"role": "user", "content": "a", "foo": 1}
    error_of(server.post(CHAT, {"messages": [message]}), 400, "messages.0.foo", "unknown_parameter")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages.0"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": 1}], "messages.0.content"),
        ([{"role": "function", "content": "a"}], "messages.0.role"),
        ([{"role": "tool", "content": "a"}], "messages.0.tool_call_id"),
        ([{"role": "user", "content": "a", "name": "bob"}], "messages.0.name"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages.0.tool_calls.0.id"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
    ],
)
def test_messages_that_are_none(server, messages, param):
    error_of(server.post(CHAT, {"messages": messages}), 400, param)


@pytest.mark.parametrize(
    "prompt", [None, 1, {}, [], [[]], ["a", 1], [1, "a"], [1.5], [-1], [260], [[1], [999]], "", [""]]
)
def test_prompts_that_are_none(server, prompt):
    answer = server.complete(prompt)
    assert error_of(answer, 400, answer.json()["error"]["param"]).startswith("prompt")


def test_fields_that_need_another(server):
    error_of(server.chat("a", top_logprobs=1), 400, "top_logprobs")
    error_of(server.chat("a", stream_options={"include_usage": True}), 400, "stream_options")
    error_of(
        server.chat("a", stream=True, stream_options={"include_obfuscation": True}),
        400,
        "stream_options.include_obfuscation",
    )
    error_of(server.chat("a", max_tokens=1, max_completion_tokens=2), 400, "max_tokens")
    error_of(server.complete("a", max_tokens=0), 400, "max_tokens")
    error_of(server.complete(["a"] * 65, n=2), 400, "prompt")
    error_of(server.chat("a", logit_bias={"260": 1}), 400, "logit_bias")


def test_neutral_values_of_what_is_not_served_pass(server):
    neutral = {
        "tools": [], "tool_choice": "none", "grammar": None, "parallel_tool_calls": None, "response_format": {"type": "text"}, "modalities": ["text"],
        "store": False, "service_tier": "auto", "metadata": None, "n": None, "stop": None, "logit_bias": None,
        "stream": False, "stream_options": None, "user": "me", "safety_identifier": "me", "prompt_cache_key": "k",
    }  # fmt: skip
    assert server.chat("say:a", **neutral).json()["choices"][0]["message"]["content"] == "a"


def test_unknown_model(server):
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "a"}]}
    assert "gpt-4o" in error_of(server.post(CHAT, body), 404, "model", "model_not_found")
    error_of(httpx.get(f"{server.url}/v1/models/a/b"), 404, "model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4o")
    error_of(httpx.post(f"{server.url}{CHAT}", json={"messages": []}), 400, "model", "missing_required_parameter")


def test_too_long_for_the_context(server):
    for path, body, field in [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 49}, "messages"),
        (PLAIN, {"prompt": "x" * 2000, "max_tokens": 49}, "prompt"),
        (PLAIN, {"prompt": "x" * 2048}, "prompt"),
    ]:
        message = error_of(server.post(path, body), 400, field, "context_length_exceeded")
        assert "2048" in message
        assert "2049" in message
    assert server.complete("x" * 2000, max_tokens=48).status_code == 200


def test_the_template_s_refusal_is_the_message(server):
    answer = server.post(CHAT, {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]})
    assert "no system role" in error_of(answer, 400, "messages")


def test_http_itself(server):
    error_of(httpx.get(f"{server.url}/nowhere"), 404)
    answer = httpx.get(f"{server.url}{CHAT}")
    assert error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert httpx.post(f"{server.url}/v1/responses/a").headers["allow"] == "DELETE, GET"
    error_of(server.post(CHAT, content=b"{", headers=JSON), 400)
    error_of(server.post(CHAT, content=b"\xff", headers=JSON), 400)
    error_of(server.post(CHAT, content=b"[]", headers=JSON), 400)
    error_of(server.post(CHAT, content=b"", headers=JSON), 400)
    error_of(server.post(CHAT, content=b"[" * 100_000, headers=JSON), 400)
    error_of(server.post(CHAT, content=b"1" * 5000, headers=JSON), 400)
    error_of(server.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    error_of(server.post(CHAT, content=b"{}"), 415)


def test_bodies_that_are_too_large():
    with running(ScriptedEngine(), max_body=1000) as server:
        assert server.complete("say:" + "a" * 800, max_tokens=1).status_code == 200
        assert "1000" in error_of(server.complete("a" * 1000), 413)
        chunks = iter([b'{"model": "model", "prompt": "', b"a" * 600, b"a" * 600, b'"}'])  # no Content-Length
        error_of(server.post(PLAIN, content=chunks, headers=JSON), 413)
