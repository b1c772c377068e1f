"""What the page knows and keeps: settings, models with their measured quality, conversations."""

import json

from tests.serve.page.browser import CARDS, EVERYTHING, ROOMY, Chat, opened


def test_settings_reach_the_request_and_are_kept(chat):
    chat.button("Settings").click()
    given = {"Temperature": "0", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Longest reply": "3", "Seed": "7"}
    for label, value in given.items():
        chat.page.get_by_label(label).fill(value)
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.send("say:cut short")
    body = sent.value.post_data_json
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")} == {
        "temperature": 0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 3, "seed": 7,
    }  # fmt: skip
    assert chat.replies == ["cut"]
    assert chat.stats.endswith("ended by the token limit")
    chat.page.get_by_label("System prompt").fill("Be brief.")
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.send("say:x")
    assert sent.value.post_data_json["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "no system role" in chat.replies[1], "and this model's template says so"
    chat.page.reload()
    chat.button("Settings").click()
    assert chat.page.get_by_label("Top k").input_value() == "40"


def test_a_number_out_of_range_is_not_sent(chat):
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("3")
    chat.button("Close settings").click()
    chat.input.fill("say:x")
    chat.input.press("Enter")
    assert chat.mine == []
    assert chat.input.input_value() == "say:x"
    assert chat.page.evaluate("document.activeElement.id") == "temperature", "the field that is wrong"


def test_models_adapters_and_what_they_cost(browser, server):
    with opened(browser, server.url, **ROOMY) as page:
        chat = Chat(page)
        page.route("**/v1/models", lambda route: route.fulfill(json=CARDS))
        page.reload()
        quality = page.locator("#quality")
        quality.wait_for()
        assert quality.inner_text() == "Q4_0 · agrees with the original on 82.4 % of tokens"
        assert "0.0913" in page.locator("#welcome-facts").inner_text()
        quality.click()
        facts = page.get_by_role("dialog").inner_text()
        assert all(part in facts for part in ("30.891 ± 1.35", "82.4 %", "0.0913 nats", "91.9 MB", "2,048 tokens"))
        page.keyboard.press("Escape")
        choice = page.get_by_label("Model", exact=True)
        assert "small-pirate (adapter of small)" in choice.inner_text()
        choice.select_option("sleeping")
        assert quality.inner_text() == "loads with the first message"
        choice.select_option("small-pirate")
        with page.expect_request("**/v1/chat/completions") as sent:
            chat.send("hello")
        assert sent.value.post_data_json["model"] == "small-pirate"
        assert "the model 'small-pirate' is not served here" in chat.replies[0]


def test_conversations_are_kept_exported_and_deleted(chat, tmp_path):
    chat.send("say:one")
    chat.button("New chat").click()
    chat.send("say:two")
    chat.page.reload()
    chat.page.get_by_role("button", name="say:one", exact=True).click()
    assert (chat.mine, chat.replies) == (["say:one"], ["one"])
    with chat.page.expect_download() as download:
        chat.button("Export say:one").click()
    assert download.value.suggested_filename == "say-one.json"
    exported = json.loads(download.value.path().read_text())
    assert [message["content"] for message in exported["messages"]] == ["say:one", "one"]
    chat.button("Delete say:one").click()
    assert chat.page.locator("#chat-list .open").all_inner_texts() == ["say:two"]
    chat.button("Undo").click()
    assert (chat.mine, chat.replies) == (["say:one"], ["one"])
    chat.button("Delete say:one").click()
    chat.page.reload()
    assert chat.page.locator("#chat-list .open").all_inner_texts() == ["say:two"]


def test_a_reply_goes_on_while_another_conversation_is_read(chat):
    chat.send("slow say:" + "word " * 30, wait=False)
    chat.begun()
    chat.button("New chat").click()
    chat.page.get_by_label("being written").wait_for()
    assert chat.mine == []
    chat.page.get_by_label("being written").wait_for(state="detached")
    chat.page.locator("#chat-list .open").click()
    assert chat.replies == [" ".join(["word"] * 30)]


def test_a_full_store_is_told(chat):
    chat.page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 2 ** 20 - 500))")
    chat.send("say:" + "x" * 300)
    assert "no room left" in chat.page.locator("#notice").inner_text()
    assert chat.replies == ["x" * 300]


def test_five_hundred_messages(chat):
    kept = {"id": "1", "title": "long", "created": 1, "updated": 1, "settings": {"model": "model"}, "messages": [
        message for n in range(250) for message in (
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": EVERYTHING.removeprefix("say:"), "finish": "stop"})]}  # fmt: skip
    chat.page.evaluate("""kept => { localStorage.setItem('llmlite.chat.1', JSON.stringify(kept));
        localStorage.setItem('llmlite.title.1', '{"title": "long", "updated": 1}') }""", kept)  # fmt: skip
    chat.page.reload()
    chat.page.get_by_role("button", name="long", exact=True).click()
    assert chat.page.locator(".message").count() == 500
    chat.page.locator(".message").last.wait_for()
    at_end = (
        "() => { const p = document.getElementById('scroll'); return p.scrollHeight - p.scrollTop - p.clientHeight }"
    )
    chat.page.wait_for_function(f"({at_end})() < 48")
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(
        body='data: {"choices": [{"delta": {"content": "the last"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'))  # fmt: skip
    chat.send("one more")
    assert chat.replies[-1] == "the last"
    chat.page.wait_for_function(f"({at_end})() < 48")
