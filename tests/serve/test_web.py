"""How the chat page's files are served; no browser is needed for this."""

import re

import httpx
import pytest

from llmlite.serve.routes import web
from tests.serve.conftest import error_of, key_file, running
from tests.serve.scripted_engine import ScriptedEngine


@pytest.mark.parametrize("path", sorted(web.PATHS))
def test_files_are_served_whole_and_then_only_when_changed(server, path):
    url = server.url + path
    first = httpx.get(url)
    assert first.status_code == 200
    assert first.content == web.FILES[path].content
    assert first.headers["cache-control"] == "no-cache"
    assert "default-src 'none'" in first.headers["content-security-policy"]
    assert "unsafe" not in first.headers["content-security-policy"]
    assert first.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(url, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert httpx.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    head = httpx.head(url)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


def test_the_page_names_only_files_that_are_served():
    page = web.FILES["/"].content.decode()
    named = {part.split('"')[0] for part in page.split('="web/')[1:]}
    assert named
    assert {f"/web/{name}" for name in named} <= web.PATHS
    assert "://" not in page, "nothing comes from elsewhere"
    assert "style=" not in page
    assert not re.search(r"\son\w+=", page), "no handlers in attributes"


def test_the_page_needs_no_key_and_opens_nothing_else(tmp_path):
    with running(ScriptedEngine(), api_key_file=key_file(tmp_path / "keys")) as server:
        assert all(httpx.get(server.url + path).status_code == 200 for path in web.PATHS)
        for path in ("/v1/models", "/web", "/web/", "/web/../v1/models", "/web/app.js/x", "//v1/models"):
            error_of(httpx.get(server.url + path), 401)


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/%2e%2e/guard.py", "/web/..%2fguard.py", "/web/"])
def test_no_path_reaches_the_file_system(server, path):
    error_of(httpx.get(server.url + path), 404)


def test_the_page_takes_no_post(server):
    error_of(httpx.post(server.url + "/"), 405)
