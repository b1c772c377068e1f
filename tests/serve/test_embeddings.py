"""Embeddings over HTTP, and of both engines against transformers' own hidden states."""

import base64
import json
import threading

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.errors import InputError
from llmlite.serve.engines import open_artifact
from llmlite.serve.engines.pooling import CHUNK
from llmlite.serve.engines.transformers_embed import read_pooling
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import ScriptedEngine

PATH = "/v1/embeddings"
TEXTS = ["The quick brown fox", "jumps", "over the lazy dog and " * 12]


def vectors(server, given, **more):
    answer = server.client.embeddings.create(model="model", input=given, encoding_format="float", **more)
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return np.array([entry.embedding for entry in answer.data]), answer.usage


def test_every_form_of_input(server):
    whole, usage = vectors(server, ["abc", "hello"])
    assert np.linalg.norm(whole, axis=1) == pytest.approx([1, 1])
    assert (usage.prompt_tokens, usage.total_tokens) == (8, 8)
    for given in ("abc", list(b"abc"), [list(b"abc"), list(b"hello")]):
        found, _ = vectors(server, given)
        assert np.array_equal(found, whole[: len(found)])


def test_base64_is_what_the_client_asks_for_by_itself(server):
    plain, _ = vectors(server, ["abc"])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")  # a strict one checks before it decodes
    answer = client.embeddings.create(model="model", input="abc")
    assert answer.data[0].embedding == pytest.approx(plain[0].tolist())
    raw = server.post(PATH, {"input": "abc", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), plain[0].astype(np.float32))


def test_dimensions_cut_and_bring_to_length_one_again(server):
    whole, _ = vectors(server, "abcdefgh")
    short, _ = vectors(server, "abcdefgh", dimensions=3)
    assert short[0] == pytest.approx(whole[0, :3] / np.linalg.norm(whole[0, :3]), abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"), ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"), ({"input": [999]}, "input"), ({"input": ["a"] * 2049}, "input"),
        ({"input": "x" * 2049}, "input"), ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 9}, "dimensions"), ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "task": "x"}, "task"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(server, body, param):
    assert param in error_of(server.post(PATH, body), 400, param)


def test_failures_are_errors_and_the_next_one_works(server):
    assert "boom" not in error_of(server.post(PATH, {"input": "boom"}), 500)
    vectors(server, "a")
    with running(ScriptedEngine()) as other:
        error_of(other.post(PATH, {"input": "break"}), 503, code="engine_dead")
        assert other.wait(lambda: other.post(PATH, {"input": "a"}).status_code == 200), "the engine is opened again"


class EndlessEngine(ScriptedEngine):
    """Goes on embedding, piece by piece, until it is released."""

    def __init__(self, **more):
        super().__init__(**more)
        self.released = threading.Event()

    def embed(self, prompts):
        while not self.released.is_set():
            self.calls.append(CHUNK)
            yield None
        yield from super().embed(prompts)


def test_a_long_text_does_not_stall_a_stream_and_too_many_are_refused():
    engine = EndlessEngine()
    with running(engine, max_queue=1) as server:
        threads = [threading.Thread(target=server.post, args=(PATH, {"input": "a"})) for _ in range(2)]
        for thread in threads:
            thread.start()
        service = server.models.models[0].service
        assert server.wait(lambda: service._embeddings == 2)
        assert server.complete("say:ab", max_tokens=3).json()["choices"][0]["text"] == "ab"
        answer = server.post(PATH, {"input": "a"})
        error_of(answer, 429, code="queue_full")
        assert answer.headers["retry-after"]
        engine.released.set()
        for thread in threads:
            thread.join()
        assert server.post(PATH, {"input": "a"}).status_code == 200


def test_a_client_that_hangs_up_frees_the_engine():
    engine = EndlessEngine()
    with running(engine) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{PATH}", timeout=1, json={"model": "model", "input": "a"})
        service = server.models.models[0].service
        assert server.wait(lambda: service._embeddings == 0)
        pieces = len(engine.calls)
        assert pieces
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert len(engine.calls) == pieces


def test_what_runs_is_finished_while_the_server_drains():
    engine = EndlessEngine()
    with running(engine) as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.post(PATH, {"input": "a"})))
        thread.start()
        assert server.wait(lambda: engine.calls)
        server.models.drain()
        error_of(server.post(PATH, {"input": "a"}), 503, code="shutting_down")
        engine.released.set()
        thread.join()
        assert answers[0].status_code == 200


# The engines

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from tests.gguf_models import tiny_models  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models(tmp_path_factory)


def embedded(engine, prompts):
    *steps, rows = engine.embed(prompts)
    assert len(steps) >= len(prompts)
    assert all(step is None for step in steps)
    return rows


@pytest.mark.parametrize("name", ["llama", "llama-linear", "gemma3"])
@pytest.mark.parametrize("kind", ["transformers", "llama.cpp"])
def test_vectors_are_the_mean_of_transformers_hidden_states(name, kind, tiny):
    directory, gguf = tiny(name)
    engine = open_artifact(directory if kind == "transformers" else gguf, ServeSettings(threads=1)).engine
    assert engine.name == kind
    prompts = [engine.encode(text) for text in TEXTS]
    assert len(prompts[2]) > 128, "more than one chunk"
    found = embedded(engine, prompts)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.set_num_threads(1)
    for prompt, row in zip(prompts, found, strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        wanted = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        assert row.dtype == np.float32
        np.testing.assert_allclose(row, wanted, atol=1e-5 if kind == "transformers" else 2e-3)
    assert np.array_equal(embedded(engine, prompts[1:2])[0], found[1]), "nothing is left of the texts before"
    engine.close_model()


def test_generation_and_embedding_do_not_disturb_each_other(tiny):
    with running(open_artifact(tiny("llama")[1], ServeSettings(threads=1)).engine) as server:
        body = {"prompt": list(range(5, 200)), "max_tokens": 8, "temperature": 0}
        text = server.post("/v1/completions", body).json()["choices"]
        vector, _ = vectors(server, "The quick brown fox")
        assert server.post("/v1/completions", body).json()["choices"] == text
        assert np.array_equal(vectors(server, "The quick brown fox")[0], vector)


def test_the_pooling_that_a_checkpoint_asks_for(tiny, tmp_path):
    directory, _ = tiny("llama")
    assert read_pooling(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}))
    assert read_pooling(tmp_path) == "last"
    for broken in ['{"pooling_mode_max_tokens": true}', "[]", "{"]:
        config.write_text(broken)
        with pytest.raises(InputError, match="pooling"):
            read_pooling(tmp_path)
    for file in directory.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    engine = open_artifact(tmp_path, ServeSettings(threads=1)).engine
    prompt = engine.encode(TEXTS[2])
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    wanted = torch.nn.functional.normalize(states[-1], dim=0).numpy()
    np.testing.assert_allclose(embedded(engine, [prompt])[0], wanted, atol=1e-5)


def test_tokens_over_http_are_the_tokenizer_s(tiny):
    directory, gguf = tiny("llama-linear")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with running(open_artifact(gguf, ServeSettings(threads=1)).engine) as server:
        text = "Hello 12 🦙"
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert server.post("/tokenize", {"content": text}).json()["tokens"] == plain
        with_bos = server.post("/tokenize", {"content": text, "add_special": True}).json()["tokens"]
        assert with_bos == [tokenizer.bos_token_id, *plain]
        begun = tokenizer.bos_token + text
        wanted = tokenizer(begun, add_special_tokens=False).input_ids
        assert server.post("/tokenize", {"content": begun}).json()["tokens"] == wanted
