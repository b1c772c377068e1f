"""Structured answers and tool calls over HTTP, as the official client asks for them and reads them."""

import json
import random
import threading
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from tests.serve.conftest import error_of, running  # noqa: E402
from tests.serve.random_schemas import RandomEngine, random_schema  # noqa: E402
from tests.serve.scripted_engine import CONTROL, ScriptedEngine  # noqa: E402
from tests.serve.test_http import raw_request  # noqa: E402

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HERMES = '{% if tools %}<tool_call>{"name": n, "arguments": a}</tool_call>{% endif %}'
LLAMA = '<|start_header_id|>{% if tools %}{"name": n, "parameters": p}{% endif %}'
MISTRAL = "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]["
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOON = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


class Person(BaseModel):
    name: Literal["Ann", "Bob"]
    age: int
    friends: list["Person"] | None


class City(BaseModel):
    city: str


class Empty(BaseModel):
    pass


def knowing(engine, template):
    engine.tool_template = template
    return engine


@pytest.fixture(scope="module")
def tooled():
    with running(knowing(ScriptedEngine(), HERMES)) as server:
        yield server


def user(text):
    return [{"role": "user", "content": text}]


def ask_whole(server, said, **more):
    body = {"model": "model", "messages": user(f"say:{said}"), "temperature": 0, **more}
    return server.client.chat.completions.create(**body).choices[0]


def ask(server, said, **more):
    """The whole answer by the official client, checked against the same answer streamed."""
    whole = ask_whole(server, said, **more)
    body = {"model": "model", "messages": user(f"say:{said}"), "temperature": 0, **more}
    with server.client.chat.completions.stream(**body) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    assert calls_of(streamed.message) == calls_of(whole.message)
    return whole


def calls_of(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


# Schemas


def test_parse_gives_the_pydantic_model(server):
    said = '{"name": "Ann", "age": 3, "friends": [{"name": "Bob", "age": -4, "friends": null}]}'
    answer = server.client.chat.completions.parse(model="model", messages=user(f"say:{said}"), response_format=Person)
    assert answer.choices[0].message.parsed == Person.model_validate_json(said)
    assert answer.choices[0].finish_reason == "stop"


def test_the_parse_helpers_of_the_other_endpoints_give_the_model_too(server):
    said = '{"name": "Bob", "age": 4, "friends": null}'
    wanted = Person.model_validate_json(said)
    assert server.client.responses.parse(model="model", input=f"say:{said}", text_format=Person).output_parsed == wanted
    with server.client.responses.stream(model="model", input=f"say:{said}", text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == wanted
    with server.client.chat.completions.stream(
        model="model", messages=user(f"say:{said}"), response_format=Person
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == wanted


def test_the_parse_helper_of_anthropic_s_client(server):
    anthropic = pytest.importorskip("anthropic")

    class Place(BaseModel):
        city: Literal["Rome", "Oslo"]

    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=30)
    asked = {"model": "model", "max_tokens": 40, "messages": user('say:{"city": "Oslo"}'), "output_format": Place}
    assert client.messages.parse(**asked).parsed_output == Place(city="Oslo")
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().parsed_output == Place(city="Oslo")


def test_the_helpers_see_several_calls_of_one_answer(tooled):
    tools = [openai.pydantic_function_tool(City, name="get_weather"), openai.pydantic_function_tool(Empty, name="now")]
    asked = {"model": "model", "messages": user(f"say:{PARIS}\n{NOON}"), "tools": tools}
    whole = tooled.client.chat.completions.parse(**asked)
    with tooled.client.chat.completions.stream(**asked) as stream:
        ended = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion()
    assert ended == ["get_weather", "now"]
    for answer in (whole, streamed):
        calls = [call.function.parsed_arguments for call in answer.choices[0].message.tool_calls]
        assert calls == [City(city="Paris"), Empty()]


def test_an_answer_that_wants_to_be_something_else_is_held_to_the_schema(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}, "strict": True}}
    assert ask(server, "maybe", response_format=form).message.content in ('"yes"', '"no"')
    assert json.loads(ask(server, '{"a": [1]}', response_format={"type": "json_object"}).message.content) == {"a": [1]}
    cut = ask_whole(server, '{"a": "long', response_format={"type": "json_object"}, max_tokens=9)
    assert (cut.message.content, cut.finish_reason) == ('{"a": "lo', "length")


def test_random_schemas_over_http_end_valid_or_with_length():
    draw = random.Random(3)
    with running(RandomEngine(closing=6.0, slots=4)) as server:
        for n in range(12):
            wanted = random_schema(draw)
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted, "strict": True}}
            for choice in server.chat("x", response_format=form, max_tokens=60, n=2, seed=n).json()["choices"]:
                if choice["finish_reason"] == "stop":
                    jsonschema.validate(json.loads(choice["message"]["content"]), wanted)
                else:
                    assert choice["finish_reason"] == "length"


def test_grammars_as_llama_server_and_vllm_take_them(server):
    def complete(**more):
        return server.complete("say:12:30!", temperature=0, **more).json()["choices"][0]["text"]

    assert complete(structured_outputs={"regex": r"\d\d:\d\d"}) == "12:30"
    assert complete(structured_outputs={"choice": ["12:30", "12"]}) == "12:30"
    assert complete(structured_outputs={"json": {"type": "integer", "maximum": 12}}) == "12"
    assert complete(grammar='root ::= [0-9:]+ "!"') == "12:30!"
    assert complete(structured_outputs={"grammar": 'start: "12" /[:;]/'}) == "12:"
    object_with_schema = {
        "type": "json_object",
        "schema": {"properties": {"a": {"type": "null"}}, "required": ["a"], "type": "object"},
    }
    assert json.loads(ask(server, "x", response_format=object_with_schema).message.content) == {"a": None}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format.json_schema.name", "match"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}, "strict": True}}}, "response_format.json_schema.schema", "not"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "json_object"),
        ({"grammar": "root ::= x"}, "grammar", "x"),
        ({"grammar": 'root ::= "a"', "structured_outputs": {"regex": "a"}}, "grammar", "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs.regex", "response_format"),
        ({"structured_outputs": {"regex": "a"}, "tools": [WEATHER]}, "structured_outputs.regex", "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "match"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tools": [NOW] * 129}, "tools", "128"),
        ({"tools": [NOW, {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "array", "uniqueItems": True}}}]}, "tools.1.function.parameters", "uniqueItems"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://x/y"}}}]}, "tools.0.function.parameters", "outside"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": "any", "tools": [NOW]}, "tool_choice", "required"),
        ({"tool_choice": {"type": "custom"}, "tools": [NOW]}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [NOW]}, "tool_choice", "'g'"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "tools"),
    ],
)  # fmt: skip
def test_forms_that_can_t_be_given_are_refused_by_name(server, fields, param, word):
    assert word in error_of(server.chat("say:a", **fields), 400, param)


CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "assistant", "content": "a", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": "[1"}}]}], "messages.0.tool_calls.0.function.arguments"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": "[1]"}}]}], "messages.0.tool_calls.0.function.arguments"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}], "messages.0.tool_calls.0.id"),
        ([{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "a"}], "messages.1.tool_call_id"),
        ([{"role": "tool", "content": "a", "tool_call_id": "c1"}], "messages.0.tool_call_id"),
        ([{"role": "assistant", "tool_calls": []}], "messages.0.content"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "a", "tool_call_id": "c1"}], "messages.0.tool_call_id"),
    ],
)  # fmt: skip
def test_messages_about_tools_that_are_none(server, messages, param):
    error_of(server.post(CHAT, {"messages": messages}), 400, param)


# Tools


def test_a_call_whole_and_streamed(tooled):
    answer = ask(tooled, f"Well. {PARIS}\n{NOON}", tools=[WEATHER, NOW])
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Well. "
    assert calls_of(answer.message) == [("get_weather", '{"city": "Paris"}'), ("now", "{}")]
    assert len({call.id for call in answer.message.tool_calls}) == 2
    assert tooled.engine.told[1] == [
        WEATHER,
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ]


def test_arguments_are_streamed_as_they_are_written(tooled):
    chunks = tooled.events(CHAT, {"messages": user(f"say:{PARIS}"), "tools": [WEATHER], "temperature": 0})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": None}
    first = deltas[1]["tool_calls"][0]
    assert (first["index"], first["type"], first["function"]) == (
        0,
        "function",
        {"name": "get_weather", "arguments": ""},
    )
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas[2:-1]]
    assert "".join(pieces) == '{"city": "Paris"}'
    assert len(pieces) == len("".join(pieces)), "a token a piece"
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert "<" not in json.dumps(deltas)


def test_logprobs_of_a_call_are_all_there(tooled):
    body = {"messages": user(f"say:{PARIS}"), "tools": [WEATHER], "temperature": 0, "logprobs": True}
    whole = tooled.post(CHAT, body).json()["choices"][0]["logprobs"]["content"]
    chunks = tooled.events(CHAT, body)[:-1]
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert "".join(entry["token"] for entry in whole) == PARIS
    assert streamed == whole


def test_a_begun_call_must_be_a_call(tooled):
    answer = ask(tooled, '<tool_call>\n{"name": "get_weather", "arguments": {"town": 1}}</tool_call>', tools=[WEATHER])
    assert answer.finish_reason in ("tool_calls", "length")
    [(name, arguments)] = calls_of(answer.message)[:1]
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), CITY)


def test_text_stays_text_with_tools_and_without(tooled):
    for more in [{"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "auto"}]:
        answer = ask(tooled, "no <tool> {here}", **more)
        assert (answer.message.content, answer.finish_reason, answer.message.tool_calls) == (
            "no <tool> {here}",
            "stop",
            None,
        )
    answer = ask(tooled, PARIS, tools=[WEATHER], tool_choice="none")
    assert (answer.message.content, answer.message.tool_calls) == (PARIS, None)
    assert tooled.engine.told[1] is None


def test_tool_choice_says_which(tooled):
    both = {"tools": [WEATHER, NOW]}
    named = ask(tooled, "no", **both, tool_choice={"type": "function", "function": {"name": "now"}}, max_tokens=200)
    assert calls_of(named.message) == [("now", "{}")]
    assert named.finish_reason == "tool_calls"
    required = ask(tooled, PARIS, **both, tool_choice="required", parallel_tool_calls=False)
    assert calls_of(required.message) == [("get_weather", '{"city": "Paris"}')]
    one = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
    }
    allowed = ask(tooled, NOON, **both, tool_choice=one)
    assert calls_of(allowed.message) == [("now", "{}")]
    single = ask(tooled, f"{PARIS}\n{NOON}", **both, parallel_tool_calls=False)
    assert calls_of(single.message) == [("get_weather", '{"city": "Paris"}')]


@pytest.mark.parametrize("template", [None, HERMES, LLAMA, MISTRAL, "<start_of_turn>", "[TOOL_CALLS]f[ARGS]{{tools}}"])
def test_required_gives_valid_calls_from_random_logits_in_every_format(template):
    with running(knowing(RandomEngine(closing=5.0), template)) as server:
        finished = 0
        for seed in range(6):
            body = {"messages": user("x"), "tools": [WEATHER, NOW], "tool_choice": "required", "max_tokens": 300}
            choice = server.post(CHAT, {**body, "seed": seed}).json()["choices"][0]
            calls = choice["message"]["tool_calls"]
            whole = calls if choice["finish_reason"] == "tool_calls" else calls[:-1]
            finished += choice["finish_reason"] == "tool_calls"
            for call in whole:
                wanted = CITY if call["function"]["name"] == "get_weather" else {"maxProperties": 0}
                jsonschema.validate(json.loads(call["function"]["arguments"]), wanted)
        assert finished > 0


def test_a_call_that_is_cut_says_length(tooled):
    answer = ask_whole(tooled, PARIS, tools=[WEATHER], max_tokens=60)
    assert answer.finish_reason == "length"
    [(name, arguments)] = calls_of(answer.message)
    assert name == "get_weather"
    assert '{"city": "Paris"}'.startswith(arguments)
    whole = ask_whole(tooled, f"{PARIS}\n{NOON}", tools=[WEATHER, NOW], max_tokens=len(PARIS))
    assert (calls_of(whole.message), whole.finish_reason) == ([("get_weather", '{"city": "Paris"}')], "length")


def test_a_schema_for_the_text_beside_tools(tooled):
    form = {"type": "json_object"}
    assert ask(tooled, '{"a": 1}', tools=[WEATHER], response_format=form).message.content == '{"a": 1}'
    assert ask(tooled, PARIS, tools=[WEATHER], response_format=form).finish_reason == "tool_calls"
    with running(knowing(ScriptedEngine(), LLAMA)) as server:
        error_of(server.chat("say:a", tools=[WEATHER], response_format=form), 400, "response_format")


def test_the_conversation_goes_on_after_a_call(tooled):
    messages = [
        *user("Weather?"),
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "say:sunny"},
    ]  # fmt: skip
    answer = tooled.client.chat.completions.create(model="model", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "sunny"
    told = tooled.engine.told[0]
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert (told[2]["role"], told[2]["tool_call_id"], told[2]["name"]) == ("tool", "c1", "get_weather")


def test_a_client_that_hangs_up_in_a_constrained_answer_frees_the_engine():
    engine = RandomEngine(closing=-9.0)
    with running(engine) as server:
        body = {"prompt": "x", "max_tokens": 2000, "structured_outputs": {"regex": "(.|\n)*x"}}
        for stream in (True, False):
            connection = raw_request(server.url, {**body, "stream": stream})
            assert server.wait(lambda: engine.running)
            connection.close()
            assert server.wait(lambda: not engine.running)


def test_constrained_and_free_requests_side_by_side():
    with running(knowing(ScriptedEngine(slots=3), HERMES)) as server:
        found = {}

        def one(number):
            more = [{}, {"tools": [WEATHER]}, {"structured_outputs": {"regex": "b+"}}][number % 3]
            found[number] = server.chat("say:bbbb", temperature=0, max_tokens=4, **more).json()["choices"][0][
                "message"
            ]["content"]

        threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found.values()) == {"bbbb"}
        assert len(found) == 9


def test_a_refusal_reaches_the_official_client(tooled):
    with pytest.raises(openai.BadRequestError) as refusal:
        tooled.client.chat.completions.create(
            model="model",
            messages=user("a"),
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "x"}},
        )
    assert refusal.value.param == "tool_choice"


def test_a_grammar_that_can_t_be_followed_to_its_end_is_an_error_that_says_so():
    class Dumb(ScriptedEngine):
        def token_bytes(self, token, special):
            return b"" if token == ord("b") else super().token_bytes(token, special)

    with running(Dumb()) as server:
        answer = server.complete("say:aab", structured_outputs={"regex": "aab"})
        assert "no token" in error_of(answer, 400, code="grammar_too_hard")
        assert server.complete("say:aa", structured_outputs={"regex": "aa"}).json()["choices"][0]["text"] == "aa"


def test_tools_are_told_in_words_where_the_template_knows_none():
    with running(ScriptedEngine()) as server:  # whose template refuses a system message, too
        answer = ask(server, PARIS, tools=[WEATHER])
        assert calls_of(answer.message) == [("get_weather", '{"city": "Paris"}')]
        [message] = server.engine.told[0]
        assert message["role"] == "user"
        assert '"get_weather"' in message["content"]


def test_a_marker_that_is_a_control_token_is_read_as_its_letters():
    class Marked(ScriptedEngine):
        def token_bytes(self, token, special):
            return (b"[TOOL_CALLS]" if special else b"") if token == CONTROL else super().token_bytes(token, special)

        def _row(self, sequence):
            row = super()._row(sequence)
            row[CONTROL] = 2 * row[1]  # the script's byte 1 stands for the marker
            return row

    with running(knowing(Marked(), MISTRAL)) as server:
        said = '\x01[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
        for choice in ("auto", "required"):
            answer = ask(server, said, tools=[WEATHER], tool_choice=choice)
            assert calls_of(answer.message) == [("get_weather", '{"city": "Paris"}')]
            assert answer.message.content is None
        assert ask(server, "a\x01b").message.content == "ab"


def test_the_other_endpoints_call_tools_and_keep_schemas_too(tooled):
    function = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": False}
    for stream in (False, True):
        asked = {"model": "model", "input": f"say:{PARIS}", "tools": [function], "temperature": 0, "stream": stream}
        found = tooled.client.responses.create(**asked)
        output = list(found)[-1].response.output if stream else found.output
        assert [(item.type, item.name, item.arguments) for item in output] == [
            ("function_call", "get_weather", '{"city": "Paris"}')
        ]
    tool = {"name": "get_weather", "input_schema": CITY}
    asked = {"messages": user(f"say:{PARIS}"), "tools": [tool], "temperature": 0, "max_tokens": 200}
    answer = tooled.post("/v1/messages", asked).json()
    assert answer["stop_reason"] == "tool_use"
    [block] = answer["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}, "strict": True}}
    parsed = tooled.client.responses.create(model="model", input="say:maybe", text=form, temperature=0)
    assert parsed.output_text in ('"yes"', '"no"')
