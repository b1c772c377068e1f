"""Anthropic's Messages API, judged by the official client with strict validation."""

import json

import httpx
import pytest
from pydantic import TypeAdapter

anthropic = pytest.importorskip("anthropic")

from anthropic.types import Message, RawMessageStreamEvent  # noqa: E402

from llmlite.serve.messages_answer import MessageRetelling  # noqa: E402
from llmlite.serve.messages_schema import MessagesRequest  # noqa: E402
from tests.serve.conftest import KEY, key_file, running  # noqa: E402
from tests.serve.scripted_engine import ScriptedEngine  # noqa: E402
from tests.serve.test_responses import CHOICES, USAGE  # noqa: E402

PATH = "/v1/messages"


def client_of(server, key="none"):
    return anthropic.Anthropic(
        base_url=server.url, api_key=key, max_retries=0, timeout=30, _strict_response_validation=True
    )


def said(server, content, **more):
    asked = {"model": "model", "max_tokens": 40, "messages": [{"role": "user", "content": content}], **more}
    return client_of(server).messages.create(**asked)


def refusal(answer, status, kind="invalid_request_error"):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"type", "error"}
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind
    return answer.json()["error"]["message"]


def post(server, path=PATH, **body):
    return server.post(path, {"max_tokens": 9, "messages": [{"role": "user", "content": "say:a"}], **body})


def test_a_whole_message(server):
    answer = said(
        server, "say:héllo", extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 3}, metadata={"user_id": "me"}
    )
    assert [block.text for block in answer.content] == ["héllo"]
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", "model")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 7)
    assert answer.usage.cache_read_input_tokens == 0
    assert said(server, "say:abcdef", max_tokens=3).stop_reason == "max_tokens"


def test_a_prompt_in_the_cache_is_told_apart(server):
    said(server, "x" * 300 + "say:a")
    usage = said(server, "x" * 300 + "say:a").usage
    assert usage.cache_read_input_tokens == 256
    assert usage.input_tokens == 305 - 256


def test_the_stop_sequence_that_was_met_is_named(server):
    for stream in (False, True):
        answer = said(server, "say:abcdefghij", stop_sequences=["zz", "ef", "cd"], stream=stream)
        if stream:
            events = list(answer)
            text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
            ending = next(event for event in events if event.type == "message_delta")
            found = (text, ending.delta.stop_reason, ending.delta.stop_sequence, ending.usage.output_tokens)
        else:
            found = (answer.content[0].text, answer.stop_reason, answer.stop_sequence, answer.usage.output_tokens)
        assert found == ("ab", "stop_sequence", "cd", 4)


def test_a_stop_sequence_ends_the_work_too():
    engine = ScriptedEngine()
    with running(engine) as server:
        assert said(server, "slow say:ab" + "x" * 900, max_tokens=900, stop_sequences=["b"]).content[0].text == "a"
        assert server.wait(lambda: not engine.running)
        assert len(engine.calls) < 50


def test_the_events_of_a_stream_in_their_order(server):
    raw = server.post(PATH, {"max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "say:hé"}]})
    names = [part.partition("\n")[0].removeprefix("event: ") for part in raw.text.split("\n\n") if part]
    events = [json.loads(part.partition("data: ")[2]) for part in raw.text.split("\n\n") if part]
    assert names == [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 7)
    assert [event["delta"]["text"] for event in events[2:4]] == ["h", "é"]
    assert events[5]["delta"]["stop_reason"] == "end_turn"
    with client_of(server).messages.stream(
        model="model", max_tokens=9, messages=[{"role": "user", "content": "say:abc"}]
    ) as stream:
        assert "".join(stream.text_stream) == "abc"
        assert stream.get_final_message().usage.output_tokens == 4


def test_turns_and_blocks(server):
    part = {"type": "text", "text": "say:x", "cache_control": {"type": "ephemeral"}}
    assert said(server, [part, {"type": "text", "text": "y"}]).content[0].text == "x\ny"
    turns = [
        {"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
        {"role": "user", "content": "say:d"},
    ]  # fmt: skip
    assert said(server, "", messages=turns).content[0].text == "d"
    assert "no system role" in refusal(post(server, system=[{"type": "text", "text": "s"}]), 400)


def test_an_answer_without_text_has_no_block(server):
    answer = said(server, "say:")
    assert (answer.content, answer.stop_reason) == ([], "end_turn")


def test_count_tokens_counts_the_prompt(server):
    count = client_of(server).messages.count_tokens(model="model", messages=[{"role": "user", "content": "say:hé"}])
    assert count.input_tokens == said(server, "say:hé").usage.input_tokens == 7
    long = client_of(server).messages.count_tokens(model="model", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.input_tokens == 5000, "longer than the context, and counted all the same"


REFUSED = {
    "max_tokens": 0, "temperature": 1.5, "top_k": -1, "stop_sequences": [""], "thinking": {"type": "adaptive"},
    "service_tier": "priority", "speed": "fast", "container": "c", "mcp_servers": [], "output_config": {"effort": "low"},
    "tool_choice": {"type": "tool"}, "messages": [],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_what_is_refused_is_named(server, field, value):
    assert refusal(post(server, **{field: value}), 400).startswith(field)


@pytest.mark.parametrize(
    ("turn", "place"),
    [
        ({"role": "system", "content": "a"}, "messages.0.role"),
        ({"role": "user", "content": [{"type": "image", "source": {}}]}, "messages.0.content.0"),
        (
            {"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            "messages.0.content",
        ),
        ({"role": "assistant", "content": "a"}, "messages.0"),
        ({"role": "user"}, "messages.0.content"),
    ],
)
def test_turns_that_are_none(server, turn, place):
    assert refusal(post(server, messages=[turn]), 400).startswith(place)


def test_no_field_of_the_official_client_is_left_out():
    from anthropic.types.message_create_params import MessageCreateParamsBase

    headers = {"user_profile_id", "workspace_id"}
    known = set(MessagesRequest.model_fields)
    assert set(MessageCreateParamsBase.__annotations__) - known - headers == set()


def test_errors_have_anthropic_s_shape(server, tmp_path):
    refusal(server.post(PATH, content=b"{", headers={"content-type": "application/json"}), 400)
    refusal(server.post(PATH, content=b"{}"), 415)
    refusal(httpx.get(f"{server.url}{PATH}"), 405)
    refusal(post(server, messages=[{"role": "user", "content": "boom"}]), 500, "api_error")
    assert "gpt" in refusal(server.post(PATH, {"model": "gpt", "max_tokens": 1, "messages": [
        {"role": "user", "content": "a"}]}), 404, "not_found_error")  # fmt: skip
    with pytest.raises(anthropic.BadRequestError, match="context is 2048 tokens"):
        said(server, "x" * 2048)
    with running(ScriptedEngine(), api_key_file=key_file(tmp_path / "keys")) as locked:
        refusal(post(locked), 401, "authentication_error")
        assert client_of(locked, KEY).messages.count_tokens(
            model="model", messages=[{"role": "user", "content": "abc"}]
        ).input_tokens == 3  # fmt: skip


def test_a_failure_in_the_middle_of_a_stream_is_an_event():
    engine = ScriptedEngine()
    step = engine.step
    engine.step = lambda sequences, tokens: 1 / 0 if len(engine.calls) > 4 else step(sequences, tokens)
    with running(engine) as server, pytest.raises(anthropic.APIStatusError, match="internal error"):
        list(said(server, "say:abcdefgh", stream=True))


# Tools: the chat endpoint's business; here only how its calls are told


def test_calls_are_blocks_with_streamed_input():
    retelling = MessageRetelling(MessagesRequest(model="m", max_tokens=9, messages=[{"role": "user", "content": "a"}]))
    events = retelling.opening(USAGE)
    for part in CHOICES:
        events += json.loads(json.dumps(retelling.take(part)))
    events += retelling.closing(USAGE)
    adapter = TypeAdapter(RawMessageStreamEvent)
    typed = [adapter.validate_python(event) for event in events]
    assert [event.type for event in typed] == [
        "message_start",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [event.index for event in typed if event.type == "content_block_start"] == [0, 1, 2]
    message = Message.model_validate(retelling.result())
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    assert [(block.id, block.name, block.input) for block in message.content[1:]] == [
        ("call_0", "f", {"x": 1}),
        ("call_1", "g", {}),
    ]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (3, 2)


def test_tools_reach_the_chat_endpoint_in_its_words(monkeypatch):
    passed = {}
    monkeypatch.setattr("llmlite.serve.messages_schema.chat_request", lambda fields, *_: passed.update(fields))
    MessagesRequest(
        model="m", max_tokens=9, tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        output_config={"format": {"type": "json_schema", "schema": {"a": 1}}},
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "t"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"é": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]},
                {"type": "tool_result", "tool_use_id": "2", "content": "no", "is_error": True},
                {"type": "text", "text": "go on"}]},
        ],
    ).as_chat()  # fmt: skip
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert passed["tools"] == [{"type": "function", "function": function}]
    assert (passed["tool_choice"], passed["parallel_tool_calls"]) == ("required", False)
    assert passed["response_format"]["json_schema"]["schema"] == {"a": 1}
    user, assistant, one, two, then = passed["messages"]
    assert assistant["content"] == "t"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"é": 1}'}
    assert one == {"role": "tool", "tool_call_id": "1", "content": "r"}
    assert two["content"] == "Error: no"
    assert (user["content"], then) == ("a", {"role": "user", "content": "go on"})
