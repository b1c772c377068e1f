"""What hostile or careless clients meet before a route does: hosts, origins, bodies, slow and idle connections."""

import json
import socket
import time

import httpx
import pytest

from llmlite.serve import connection, guard, process
from llmlite.serve.keys import Keyring, StoredKey
from llmlite.serve.limits import Limits
from llmlite.serve.sizes import MAX_DEPTH, MAX_MESSAGES, MAX_PARTS, MAX_SCHEMA, check_body
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import ScriptedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
KEY = "a-key-of-some-length-0001"


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def talk(server, *pieces, pause=0.0):
    """Sends raw bytes, piece by piece; everything that is answered until the server closes the connection."""
    with connect(server) as raw:
        for piece in pieces:
            raw.sendall(piece)
            time.sleep(pause)
        return read_all(raw)


def read_all(raw):
    data = b""
    try:
        while part := raw.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def head(body_length, *more):
    lines = [f"POST {PLAIN} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {body_length}", "", ""]).encode()


# Who may ask


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "0", ""]
)
def test_a_page_whose_name_was_resolved_to_this_machine_is_refused(server, host):
    answer = httpx.get(f"{server.url}/v1/models", headers={"host": host})
    assert "Host" in error_of(answer, 403, code="host_not_allowed")
    assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_this_machine_by_its_names(server, host):
    assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200


def test_with_keys_any_host_will_do():
    keys = Keyring([StoredKey.of("a", KEY, Limits())])
    with running(ScriptedEngine(), keys=keys) as server:
        headers = {"host": "chat.example", "x-api-key": KEY}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_no_origin_is_let_in_unless_it_is_listed(server):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{server.url}{CHAT}", headers=preflight).status_code == 405
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers
    keys = Keyring([StoredKey.of("a", KEY, Limits())])
    with running(ScriptedEngine(), keys=keys, cors=("https://a.example",)) as listed:
        asked = {**preflight, "access-control-request-headers": "authorization,content-type"}
        answer = httpx.options(f"{listed.url}{CHAT}", headers=asked)
        assert answer.status_code == 200, "a preflight has no key"
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = httpx.get(f"{listed.url}/v1/models", headers={"origin": "https://a.example"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"
        other = httpx.options(f"{listed.url}{CHAT}", headers={**asked, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# Bodies


def nested(depth):
    return b'{"model": "model", "prompt": ' + b"[" * depth + b"1" + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (nested(MAX_DEPTH), 400, "nested"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"a":' * 100_000, 400, "nested"),
        (b'"' + b"[" * 1000, 400, "not JSON"),
        (b'["\\"' + b"[" * 1000 + b'"]', 400, "must be a JSON object"),
        (b'{"a":"\\', 400, "not JSON"),
        (b"[" + b"[]," * MAX_PARTS + b"[]]", 413, "texts, arrays and objects"),
        (b'{"model":"model","prompt":"' + b"a" * 5000 + b'"}', 413, "longer than 4000 bytes"),
        (b'{"model":"model","prompt":"' + b"a" * 5000, 413, "longer than 4000 bytes"),
        (b'{"' + b"k" * 5000 + b'":1}', 413, "longer than 4000 bytes"),
        (b'{"model":"model","prompt":"say:' + b"a" * 1900 + b'","max_tokens":1}', 200, ""),
        (nested(1).replace(b"[1]", b'["say:[[[[{{{{]]]]"]'), 200, ""),
    ],
)
def test_bodies_that_cost_more_than_they_say(small, body, status, said):
    answer = small.post(PLAIN, content=body, headers=JSON)
    assert said in (error_of(answer, status) if status != 200 else answer.text)


@pytest.fixture(scope="module")
def small():
    with running(ScriptedEngine(), max_text=4000) as server:
        yield server


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 2**20, b'"' + b"\\" * (2**21 + 1), b"\\" * 2**21])
def test_a_hostile_body_is_looked_through_once(body):
    """A pattern that goes back would take minutes for these."""
    begun = time.process_time()
    check_body(body, max_text=2**24)
    assert time.process_time() - begun < 5


def test_bodies_larger_than_the_limit():
    with running(ScriptedEngine(), max_body=1000) as server:
        assert server.complete("say:" + "a" * 800, max_tokens=1).status_code == 200
        assert "1000" in error_of(server.complete("a" * 1000), 413)
        chunks = iter([b'{"model": "model", "prompt": "', b"a" * 600, b"a" * 600, b'"}'])  # no Content-Length
        assert "1000" in error_of(server.post(PLAIN, content=chunks, headers=JSON), 413)
        assert server.complete("say:a").status_code == 200


def test_too_many_messages_and_too_large_schemas(server):
    messages = [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)
    assert str(MAX_MESSAGES) in error_of(server.post(CHAT, {"messages": messages}), 400, "messages", "too_many")
    asked = {"messages": messages[:1]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * MAX_SCHEMA}}}
    error_of(server.post(CHAT, {**asked, "tools": [{}, tool]}), 400, "tools.1", "too_large")
    error_of(server.post(CHAT, {**asked, "tools": [{}] * 129}), 400, "tools", "too_many")
    form = {"type": "json_schema", "json_schema": {"schema": {"description": "x" * MAX_SCHEMA}}}
    error_of(server.post(CHAT, {**asked, "response_format": form}), 400, "response_format", "too_large")


def test_bodies_that_never_end(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with running(ScriptedEngine()) as server:
        answer = talk(server, head(100) + b'{"model"')
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"type":"invalid_request_error"' in answer
        assert server.complete("slow say:" + "x" * 15).status_code == 200, "the limit is the body's, not the request's"


def test_bodies_that_together_fill_the_memory(monkeypatch):
    monkeypatch.setattr(guard, "HELD_BODIES", 1)
    with running(ScriptedEngine(), max_body=1000) as server, connect(server) as first:
        first.sendall(head(1000) + b"a" * 900)
        assert server.wait(lambda: server.complete("x" * 300).status_code == 503)
        first.close()
        assert server.wait(lambda: server.complete("x" * 300).status_code == 200), "its bytes were given back"


# Connections


def test_headers_that_never_end(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with running(ScriptedEngine()) as server:
        for pieces in ([b""], [b"GET / HTTP/1.1\r\n"] + [b"a: b\r\n"] * 20):
            begun = time.monotonic()
            with connect(server) as raw:
                try:
                    for piece in pieces:
                        raw.sendall(piece)
                        time.sleep(0.05)
                except OSError:
                    pass
                else:
                    assert read_all(raw) == b""
            assert time.monotonic() - begun < 8
        with connect(server) as raw:  # a second request on the connection gets no more time than the first
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                part = raw.recv(65536)
                assert part, "closed in the middle of an answer"
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            raw.sendall(b"GET /health HTTP/1.1\r\n")
            assert read_all(raw) == b""
        assert server.complete("slow say:" + "x" * 15).status_code == 200, "an answer may take longer"


class Narrow(connection.Connection):
    """A connection with so little room in the system's buffer that a slow reader is noticed soon."""

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


def test_an_answer_that_nobody_reads(monkeypatch):
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(process, "connections", lambda most: type("Connection", (Narrow,), {"most": most}))
    with running(ScriptedEngine()) as server, socket.socket() as raw:
        body = {"model": "model", "prompt": "say:" + "x" * 600, "max_tokens": 600, "stream": True, "logprobs": 20}
        data = json.dumps(body).encode()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        raw.sendall(head(len(data)) + data)
        assert server.wait(lambda: len(server.running) == 1)
        assert server.wait(lambda: not server.running, seconds=30), "held open for as long as the client likes"


def test_more_connections_than_there_may_be():
    with running(ScriptedEngine(), max_connections=2) as server:
        first, second = connect(server), connect(server)
        try:
            first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert first.recv(65536).startswith(b"HTTP/1.1 200")
            with connect(server) as third:
                answer = read_all(third)
            assert answer.startswith(b"HTTP/1.1 503")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        finally:
            first.close()
            second.close()

        def let_in():
            try:
                return server.complete("say:a").status_code == 200
            except httpx.TransportError:  # the refusal came before the request was written
                return False

        assert server.wait(let_in)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
        b"GET / HTTP/x\r\n\r\n",
        b"GET  /  HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 20_000,
    ],
)
def test_what_is_no_http_gets_an_error_object(server, data):
    answer = talk(server, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/%00"],
)
def test_no_path_reaches_a_file(server, path):
    answer = talk(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer


def test_every_answer_has_an_id_and_nothing_of_the_software(server):
    one, other = server.complete("say:a"), server.complete(1)
    assert one.headers["x-request-id"] != other.headers["x-request-id"]
    assert "server" not in one.headers
