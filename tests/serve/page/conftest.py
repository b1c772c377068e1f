"""The page of a scripted engine's server, opened in headless Chromium."""

import pytest

from tests.serve.page.browser import ROOMY, Chat, chromium, opened


@pytest.fixture(scope="package")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    with opened(browser, server.url, **ROOMY) as page:
        page.wait_for_selector("#model option", state="attached")
        yield page


@pytest.fixture
def chat(page):
    return Chat(page)
