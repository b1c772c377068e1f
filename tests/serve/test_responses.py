"""OpenAI's Responses API, judged by the official client with strict validation."""

import json

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from llmlite.serve.responses_answer import ResponseRetelling
from llmlite.serve.responses_schema import ResponsesRequest
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import ScriptedEngine

PATH = "/v1/responses"


def said(server, text, **more):
    return server.client.responses.create(model="model", input=text, **more)


def test_a_whole_response(server):
    answer = said(server, "say:héllo", metadata={"a": "b"}, temperature=0.5, max_output_tokens=20)
    assert answer.output_text == "héllo"
    assert (answer.status, answer.object, answer.store, answer.model) == ("completed", "response", False, "model")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (10, 7, 17)
    assert (answer.metadata, answer.temperature, answer.max_output_tokens) == ({"a": "b"}, 0.5, 20)
    assert answer.output[0].role == "assistant"
    assert answer.incomplete_details is None
    assert answer.id.startswith("resp_")


def test_what_max_output_tokens_cuts_is_incomplete(server):
    answer = said(server, "say:abcdef", max_output_tokens=3)
    assert answer.output_text == "abc"
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = said(server, "say:abcdef", max_output_tokens=3, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_the_events_of_a_stream_in_their_order(server):
    events = list(said(server, "say:hé", stream=True))
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(10))
    assert [event.delta for event in events[4:6]] == ["h", "é"]
    assert events[6].text == "hé"
    assert events[0].response.status == events[1].response.status == "in_progress"
    assert events[0].response.output == []
    final = events[-1].response
    assert (final.status, final.output_text, final.usage.output_tokens) == ("completed", "hé", 4)
    assert {event.item_id for event in events[3:8]} == {final.output[0].id}
    assert events[0].response.id == final.id


def test_the_client_s_own_stream_helper(server):
    with server.client.responses.stream(model="model", input="say:abc") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "abc"


def test_an_answer_without_text_is_a_message_all_the_same(server):
    answer = said(server, "say:")
    assert answer.output_text == ""
    assert [part.text for part in answer.output[0].content] == [""]
    assert [event.type for event in said(server, "say:", stream=True)][2:4] == [
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip


def test_items_and_instructions_become_messages(server):
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "say:x"}, {"type": "input_text", "text": "y"}]},
    ]  # fmt: skip
    assert said(server, items).output_text == "x\ny"
    assert "no system role" in error_of(server.post(PATH, {"input": "a", "instructions": "b"}), 400, "input")
    first = said(server, "say:a")
    again = [{"role": "user", "content": "q"}, first.output[0].model_dump(), {"role": "user", "content": "say:b"}]
    assert said(server, again).output_text == "b"


def test_logprobs(server):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = said(server, "say:hé", **asked).output[0].content[0].logprobs
    assert [entry.bytes for entry in whole] == [[104], [0xC3], [0xA9]]
    assert len(whole[0].top_logprobs) == 2
    events = said(server, "say:hé", stream=True, **asked)
    deltas = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.token for entry in deltas] == [entry.token for entry in whole]


REFUSED = {
    "background": True, "conversation": "c", "previous_response_id": "resp_1", "store": True, "truncation": "auto",
    "include": ["file_search_call.results"], "reasoning": {"effort": "low"}, "service_tier": "flex",
    "max_tool_calls": 1, "prompt": {"id": "p"}, "text": {"verbosity": "low"}, "max_output_tokens": 0,
    "tempreature": 1, "metadata": {"k" * 65: "v"}, "input": [], "temperature": 3,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_what_is_refused_is_named(server, field, value):
    answer = server.post(PATH, {"input": "say:a", field: value})
    assert answer.json()["error"]["param"].partition(".")[0] == field
    assert field in error_of(answer, 400, answer.json()["error"]["param"])


def test_no_field_of_the_official_client_is_left_out():
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    assert set(ResponseCreateParamsBase.__annotations__) - set(ResponsesRequest.model_fields) == set()


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"type": "item_reference", "id": "x"}], "input.0"),
        ([{"type": "reasoning", "id": "x", "summary": []}], "input.0"),
        (["a"], "input.0"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0.type"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "input.1.content"),
        ([{"type": "function_call", "call_id": "c", "name": "f"}], "input.0.arguments"),
    ],
)
def test_items_that_are_none(server, items, param):
    error_of(server.post(PATH, {"input": items}), 400, param)


def test_what_the_chat_endpoint_refuses_has_the_name_that_it_has_here(server):
    long = server.post(PATH, {"input": "x" * 2048})
    assert "2048" in error_of(long, 400, "input", "context_length_exceeded")


def test_nothing_is_stored(server):
    answer = said(server, "say:a")
    for call in (server.client.responses.retrieve, server.client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="stores none"):
            call(answer.id)
    error_of(httpx.get(f"{server.url}{PATH}/{answer.id}"), 404, "response_id", "not_stored")


def test_a_failure_in_the_middle_of_a_stream_is_the_last_event():
    engine = ScriptedEngine()
    step = engine.step
    engine.step = lambda pieces: 1 / 0 if len(engine.calls) > 4 else step(pieces)
    with running(engine) as server:
        *_, last = said(server, "say:abcdefgh", stream=True)
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert last.response.error.code == "server_error"
        assert "division" not in last.response.error.message
        with pytest.raises(openai.InternalServerError):
            said(server, "boom", stream=True)


# Tools: the chat endpoint's business; here only how its calls are told


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


def choice(delta, finish=None):
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def call(index, arguments, **first):
    return {"tool_calls": [{"index": index, **first, "function": {"arguments": arguments}}]}


def opened(index, name):
    start = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    return {"tool_calls": [start]}


CHOICES = [
    choice({"role": "assistant", "content": ""}), choice({"content": "Let me "}), choice({"content": "see"}),
    choice(opened(0, "f")), choice(call(0, '{"x"')), choice(call(0, ": 1}")),
    choice(opened(1, "g")), choice(call(1, "{}")), choice({}, "tool_calls"),
]  # fmt: skip
USAGE = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 2}}


def test_function_calls_are_items_with_streamed_arguments():
    retelling = ResponseRetelling(ResponsesRequest(model="m", input="a", tools=[TOOL], tool_choice="required"))
    events = json.loads(json.dumps(retelling.opening(USAGE)))
    for part in CHOICES:
        events += json.loads(json.dumps(retelling.take(part)))
    events += json.loads(json.dumps(retelling.closing(USAGE)))
    adapter = TypeAdapter(ResponseStreamEvent)
    typed = [adapter.validate_python(event) for event in events]
    kinds = [event.type.removeprefix("response.") for event in typed]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    final = typed[-1].response
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert [(item.name, item.arguments, item.call_id) for item in final.output[1:]] == [
        ("f", '{"x": 1}', "call_0"),
        ("g", "{}", "call_1"),
    ]
    assert final.usage.input_tokens_details.cached_tokens == 2
    assert final.tools[0].name == "f"
    places = {event["item_id"]: event["output_index"] for event in events if "item_id" in event}
    assert sorted(places.values()) == [0, 1, 2]


def test_tools_and_formats_reach_the_chat_endpoint_in_its_words(monkeypatch):
    passed = {}
    monkeypatch.setattr("llmlite.serve.responses_schema.chat_request", lambda fields, *_: passed.update(fields))
    ResponsesRequest(
        model="m", tools=[TOOL, {"type": "web_search"}], tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False, text={"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}}},
        input=[
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        ],
    ).as_chat()  # fmt: skip
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert passed["tools"] == [{"type": "function", "function": function}, {"type": "web_search"}]
    assert passed["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert passed["parallel_tool_calls"] is False
    assert passed["response_format"] == {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}
    user, calls, one, two = passed["messages"]
    assert user == {"role": "user", "content": "a"}
    assert [made["function"]["name"] for made in calls["tool_calls"]] == ["f", "g"]
    assert (calls["role"], calls["content"]) == ("assistant", None)
    assert one == {"role": "tool", "tool_call_id": "1", "content": "one"}
    assert two["content"] == "two"
