"""The log: a line for each request, nothing of what was asked, never in the way."""

import io
import logging
import os
import re
import time
from contextlib import suppress

import httpx
import pytest

from llmlite.serve import logs
from llmlite.serve.keys import Keyring, StoredKey
from llmlite.serve.limits import Limits
from llmlite.serve.logs import Writer, logging_to, printable
from tests.serve.conftest import running
from tests.serve.scripted_engine import ScriptedEngine

KEY = "a-key-of-some-length-0001"
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO    req_[0-9a-f]{16} (\S+) (\S+) (\S+) (\d+) in=(\d+) out=(\d+) \d+\.\d{3}s"
)


def logged(ask, level="info", **settings):
    """What is logged while ``ask`` has a server."""
    out = io.StringIO()
    with logging_to(out, level), running(ScriptedEngine(), **settings) as server:
        ask(server)
    return out.getvalue()


def test_a_line_for_each_request_without_what_was_asked():
    def ask(server):
        server.chat("say:a secret")
        server.chat("say:a secret", stream=True)
        server.complete(["say:secret", "say:secret"], n=2)
        server.chat("boom secret")
        server.chat("secret", temperature="secret")
        server.post("/v1/completions", content=b'{"secret', headers={"content-type": "application/json"})
        httpx.get(f"{server.url}/v1/models?secret=1", headers={"authorization": "Bearer secret"})

    text = logged(ask)
    assert "secret" not in text
    found = [LINE.fullmatch(line).groups() for line in text.splitlines() if " req_" in line]
    chat, plain = ("-", "POST", "/v1/chat/completions"), ("-", "POST", "/v1/completions")
    assert found == [
        (*chat, "200", "12", "9"), (*chat, "200", "12", "9"), (*plain, "200", "20", "28"), (*chat, "500", "11", "0"),
        (*chat, "400", "0", "0"), (*plain, "400", "0", "0"), ("-", "GET", "/v1/models", "200", "0", "0"),
    ]  # fmt: skip


def test_the_key_s_name_is_logged_and_not_the_key():
    def ask(server):
        httpx.get(f"{server.url}/v1/models", headers={"x-api-key": KEY})
        httpx.get(f"{server.url}/v1/models", headers={"x-api-key": KEY + "x"})

    text = logged(ask, keys=Keyring([StoredKey.of("alice", KEY, Limits())]))
    assert KEY not in text
    assert [LINE.fullmatch(line)[1] for line in text.splitlines()] == ["alice", "-"]


def test_prompts_are_logged_when_asked_for():
    text = logged(lambda server: server.chat("say:\r\nwhat \x1b[31m"), log_prompts=True)
    asked, _ = text.splitlines()
    assert "what" in asked
    assert "\x1b" not in text


def test_the_level():
    assert logged(lambda server: server.chat("say:a"), level="warning") == ""
    assert "ZeroDivisionError" in logged(break_it, level="error")
    assert "secret" not in logged(break_it, level="error")


def break_it(server):
    server.engine.step = lambda *_: 1 / 0
    server.chat("say:secret")


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/a\nb", r"/a\nb"), ("/\x1b[2J", r"/\x1b[2J"), ("/\u2028\u202e", r"/\u2028\u202e"), ("/é", "/é")],
)
def test_no_path_makes_a_line_of_its_own(path, shown):
    assert printable(path) == shown
    assert len(printable("x" * 10_000)) == 203


def test_a_log_that_nobody_reads_stops_nothing(monkeypatch):
    monkeypatch.setattr(logs, "PATIENCE", 0.2)
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    writer = Writer(stream, room=5)
    record = logging.LogRecord("a", logging.INFO, "", 0, "x" * 100_000, None, None)
    begun = time.monotonic()
    for _ in range(50):
        writer.emit(record)
    writer.close()
    assert time.monotonic() - begun < 5
    assert writer.dropped >= 40
    os.close(read)  # the thread, which waits for the pipe, is let go
    with suppress(OSError):
        stream.close()


def test_dropped_lines_are_counted():
    out = io.StringIO()
    writer = Writer(out)
    writer.dropped = 7
    writer.emit(logging.LogRecord("a", logging.INFO, "", 0, "hello", None, None))
    writer.close()
    assert out.getvalue().startswith("hello\n7 log lines")
