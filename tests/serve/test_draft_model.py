"""A draft model changes how fast a reply comes, not what it says."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from llmlite.errors import InputError
from llmlite.serve.app import create_app
from llmlite.serve.engines import open_artifact
from llmlite.serve.models import ModelSpec
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import serving

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from tests.gguf_models import gguf_of, save_tiny

# With float32 keys and values, rows of logits hardly depend on how many are computed at once.
SETTINGS = ServeSettings(port=0, threads=1, parallel=2, context=512, kv="f32", drain_seconds=2.0)
PROMPTS = ["The quick brown fox", "def f(x):\n    return", "It's 10:45 on", "a a a a"]
# The end token is ruled out: a reply is as long as it may be.
BODY = {"max_tokens": 120, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF file of a tiny model, one of another size with its vocabulary, and one with another vocabulary."""
    folder = tmp_path_factory.mktemp("draft")
    target = gguf_of(save_tiny("llama", folder / "target"))
    draft = gguf_of(save_tiny("llama", folder / "draft", num_hidden_layers=1))
    other = gguf_of(save_tiny("llama3", folder / "other"))
    windowed = gguf_of(save_tiny("gemma3", folder / "windowed"))
    return {"target": target, "draft": draft, "other": other, "windowed": windowed, "folder": folder}


@contextmanager
def drafting(tiny, draft, **more):
    settings = replace(SETTINGS, draft=str(tiny.get(draft, draft)), **more)
    spec = ModelSpec("model", lambda: open_artifact(tiny["target"], settings))
    with serving(create_app([spec], settings), settings) as server:
        # How long prompts and steps take must be known before anything is guessed.
        server.complete("x y z " * 20, max_tokens=3)
        yield server


def replies(server, **more):
    """Each prompt's text, all asked for at once."""
    found = {}

    def ask(prompt):
        answer = server.complete(prompt, **{**BODY, **more})
        assert answer.status_code == 200, answer.text
        found[prompt] = answer.json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def wanted(tiny):
    with drafting(tiny, "off") as server:
        return {seed: alone(server, seed) for seed in (None, 3)}


def alone(server, seed):
    more = {"temperature": 0} if seed is None else {"seed": seed, "temperature": 0.7}
    return {p: server.complete(p, **BODY, **more).json()["choices"][0]["text"] for p in PROMPTS}


def guess_always(monkeypatch):
    """As if guesses were free, so that a busy machine's timings don't decide what is tested."""
    monkeypatch.setattr("llmlite.serve.turns.Rates.price", lambda self, drafting: 0.0)
    monkeypatch.setattr("llmlite.serve.draft_model.SURE", 0.0)


@pytest.mark.parametrize("draft", ["target", "draft", "lookup"])
@pytest.mark.parametrize("seed", [None, 3])
def test_replies_are_those_without_a_draft(draft, seed, tiny, wanted, monkeypatch):
    guess_always(monkeypatch)
    with drafting(tiny, draft) as server:
        assert alone(server, seed) == wanted[seed]
        stats = server.models.models[0].service.scheduler.stats
        assert stats.drafted_tokens > (20 if draft != "lookup" else 0)
        if draft == "target" and seed is None:
            assert stats.accepted_tokens > 0.95 * stats.drafted_tokens
            assert stats.steps < 0.5 * stats.generated_tokens
        elif draft == "draft":
            assert stats.accepted_tokens < 0.9 * stats.drafted_tokens, "another model guesses otherwise"
        facts = server.client.models.retrieve("model").model_extra["llmlite"]["draft"]
        assert facts["acceptance"] == round(stats.accepted_tokens / stats.drafted_tokens, 4)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert f'llmlite_accepted_draft_tokens_total{{model="model"}} {float(stats.accepted_tokens)}' in metrics


def test_sequences_side_by_side_in_shared_cells(tiny, wanted, monkeypatch):
    guess_always(monkeypatch)
    # Cells for less than two whole sequences.
    with drafting(tiny, "target", parallel=4, context=160, cells=260) as server:
        texts = replies(server, temperature=0)
        stats = server.models.models[0].service.scheduler.stats
        assert stats.accepted_tokens > 0.8 * stats.drafted_tokens > 0
    # Cells that are shared add in another order: a near tie may go the other way.
    same = [prompt for prompt in PROMPTS if texts[prompt][:20] == wanted[None][prompt][:20]]
    assert len(same) >= len(PROMPTS) - 1


def test_stop_strings_and_clients_that_hang_up(tiny, wanted, monkeypatch):
    guess_always(monkeypatch)
    with drafting(tiny, "target") as server:
        text = wanted[None][PROMPTS[0]]
        for begin in range(5, 60, 9):
            stop = text[begin : begin + 3]
            answer = server.complete(PROMPTS[0], **BODY, temperature=0, stop=stop).json()["choices"][0]
            assert (answer["text"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")
        body = {"model": "model", "prompt": PROMPTS[1], "stream": True, **BODY, "max_tokens": 400}
        for _ in range(5):
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
                next(stream.iter_lines())
        assert server.wait(lambda: server.post("/health").status_code == 405 and not _busy(server))
        assert alone(server, None) == wanted[None]


def _busy(server):
    return server.models.models[0].service.scheduler.ping().result(5)["running"]


def test_a_long_prompt_is_caught_up_with_in_parts(tiny, monkeypatch):
    guess_always(monkeypatch)
    prompt = [(7 * i * i + 3 * i + 11) % 250 + 5 for i in range(400)]
    monkeypatch.setattr("llmlite.serve.draft_model.BATCH", 64)
    body = {**BODY, "max_tokens": 60, "temperature": 0}
    with drafting(tiny, "off") as server:
        plain = server.complete(prompt, **body).json()["choices"]
    with drafting(tiny, "target") as server:
        assert server.complete(prompt, **body).json()["choices"] == plain
        stats = server.models.models[0].service.scheduler.stats
        assert stats.accepted_tokens > 0.6 * stats.drafted_tokens > 0  # its cache is float16


REFUSED = {
    "other": "a draft needs the same vocabulary",
    "nowhere": "draft: ",
    "folder": "draft",
}


@pytest.mark.parametrize("draft", REFUSED)
def test_a_draft_that_does_not_fit_is_refused(draft, tiny):
    with pytest.raises(InputError, match=REFUSED[draft]) as refused:
        open_artifact(tiny["target"], replace(SETTINGS, draft=str(tiny.get(draft, draft))))
    assert "\n" not in str(refused.value)


def test_models_for_which_nothing_can_draft(tiny, tmp_path):
    with pytest.raises(InputError, match="sliding windows"):
        open_artifact(tiny["windowed"], replace(SETTINGS, draft=str(tiny["draft"])))
    with pytest.raises(InputError, match="needs a GGUF file"):
        open_artifact(save_tiny("llama", tmp_path / "plain"), replace(SETTINGS, draft="x"))


def test_guesses_that_cost_more_than_they_save_are_not_made(tiny, monkeypatch):
    monkeypatch.setattr("llmlite.serve.turns.Rates.price", lambda self, drafting: 5.0)
    with drafting(tiny, "target") as server:
        server.complete(PROMPTS[0], **BODY)
        assert server.models.models[0].service.scheduler.stats.drafted_tokens < 10
