"""The HTTP side over a scripted engine: each field honoured or refused, each failure an error object."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from llmlite.serve.schema import ChatRequest, CompletionRequest
from tests.serve.conftest import running
from tests.serve.scripted_engine import CONTROL, ScriptedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server():
    manifest = {"format": "gguf:q4_0", "base": {"source": "x"}, "evals": {"perplexity": 12.5}}
    with running(ScriptedEngine(), manifest) as server:
        yield server


def error_of(answer, status, param=None, code=None):
    """Checks that an answer is an error object and returns its message."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["type"]
    assert "Traceback" not in answer.text
    return error["message"]


# What goes right


def test_chat(server):
    answer = server.client.chat.completions.create(model="model", messages=[{"role": "user", "content": "say:héllo"}])
    assert answer.choices[0].message.content == "héllo"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 7, 17)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.system_fingerprint.startswith("fp_")


def test_streams_carry_the_same_text_in_whole_characters(server):
    text = "a🦙 你好 👩‍👩‍👧 é"
    chunks = server.events(CHAT, {"messages": [{"role": "user", "content": "say:" + text}]})
    assert chunks.pop() == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [choice["delta"]["content"] for choice in choices[1:-1]]
    assert "".join(pieces) == text
    assert len(pieces) == len(text), "a character a chunk, none of them split"
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", "model")
    }
    assert not any("usage" in chunk for chunk in chunks)


def test_the_official_client_reads_the_stream_and_its_usage(server):
    stream = server.client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "say:hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "hello"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6


def test_message_forms(server):
    def say(messages):
        return server.post(CHAT, {"messages": messages}).json()["choices"][0]["message"]["content"]

    assert (
        say([{"role": "user", "content": [{"type": "text", "text": "say:a"}, {"type": "text", "text": "b"}]}]) == "a\nb"
    )
    sent_back = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None,
                 "function_call": None, "tool_calls": None}  # fmt: skip
    assert say([{"role": "user", "content": "a"}, sent_back, {"role": "user", "content": "say:b"}]) == "b"


def test_completion_of_text_lists_and_ids(server):
    client = server.client
    assert client.completions.create(model="model", prompt="say:hi", max_tokens=9).choices[0].text == "hi"
    many = client.completions.create(model="model", prompt=["say:one", "say:two"], n=2, max_tokens=9)
    assert [(c.index, c.text) for c in many.choices] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]
    assert many.usage.prompt_tokens == 14
    assert many.usage.completion_tokens == 16
    ids = list(b"say:ids")
    assert client.completions.create(model="model", prompt=ids, max_tokens=2).choices[0].text == "id"
    both = client.completions.create(model="model", prompt=[ids, list(b"say:z")], max_tokens=9)
    assert [choice.text for choice in both.choices] == ["ids", "z"]


def test_streams_of_several_choices_are_told_apart_by_index(server):
    for path, body in [
        (CHAT, {"messages": [{"role": "user", "content": "say:abc"}], "n": 3}),
        (PLAIN, {"prompt": ["say:abc"] * 3}),
    ]:
        texts = {0: "", 1: "", 2: ""}
        for chunk in server.events(path, body)[:-1]:
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        assert texts == {0: "abc", 1: "abc", 2: "abc"}


@pytest.mark.parametrize("stop", ["cd", ["x", "cde", "cd"], "c"])
def test_stop_strings_end_the_text_and_are_not_in_it(server, stop):
    for answer in [server.chat("say:abcdef", stop=stop), server.complete("say:abcdef", stop=stop)]:
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice.get("text", choice.get("message", {}).get("content")) == "ab"
    chunks = server.events(PLAIN, {"prompt": "say:abcdef", "stop": stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "ab"


def test_max_tokens_is_length_and_both_its_names_work(server):
    for names in [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]:
        answer = server.chat("say:abcdef", **names).json()
        assert answer["choices"][0]["message"]["content"] == "abc"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3


def test_without_a_limit_the_context_is_the_limit():
    with running(ScriptedEngine(context=20)) as server:
        answer = server.chat("say:" + "x" * 6, logit_bias={"256": -100}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 20


def test_sampling_fields_reach_the_sampler(server):
    def say(**more):
        return server.complete("say:aaaa", max_tokens=4, **more).json()["choices"][0]["text"]

    assert say(temperature=0) == "aaaa"
    assert say(temperature=0, logit_bias={"98": 100}) == "bbbb"
    assert say(temperature=0, frequency_penalty=2, logit_bias={"98": 29.5}) == "abab"
    assert say(temperature=0, presence_penalty=2, logit_bias={"98": 29.5}) == "abaa"
    free = {"logit_bias": {"97": -30}, "seed": 3}  # all tokens alike
    assert say(**free) != say(**{**free, "seed": 4})
    assert say(**free) == say(**free)
    for cut in [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]:
        assert say(logit_bias={"97": -29}, seed=3, **cut) == "aaaa"
    many = server.complete("say:aaaa", max_tokens=4, n=4, **free).json()
    assert len({choice["text"] for choice in many["choices"]}) == 4
    assert many["choices"][0]["text"] == say(**free)


def test_default_temperature_is_one(server):
    texts = {server.complete("say:a", max_tokens=1, logit_bias={"97": -30}, seed=s).text for s in range(5)}
    assert len(texts) == 5


def test_chat_logprobs(server):
    answer = server.client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "say:hé"}], logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[104], [0xC3], [0xA9]]
    assert content[0].token == "h"
    assert all(-1e-6 < entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)
    assert content[0].top_logprobs[0].token == "h"
    plain = server.chat("say:h", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_logprobs_of_a_stop_string_are_cut_with_it(server):
    body = {"logprobs": True, "stop": "cd"}
    whole = server.chat("say:abcdef", **body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in whole] == ["a", "b"]
    chunks = server.events(CHAT, {"messages": [{"role": "user", "content": "say:abcdef"}], **body})
    streamed = [e for c in chunks[:-1] for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole


def test_tokens_that_add_no_text_are_scored_but_not_said(server):
    answer = server.complete("say:ab", max_tokens=2, logprobs=0, temperature=0, logit_bias={str(CONTROL): 100}).json()
    choice = answer["choices"][0]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"<{CONTROL}>"] * 2
    assert answer["usage"]["completion_tokens"] == 2


def test_completion_logprobs_and_echo(server):
    answer = server.complete("ésay:hé", echo=True, logprobs=1, temperature=0).json()["choices"][0]
    assert answer["text"] == "ésay:héhé"
    logprobs = answer["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", *"say:h", "bytes:\\xc3", "bytes:\\xa9", "h",
                                  "bytes:\\xc3", "bytes:\\xa9"]  # fmt: skip
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"]) == 12
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8]
    only = server.complete("say:h", echo=True, logprobs=0, max_tokens=0).json()
    assert only["choices"][0]["text"] == "say:h"
    assert only["usage"]["completion_tokens"] == 0
    chunks = server.events(PLAIN, {"prompt": "say:hé", "echo": True, "logprobs": 1, "temperature": 0})
    streamed = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["text"] for choice in streamed) == "say:héhé"
    joined = [token for choice in streamed for token in choice["logprobs"]["tokens"]]
    whole = server.complete("say:hé", echo=True, logprobs=1, temperature=0).json()["choices"][0]["logprobs"]
    assert joined == whole["tokens"]
    assert [o for choice in streamed for o in choice["logprobs"]["text_offset"]] == whole["text_offset"]
    assert server.complete("say:h", echo=True).json()["choices"][0]["logprobs"] is None


def test_models_carry_what_compression_cost(server):
    models = server.client.models.list().data
    assert [model.id for model in models] == ["model"]
    facts = server.client.models.retrieve("model").model_extra["llmlite"]
    assert facts["evals"] == {"perplexity": 12.5}
    assert facts["format"] == "gguf:q4_0"
    assert (facts["engine"], facts["context"]) == ({"name": "scripted", "version": "1"}, 2048)


def test_health(server):
    assert server.post("/health").status_code == 405
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


# What is refused

REFUSED_IN_CHAT = {
    "audio": {}, "function_call": "auto", "functions": [{}], "metadata": {"a": "b"}, "modalities": ["audio"],
    "moderation": {"model": "x"}, "parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h", "reasoning_effort": "low",
    "response_format": {"type": "json_object"}, "service_tier": "flex", "store": True, "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}], "verbosity": "low", "web_search_options": {},
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
        ([{"role": "tool", "content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": "a", "name": "bob"}], "messages.0.name"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages.0.tool_calls"),
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
        "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
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


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    with running(ScriptedEngine(), api_key_file=keys) as server:
        assert error_of(server.chat("say:a"), 401, code="invalid_api_key")
        for wrong in ["Bearer third", "Bearer", "first", "Basic first"]:
            error_of(httpx.get(f"{server.url}/v1/models", headers={"authorization": wrong}), 401)
        for right in ["first", "second"]:
            assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {right}"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


# What goes wrong behind it


def test_a_failing_request_is_500_and_the_next_one_works(server):
    for word in ["boom", "nan"]:
        assert "boom" not in error_of(server.chat(word), 500)
        error_of(server.chat(word, stream=True), 500)
    with pytest.raises(openai.InternalServerError):
        server.client.completions.create(model="model", prompt="boom")
    assert server.chat("say:a").status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event():
    engine = ScriptedEngine()
    step = engine.step
    engine.step = lambda sequences, tokens: 1 / 0 if len(engine.calls) > 4 else step(sequences, tokens)
    with running(engine) as server:
        events = server.events(PLAIN, {"prompt": "say:abcdefgh"})
        assert set(events[-1]) == {"error"}
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "abcde"
        with pytest.raises(openai.APIError):
            list(server.client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": "say:" + "x" * 20}], stream=True
            ))  # fmt: skip


def test_a_dead_engine_is_503_everywhere():
    with running(ScriptedEngine()) as server:
        error_of(server.chat("break"), 503, code="engine_dead")
        answer = httpx.get(f"{server.url}/health")
        error_of(answer, 503, code="engine_dead")
        error_of(server.chat("say:a"), 503, code="engine_dead")
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_a_full_queue_is_429_with_retry_after():
    engine = ScriptedEngine()
    with running(engine, max_queue=1) as server:
        long = {"prompt": "slow say:" + "x" * 60}
        threads = [threading.Thread(target=server.post, args=(PLAIN, long)) for _ in range(2)]
        for thread in threads:
            thread.start()
            assert server.wait(lambda: engine.calls)
        assert server.wait(lambda: httpx.get(f"{server.url}/health").json()["waiting"] == 1)
        answer = server.chat("say:a")
        error_of(answer, 429, code="queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert server.chat("say:a").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_client_that_hangs_up_frees_the_engine(stream, waiting):
    engine = ScriptedEngine()
    with running(engine) as server:
        prompts = ["slow say:" + "x" * 900] * (2 if waiting else 1)
        sockets = [raw_request(server.url, {"prompt": prompt, "stream": stream}) for prompt in prompts]
        assert server.wait(lambda: len(engine.calls) > 2)
        for connection in reversed(sockets):
            connection.close()
        steps = len(engine.calls)
        assert server.wait(lambda: not engine.running)
        assert len(engine.calls) - steps < 20, "it went on for long"
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def raw_request(url, body):
    """Sends a completion request and does not read the answer."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps({"model": "model", **body}).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_requests_side_by_side_do_not_mix():
    with running(ScriptedEngine(slots=3)) as server:
        found = {}

        def ask(name):
            found[name] = server.chat(f"say:{name * 30}").json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcdefgh"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: name * 30 for name in "abcdefgh"}
