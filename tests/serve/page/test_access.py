"""Everyone can use the page: keyboard, screen reader, small screens, dark and light."""

import re

import pytest

from tests.serve.page.browser import CARDS, EVERYTHING, ROOMY, SMALL, Chat, opened

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")


def test_by_keyboard_alone(chat):
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("say:a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    chat.settled()
    assert chat.replies == ["a\nb"]
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.getAttribute('aria-label') || e.title || e.textContent || e.id,
                    e === document.body || e.id === 'input' || s.outlineStyle !== 'none'] }""")
        assert focus[1], f"{focus[0]!r} has no visible focus"
        seen.append(focus[0].strip())
    wanted = {"New chat", "Delete say:a b", "Export say:a b", "Edit and send again", "Copy reply", "Write another reply",
              "Settings", "Switch to dark theme", "Send", "Skip to the message box"}  # fmt: skip
    assert wanted <= set(seen)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Close settings"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "settings-toggle"


def test_a_word_that_is_being_composed_is_not_sent(chat):
    chat.input.fill("say:x")
    chat.input.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert chat.mine == []


def test_finished_sentences_are_spoken_not_tokens(chat):
    chat.page.evaluate("""() => { window.spoken = []; new MutationObserver(all => all.forEach(one =>
        one.addedNodes.forEach(node => spoken.push(node.textContent)))).observe(
        document.getElementById('announcer'), { childList: true }) }""")  # fmt: skip
    chat.send("slow say:First **one**. Then another one! And the rest")
    first, *sentences, last = chat.page.evaluate("window.spoken")
    assert first == "The reply is being written"
    assert " ".join(" ".join(sentences).split()) == "First one. Then another one! And the rest"
    assert len(sentences) <= 3
    assert last.startswith("The reply is finished. 46 tokens")


def test_dark_and_light(browser, server):
    back = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, server.url, color_scheme="dark") as page:
        dark = page.evaluate(back)
        page.get_by_role("button", name="Switch to light theme").click()
        light = page.evaluate(back)
        assert max(map(int, re.findall(r"\d+", dark))) < 60 < 200 < min(map(int, re.findall(r"\d+", light)))
        page.reload()
        assert page.evaluate(back) == light, "the choice is kept"
        page.get_by_role("button", name="Switch to dark theme").click()
        page.emulate_media(color_scheme="light")
        assert page.evaluate(back) == light, "the system's own theme is followed again"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [ROOMY, SMALL], ids=["roomy", "small"])
def test_accessible_by_axe(browser, server, theme, size):
    with opened(browser, server.url, color_scheme=theme, bypass_csp=True, **size) as page:
        page.route("**/v1/models", lambda route: route.fulfill(json=CARDS))
        page.reload()
        page.locator("#quality").wait_for()
        chat = Chat(page)
        violations(page, "empty")
        page.locator("#quality").click()
        violations(page, "facts")
        page.keyboard.press("Escape")
        page.unroute("**/v1/models")
        page.reload()
        chat.send(EVERYTHING)
        chat.send("boom")
        chat.button("Write another reply").click()
        chat.settled()
        chat.button("Edit and send again").last.click()
        violations(page, "chat")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        chat.button("Settings").click()
        violations(page, "settings")
        chat.button("API key").click()
        violations(page, "key")


def violations(page, state):
    found = axe.Axe().run(page).response["violations"]
    assert [(state, v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []


def test_a_small_screen(browser, server):
    with opened(browser, server.url, **SMALL) as page:
        chat = Chat(page)
        chat.send(EVERYTHING)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        chat.button("Conversations").click()
        assert page.locator("main").evaluate("main => main.inert"), "only the drawer is within reach"
        page.keyboard.press("Escape")
        assert not page.locator("#chats").is_visible()
        chat.button("Conversations").click()
        chat.button("New chat").click()
        assert not page.locator("#chats").is_visible()
        assert chat.mine == []
