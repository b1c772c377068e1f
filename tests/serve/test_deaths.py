"""An engine that dies, by itself or by a fault of the scheduler's: red at once, refused, opened again."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager

import httpx
import pytest

from llmlite.serve import scheduler as scheduling
from llmlite.serve.app import create_app
from llmlite.serve.engines import Opened, open_artifact
from llmlite.serve.engines.base import EngineBroken
from llmlite.serve.errors import ApiError
from llmlite.serve.models import Model, ModelSpec
from llmlite.serve.routes.answering import Streamed
from llmlite.serve.schema import ChatRequest
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import error_of, serving
from tests.serve.scripted_engine import ScriptedEngine


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from tests.gguf_models import gguf_of, save_tiny

    return gguf_of(save_tiny("llama", tmp_path_factory.mktemp("dies")))


class Gate:
    """Opens a model at once the first time, and after that when it is let through."""

    def __init__(self, open_model):
        self._open = open_model
        self.let = threading.Event()
        self.opened = []

    def __call__(self):
        assert not self.opened or self.let.wait(20)
        self.opened.append(self._open())
        return self.opened[-1]


@contextmanager
def served(open_model, **settings):
    settings = ServeSettings(**{"port": 0, "drain_seconds": 2.0, **settings})
    with serving(create_app([ModelSpec("model", open_model)], settings), settings) as server:
        yield server


def health(server):
    return httpx.get(f"{server.url}/health").status_code


def real(gguf):
    return Gate(lambda: open_artifact(gguf, ServeSettings(threads=1, parallel=2, context=256)))


def broken(*_):
    raise EngineBroken("the device is gone")


def planted(*_):
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("fault", ["step", "plan", "stats"])
def test_a_dead_engine_is_red_at_once_and_comes_back(gguf, fault, monkeypatch):
    gate = real(gguf)
    with served(gate) as server:
        assert server.complete("ab", max_tokens=2).status_code == 200 and health(server) == 200
        engine = server.engine
        with monkeypatch.context() as patch:
            if fault == "step":
                patch.setattr(engine, "step", broken)
            elif fault == "plan":
                patch.setattr(scheduling, "plan", planted)
            else:
                patch.setattr(engine, "room", planted)
            begun = time.monotonic()
            error_of(server.complete("ab", max_tokens=2), 503, code="engine_dead")
            assert health(server) == 503
            assert time.monotonic() - begun < 2
            error_of(server.complete("ab", max_tokens=2), 503, code="engine_dead")
        gate.let.set()
        assert server.wait(lambda: health(server) == 200, 20)
        assert server.complete("ab", max_tokens=2).status_code == 200
        assert server.models.models[0].restarts == 1 and len(gate.opened) == 2


def test_an_engine_that_cannot_even_be_freed_is_opened_again():
    gate = Gate(lambda: Opened(ScriptedEngine(), "model", None))
    gate.let.set()
    with served(gate) as server:
        gate.opened[0].engine.close_model = broken
        error_of(server.chat("break"), 503, code="engine_dead")
        assert server.wait(lambda: health(server) == 200, 10)
        assert server.chat("say:a").status_code == 200


def test_an_engine_that_cannot_be_opened_again_is_tried_again(monkeypatch):
    monkeypatch.setattr("llmlite.serve.models.RESTART_AFTER", (0.0,))
    tries = []

    def open_model():
        tries.append(None)
        if len(tries) == 2:
            raise MemoryError
        return Opened(Engine(), "model", None)

    class Engine(ScriptedEngine):
        def close_model(self):
            pass

    with served(open_model) as server:
        error_of(server.chat("break"), 503, code="engine_dead")
        assert server.wait(lambda: health(server) == 200, 10)
        assert len(tries) == 3


def test_a_model_is_freed_when_nobody_uses_it_any_more():
    freed = []

    class Engine(ScriptedEngine):
        def close_model(self):
            freed.append(True)

    async def go():
        model = Model(ModelSpec("model", lambda: Opened(Engine(), "model", None)), ServeSettings())
        async with model.use() as service:
            unloading = asyncio.create_task(model.unload())
            while model.service is not None:
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)
            assert not freed and service.engine.token_bytes(65, special=True) == b"A"
            later = asyncio.create_task(use(model))
        await unloading
        assert freed
        assert await later is not service
        await model.unload()

    async def use(model):
        async with model.use() as service:
            return service

    asyncio.run(go())


def test_what_is_read_for_a_model_that_is_closed_is_finished_or_gets_503(monkeypatch):
    monkeypatch.setattr("llmlite.serve.models.LEAVING", 0.01)
    reading, read = threading.Event(), threading.Event()

    class Engine(ScriptedEngine):
        def encode(self, text):
            reading.set()
            assert read.wait(20)
            return super().encode(text)

    async def go():
        model = Model(ModelSpec("model", lambda: Opened(Engine(), "model", None)), ServeSettings())
        async with model.use() as service:
            text = asyncio.create_task(service.encode("a"))
            await asyncio.to_thread(reading.wait, 20)
            closing = asyncio.create_task(model.unload())
            await asyncio.sleep(0.1)
            assert not closing.done()
            read.set()
            assert await text == [97]
            await closing
            chat = ChatRequest(
                model="model", messages=[{"role": "user", "content": "a"}], response_format={"type": "json_object"}
            )
            for late in (service.encode("a"), service.prepared([], chat)):
                with pytest.raises(ApiError) as refused:
                    await late
                assert (refused.value.status, refused.value.code) == (503, "shutting_down")

    asyncio.run(go())


def test_a_request_that_waited_for_its_model_at_a_drain_gets_503():
    first, second = Gate(lambda: Opened(ScriptedEngine(), "first", None)), threading.Event()

    def open_second():
        assert second.wait(20)
        return Opened(ScriptedEngine(), "second", None)

    settings = ServeSettings(port=0, drain_seconds=20.0)
    app = create_app([ModelSpec("first", first), ModelSpec("second", open_second)], settings)
    with serving(app, settings) as server, ThreadPoolExecutor(1) as asking:
        answer = asking.submit(server.chat, "say:a", model="second")
        assert server.wait(lambda: server.running)
        server.models.drain()
        second.set()
        error_of(answer.result(20), 503, code="shutting_down")


def test_a_stream_whose_client_left_before_it_began_gives_everything_back():
    given = []

    async def events():
        yield "data: x\n\n"

    async def go():
        held = AsyncExitStack()
        held.callback(given.append, True)
        answer = Streamed(events(), held)

        async def send(message):
            await asyncio.sleep(10)

        async def receive():
            return {"type": "http.disconnect"}

        task = asyncio.create_task(answer({"type": "http"}, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert given
