"""The terminal chat: against a server, piped and at a terminal, stopped and refused."""

import io
import json
import os
import select
import signal
import sys
import threading
import time

import pytest

from llmlite.errors import InputError, OutsideError
from llmlite.serve.chat.client import Client, Refused
from llmlite.serve.chat.conversation import Conversation
from llmlite.serve.chat.run import chat, local_server
from llmlite.serve.chat.settings import ChatSettings
from llmlite.serve.chat.terminal import printable
from llmlite.serve.engines import Opened
from llmlite.serve.keys import Keyring, StoredKey
from llmlite.serve.limits import Limits
from tests.interruptible import started
from tests.serve.conftest import running
from tests.serve.scripted_engine import ScriptedEngine

KEY = "a-key-of-some-length-0001"


@pytest.fixture
def conversation(server):
    client = Client(server.url, None)
    yield Conversation(client, client.models()[0], None, {})
    client.close()


def test_a_conversation_goes_on(conversation):
    shown = []
    cost = conversation.say("say:héllo", shown.append)
    assert "".join(shown) == "héllo"
    assert (cost.tokens, cost.used, conversation.context) == (7, 17, 2048)
    assert not cost.stopped and not cost.cut
    assert "7 tokens" in str(cost)
    assert conversation.say("more", lambda _: None).used > cost.used
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.again() == "more"
    assert len(conversation.messages) == 2


def test_a_refusal_leaves_no_trace(conversation):
    conversation.say("say:a", lambda _: None)
    before = list(conversation.messages)
    conversation.system = "be brief"  # the scripted engine's template has no system role
    with pytest.raises(Refused, match="no system role"):
        conversation.say("say:b", lambda _: None)
    conversation.system = None
    with pytest.raises(Refused, match="2048"):
        conversation.say("x" * 3000, lambda _: None)
    assert conversation.messages == before


def test_an_interrupt_stops_the_reply_and_keeps_its_beginning(server, conversation):
    shown = []

    def show(text):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    cost = conversation.say("slow say:" + "x" * 500, show)
    assert cost.stopped
    assert conversation.messages[-1]["content"] == "xxx"
    assert server.wait(lambda: not server.engine.running), "the server goes on for nobody"
    conversation.messages.clear()
    assert conversation.say("say:ab", lambda _: None).tokens == 3


def test_save_writes_what_calibration_reads_and_overwrites_nothing(conversation, tmp_path):
    conversation.say("say:a", lambda _: None)
    conversation.system = "s"
    file = tmp_path / "chat.jsonl"
    conversation.save(file)
    roles = [message["role"] for message in json.loads(file.read_text())["messages"]]
    assert roles == ["system", "user", "assistant"]
    with pytest.raises(InputError, match="exists"):
        conversation.save(file)


def piped(monkeypatch, capsys, url, lines, **settings):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert chat(url, ChatSettings(**settings)) == 0
    return capsys.readouterr().out


def test_piped_lines_get_a_reply_each(monkeypatch, capsys, server):
    # The scripted engine says what comes after the first "say:" of the whole conversation.
    said = piped(monkeypatch, capsys, server.url, "say:one\n\n/quit say:two\n")
    assert said == "one\n" + "one\none\n/quit say:two\n", "lines are no commands"


def test_keys_come_from_the_environment(monkeypatch, capsys):
    with running(ScriptedEngine(), keys=Keyring([StoredKey.of("a", KEY, Limits())])) as server:
        with pytest.raises(InputError, match="LLMLITE_API_KEY"):
            chat(server.url, ChatSettings())
        monkeypatch.setenv("LLMLITE_API_KEY", KEY)
        assert piped(monkeypatch, capsys, f"{server.url}/v1/", "say:a\n") == "a\n"


def test_what_is_no_server(server):
    for url, error, said in [
        ("http://127.0.0.1:1", OutsideError, "127.0.0.1:1"),
        ("http://", InputError, "is no URL"),
        (f"{server.url}/nowhere", InputError, "nowhere"),
    ]:
        with pytest.raises(error, match=said):
            chat(url, ChatSettings())
    with pytest.raises(InputError, match="has no model 'other'"):
        chat(server.url, ChatSettings(model="other"))
    with pytest.raises(InputError, match="belong to an artifact"):
        chat(server.url, ChatSettings(context=5))


def test_an_artifact_is_served_in_process_and_to_nobody_else(monkeypatch, tmp_path):
    engine, before = ScriptedEngine(), set(threading.enumerate())
    monkeypatch.setattr("llmlite.serve.engines.open_artifact", lambda *_: Opened(engine, "tiny", None))
    with local_server(str(tmp_path), ChatSettings()) as (url, key):
        with pytest.raises(Refused, match="API key"):
            Client(url, None).models()
        client = Client(url, key)
        assert [card["id"] for card in client.models()] == ["tiny"]
        client.close()
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"server", "engine", "log"}
    assert engine.closed


def test_a_model_can_t_steer_the_terminal():
    assert printable("a\x1b]52;c;aGk=\x07\n\tb\x9b2J\x7f") == "a\ufffd]52;c;aGk=\ufffd\n\tb\ufffd2J\ufffd"


def test_at_a_terminal_ctrl_c_stops_the_reply_and_not_the_chat(server, tmp_path):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "llmlite.cli", "chat", server.url]
    process = started(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True)
    os.close(slave)
    seen = ""

    def until(what):
        nonlocal seen
        end = time.monotonic() + 60
        while what not in seen:
            assert select.select([master], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(master, 65536).decode()
        before, _, seen = seen.partition(what)
        return before

    def enter(text):
        os.write(master, text.encode() + b"\n")

    until("/help shows the commands")
    enter("say:hello")
    until("6 tokens")
    assert "of 2,048" in until(")")
    enter("slow say:" + "z" * 400)
    until("hello\r\nhello\r\nslow say:z")
    process.send_signal(signal.SIGINT)
    until("stopped")
    enter("/nonsense")
    until("is no command")
    enter("/save " + str(tmp_path / "chat.json"))
    until("saved")
    enter("/reset")
    until("forgotten")
    enter("say:one\\")
    enter("two")
    until("8 tokens")
    enter("/quit")
    assert process.wait(timeout=30) == 0
    os.close(master)
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 4
