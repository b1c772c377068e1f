"""Tokenize, detokenize, ready and metrics."""

import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import error_of, key_file, running
from tests.serve.scripted_engine import CONTROL, ScriptedEngine


def test_tokenize_text(server):
    assert server.post("/tokenize", {"content": "hé"}).json() == {
        "tokens": [104, 0xC3, 0xA9], "count": 3, "max_model_len": 2048,
    }  # fmt: skip
    pieces = server.post("/tokenize", {"content": "hé", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 104, "piece": "h"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    assert httpx.post(f"{server.url}/tokenize", json={"content": ""}).json()["tokens"] == []


def test_tokenize_a_conversation(server):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == list(b"a\nb")
    refused = server.post("/tokenize", {"messages": [{"role": "system", "content": "a"}]})
    assert "no system role" in error_of(refused, 400, "messages")


def test_detokenize(server):
    assert server.post("/detokenize", {"tokens": [104, 0xC3, 0xA9, CONTROL]}).json() == {"content": f"hé<{CONTROL}>"}
    assert server.post("/detokenize", {"tokens": [0xC3]}).json() == {"content": "\ufffd"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"content": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "messages": [{"role": "user", "content": "a"}]}, "content"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_special": True}, "add_special"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        ("/tokenize", {"content": 1}, "content"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_is_refused_is_named(server, path, body, param):
    assert param in error_of(server.post(path, body), 400, param)


def test_a_model_that_is_not_served(server):
    error_of(server.post("/tokenize", {"model": "x", "content": "a"}), 404, "model")
    error_of(server.post("/detokenize", {"model": "x", "tokens": []}), 404, "model")


def test_ready_until_it_drains_or_dies(tmp_path):
    with running(ScriptedEngine(), api_key_file=key_file(tmp_path / "keys")) as server:
        assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
        server.models.drain()
        error_of(httpx.get(f"{server.url}/ready"), 503, code="shutting_down")
    with running(ScriptedEngine()) as server:
        server.models.models[0].service.scheduler.stop()
        server.chat("break")
        assert httpx.get(f"{server.url}/health").status_code == 503
    with running(ScriptedEngine()) as server:
        server.chat("break")
        error_of(httpx.get(f"{server.url}/ready"), 503, code="not_ready")


def metrics(server):
    """The value of each sample by its name and its labels' values."""
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[(sample.name.removeprefix("llmlite_"), *sample.labels.values())] = sample.value
    return found


def test_metrics_count_what_was_served():
    with running(ScriptedEngine()) as server:
        server.complete("x" * 300 + "say:abc", max_tokens=9)
        server.complete("x" * 300 + "say:abc", max_tokens=9)
        server.complete("a", temperature=9)
        httpx.get(f"{server.url}/nowhere")
        httpx.get(f"{server.url}/v1/models/model")
        found = metrics(server)
        assert found["requests_total", "POST", "/v1/completions", "200"] == 2
        assert found["requests_total", "POST", "/v1/completions", "400"] == 1
        assert found["requests_total", "GET", "other", "404"] == 1
        assert found["requests_total", "GET", "/v1/models/{model:path}", "200"] == 1
        assert found["prompt_tokens_total", "model"] == 614
        assert (found["cached_prompt_tokens_total", "model"], found["prefix_hits_total", "model"]) == (306, 1)
        assert found["generated_tokens_total", "model"] == 8
        assert found["time_to_first_token_seconds_count", "model"] == 2
        assert found["time_between_tokens_seconds_count", "model"] == 6
        assert 0 < found["time_to_first_token_seconds_sum", "model"] < 10
        assert (found["sequences_running", "model"], found["sequences_waiting", "model"]) == (0, 0)
        assert (found["model_loaded", "model"], found["engine_restarts_total", "model"]) == (1, 0)
        assert found["engine_steps_total", "model"] >= 8


def test_metrics_say_what_runs_and_what_waits_now():
    engine = ScriptedEngine()
    step, gate = engine.step, threading.Event()
    engine.step = lambda pieces: step(pieces) if gate.wait(30) else None
    with running(engine) as server:
        long = {"prompt": "say:abc"}
        threads = [threading.Thread(target=server.post, args=("/v1/completions", long)) for _ in range(2)]
        for thread in threads:
            thread.start()
        names = ("sequences_running", "sequences_waiting")
        assert server.wait(lambda: [metrics(server)[name, "model"] for name in names] == [1, 1])
        gate.set()
        for thread in threads:
            thread.join()


def test_each_app_counts_for_itself_and_a_dead_engine_shows():
    with running(ScriptedEngine()) as one, running(ScriptedEngine()) as other:
        one.chat("say:a")
        assert metrics(other).get(("generated_tokens_total", "model")) == 0
        other.chat("break")
        assert metrics(other)["model_loaded", "model"] == 0
