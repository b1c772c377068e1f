"""Real servers on loopback, each in a thread of its own."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from llmlite.serve.app import create_app  # noqa: E402
from llmlite.serve.engines import Opened  # noqa: E402
from llmlite.serve.keys import StoredKey  # noqa: E402
from llmlite.serve.limits import Limits  # noqa: E402
from llmlite.serve.models import Models, ModelSpec  # noqa: E402
from llmlite.serve.process import Server, bind, url_of  # noqa: E402
from llmlite.serve.settings import ServeSettings  # noqa: E402
from tests.serve.scripted_engine import ScriptedEngine  # noqa: E402


@dataclass(frozen=True)
class Running:
    """A server that runs: its URL, its app's models, and ways to ask it."""

    url: str
    models: Models
    running: set[str]

    @property
    def engine(self):
        return self.models.models[0].service.engine

    @property
    def client(self):
        """The official client, made to check every answer against the API's types."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30, _strict_response_validation=True
        )

    def post(self, path, body=None, **more):
        if body is not None:
            more["json"] = {"model": "model", **body}
        return httpx.post(f"{self.url}{path}", timeout=30, **more)

    def chat(self, content, **more):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **more})

    def complete(self, prompt, **more):
        return self.post("/v1/completions", {"prompt": prompt, **more})

    def events(self, path, body):
        """The data of a stream's events, parsed; "[DONE]" as it stands."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def wait(self, condition, seconds=5):
        """True as soon as the condition holds, False if it has not after ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.005)
        return False


@contextmanager
def running(engine, manifest=None, keys=None, **settings):
    settings = ServeSettings(**{"port": 0, "drain_seconds": 2.0, **settings})
    spec = ModelSpec("model", lambda: Opened(engine, "model", manifest))
    with serving(create_app([spec], settings, keys), settings) as server:
        yield server


@contextmanager
def serving(app, settings):
    """The app on a port of loopback until the block ends."""
    server = Server(app, settings)
    listener = bind(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    server_up = Running(url_of(settings, listener), app.state.models, app.state.running)
    try:
        assert server_up.wait(lambda: server.started)
        yield server_up
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server():
    """A scripted engine behind a server."""
    manifest = {"format": "gguf:q4_0", "base": {"source": "x"}, "evals": {"perplexity": 12.5}}
    with running(ScriptedEngine(), manifest) as server:
        yield server


KEY = "a-key-of-some-length-0001"


def key_file(file, key=KEY):
    """A file with the hash of one key."""
    file.write_text(f"{StoredKey.of('tester', key, Limits())}\n")
    return file


def error_of(answer, status, param=None, code=None):
    """Checks that an answer is an error object and returns its message."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["type"]
    assert "Traceback" not in answer.text
    return error["message"]
