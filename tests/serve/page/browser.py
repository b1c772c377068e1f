"""Headless Chromium on a page of the server; skips with the reason where there is none."""

import os
import shutil
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
         "disable-sync")  # fmt: skip

ROOMY = {"viewport": {"width": 1280, "height": 800}}
SMALL = {"viewport": {"width": 360, "height": 640}, "has_touch": True}
EVERYTHING = """say:# Heading
Text with **bold**, *italic*, ~~gone~~, `code` and a [link](https://example.org).

1. one
   - nested
2. two

> a quote

| a | b |
|---|--:|
| 1 | 2 |

```python
print("hello")
```
"""
CARDS = {
    "object": "list",
    "data": [
        {"id": "small", "llmlite": {"loaded": True, "context": 2048, "format": "gguf:q4_0", "evals": {"llama.cpp": {
            "bytes": 91_900_000, "bits_per_weight": 5.36, "texts": {"wiki": {
                "perplexity": {"value": 30.891, "stderr": 1.35, "tokens": 5120},
                "divergence": {"mean_kl": 0.09133, "same_top": 0.824, "p99_kl": 0.7572, "base_perplexity": 28.62}}}}}}},
        {"id": "small-pirate", "llmlite": {"loaded": True, "context": 2048, "format": "gguf:q4_0", "evals": {},
                                           "adapter_of": "small"}},
        {"id": "sleeping", "llmlite": {"loaded": False}},
    ],
}  # fmt: skip


@contextmanager
def chromium():
    """A browser for one thread."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    flags = [f"--{flag}" for flag in QUIET]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # it refuses to start as root otherwise
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, **context):
    """The page in a profile of its own; fails on any script error, and on any request that leaves the server."""
    profile = browser.new_context(**{"reduced_motion": "reduce", **context})  # drawing them takes the time of the tests
    profile.set_default_timeout(60_000)
    page = profile.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda line: troubles.append(line.text) if "Content Security" in line.text else None)
    page.on("request", lambda sent: troubles.append(f"a request to {sent.url}") if foreign(sent.url, url) else None)
    page.goto(url)
    yield page
    profile.close()
    assert troubles == []


def foreign(address, url):
    return not address.startswith((url, "blob:", "data:"))


class Chat:
    """What a user does on the page and sees of it."""

    def __init__(self, page):
        self.page = page
        self.input = page.get_by_label("Message", exact=True)

    def send(self, text, wait=True):
        self.input.fill(text)
        self.input.press("Enter")
        if wait:
            self.settled()

    def settled(self):
        self.page.wait_for_selector("body:not(.is-busy) #send:not([hidden])")

    def begun(self):
        """Waits until the first of a reply is there."""
        self.page.wait_for_selector(".is-running .prose > :not(.waiting)")

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def replies(self):
        return self.page.locator(".from-model .prose").all_inner_texts()

    @property
    def mine(self):
        return self.page.locator(".bubble").all_inner_texts()

    @property
    def stats(self):
        return self.page.locator(".stats").last.inner_text()
