"""A chat on the page: what a user does, and what goes wrong."""

import json
import re
from functools import partial

import pytest

from tests.serve.conftest import KEY, key_file, running
from tests.serve.page.browser import ROOMY, Chat, opened
from tests.serve.scripted_engine import ScriptedEngine

SLOW = "slow say:" + "word " * 400


def test_a_reply_streams_and_is_counted(chat, server):
    chat.send("slow say:" + "word " * 12, wait=False)
    chat.begun()
    assert chat.page.locator("#messages").get_attribute("aria-busy") == "true"
    assert len(chat.replies[0]) < 59, "it is shown while it is written"
    chat.settled()
    assert chat.replies == ["word word word word word word word word word word word word"]
    assert re.fullmatch(r"60 tokens · [\d.]+ per second · first after [\d.]+ s", chat.stats)
    assert chat.page.locator("#meter-text").inner_text() == "Context: 128 of 2,048 tokens"
    assert chat.page.locator("#messages").get_attribute("aria-busy") == "false"


def test_the_whole_conversation_is_sent(chat):
    chat.send("say:one")
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.send("say:two")
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "user", "content": "say:one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "say:two"},
    ]
    assert body["stream_options"] == {"include_usage": True}
    assert set(body) == {"model", "messages", "stream", "stream_options"}, "what nobody set is left to the server"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(chat, server, how):
    chat.send(SLOW, wait=False)
    chat.begun()
    chat.button("Stop").click() if how == "button" else chat.page.keyboard.press("Escape")
    chat.settled()
    assert chat.replies[0] and SLOW.removeprefix("slow say:").startswith(chat.replies[0]), "as far as it had come"
    assert chat.stats.endswith("stopped")
    assert chat.stats.startswith("about"), "the server's count never came"
    assert server.wait(lambda: not server.engine.running), "the engine stopped, too"
    assert chat.page.evaluate("document.activeElement.id") == "input"


def test_another_reply_and_back(chat):
    chat.send("say:first")
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.button("Write another reply").click()
    chat.settled()
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user"]
    assert chat.replies == ["first"]
    chat.page.evaluate("window.before = document.querySelector('.from-model')")
    chat.button("Undo").click()
    assert chat.replies == ["first"]
    assert chat.page.evaluate("!window.before.isConnected"), "the earlier reply is shown again"


def test_edit_and_send_again(chat):
    chat.send("say:one")
    chat.send("say:two")
    chat.button("Edit and send again").first.click()
    field = chat.page.get_by_label("Edit your message")
    field.press("Escape")
    assert chat.mine == ["say:one", "say:two"]
    chat.button("Edit and send again").first.click()
    field.fill("say:three")
    field.press("Enter")
    chat.settled()
    assert (chat.mine, chat.replies) == (["say:three"], ["three"])
    chat.button("Undo").click()
    assert (chat.mine, chat.replies) == (["say:one", "say:two"], ["one", "one\none\nsay:two"])


def test_undo_while_the_new_reply_is_written(chat, server):
    chat.send("say:one")
    chat.button("Edit and send again").click()
    chat.page.get_by_label("Edit your message").fill(SLOW)
    chat.page.keyboard.press("Enter")
    chat.begun()
    chat.button("Undo").click()
    assert server.wait(lambda: not server.engine.running)
    chat.page.reload()
    chat.page.get_by_role("button", name="say:one", exact=True).click()
    assert (chat.mine, chat.replies) == (["say:one"], ["one"])


def test_copy(chat):
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.send("say:**bold**\n```\nx = 1\n```")
    for name, copied in [("Copy reply", "**bold**\n```\nx = 1\n```"), ("Copy code", "x = 1")]:
        chat.button(name).click()
        chat.page.get_by_title("Copied").wait_for()
        assert chat.page.evaluate("navigator.clipboard.readText()") == copied
        chat.page.get_by_title("Copied").wait_for(state="detached")


# What goes wrong


def test_an_error_stands_there_in_the_servers_words(chat):
    chat.send("boom")
    error = chat.page.get_by_role("alert")
    assert "an internal error ended this request; the server's log has it" in error.inner_text()
    assert "500 · internal_error" in error.inner_text()
    chat.button("Edit and send again").click()
    chat.page.get_by_label("Edit your message").fill("say:better")
    chat.page.keyboard.press("Enter")
    chat.settled()
    assert chat.replies == ["better"]


def test_a_prompt_longer_than_the_context(chat):
    chat.send("x" * 3000)
    assert "this model's context is 2048 tokens, but 3001 were asked for" in chat.replies[0]
    chat.send("say:go on")
    assert "context_length_exceeded" in chat.replies[1], "the question stays part of the conversation"


def answer(route, body):
    route.fulfill(body=body)


def test_an_error_in_the_middle_keeps_what_came(chat):
    chunk = {"choices": [{"index": 0, "delta": {"content": "half a "}, "finish_reason": None}]}
    error = {"error": {"message": "the engine has stopped", "type": "server_error", "param": None, "code": "dead"}}
    for end, said in [(f"data: {json.dumps(error)}\n\n", "the engine has stopped"), ("", "connection ended before")]:
        body = f": comment\r\ndata: {json.dumps(chunk)}\r\n\r\n{end}"
        chat.page.route("**/v1/chat/completions", partial(answer, body=body))
        chat.send("hello")
        assert chat.replies[-1].startswith("half a")
        assert said in chat.replies[-1]
        chat.page.unroute("**/v1/chat/completions")


def test_a_server_that_is_gone(chat):
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.send("hello")
    assert "The server can't be reached" in chat.replies[0]
    chat.page.unroute("**/v1/chat/completions")
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    chat.button("Try again").click()
    chat.settled()
    assert "<h1>Bad gateway</h1>" in chat.replies[0], "a proxy's answer is text, too"


def test_the_key_is_asked_for_and_kept_for_the_tab(browser, tmp_path):
    keys = key_file(tmp_path / "keys")
    with running(ScriptedEngine(), api_key_file=keys) as server, opened(browser, server.url, **ROOMY) as page:
        chat = Chat(page)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        reason = page.locator("#key-reason", has_text="an API key is needed")
        reason.wait_for()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#quality").wait_for()
        chat.send("say:let in")
        assert chat.replies == ["let in"]
        page.reload()
        page.locator("#quality").wait_for()
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
