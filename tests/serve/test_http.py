"""The HTTP side over a scripted engine: each field honoured or refused, each failure an error object."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from llmlite.serve.schema import ChatRequest
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import CONTROL, ScriptedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


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


def test_the_openapi_document_lists_every_field(server):
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    assert set(schemas["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    assert schemas["CompletionRequest"]["additionalProperties"] is False


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
    engine.step = lambda pieces: 1 / 0 if len(engine.calls) > 4 else step(pieces)
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
        long = {"prompt": "slow say:" + "x" * 60, "max_tokens": 60}
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
    head = f"POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
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


def test_completions_have_openai_s_default_length(server):
    choice = server.complete("say:" + "a" * 40, temperature=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 16, "length")
    full = server.complete("x" * 2043, temperature=0)
    assert full.status_code == 200, "five tokens are left, and that is no error"
