"""Both engines behind a real server, held against transformers on the same tiny random models."""

import json
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.errors import InputError
from llmlite.serve.engines import open_artifact
from llmlite.serve.engines.base import ChatTemplateError, Piece
from llmlite.serve.engines.chat_template import render
from llmlite.serve.engines.transformers import Vocabulary
from llmlite.serve.sampling import log_softmax
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import Running, running

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

from tests.gguf_models import TEXTS, gguf_of, save_tiny  # noqa: E402

MODELS = ("llama", "llama-linear", "gemma3")  # byte-level; SentencePiece with BOS; sliding windows of 8
ENGINES = ("transformers", "llama.cpp")
SETTINGS = ServeSettings(threads=1, parallel=2, context=512)
EXACT = {"exact": True, "parallel": 2}
CHUNK = 128
TOLERANCE = {"transformers": 1e-4, "llama.cpp": 0.05}  # llama.cpp's cache is float16
MESSAGES = [{"role": "user", "content": "The quick brown fox"}]


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint, its GGUF, and transformers' own model and tokenizer as the oracle."""

    name: str
    directory: Path
    gguf: Path
    model: torch.nn.Module
    tokenizer: object

    def logprobs(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1).numpy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    def chat_ids(self) -> list[int]:
        text = self.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            directory = save_tiny(name, tmp_path_factory.mktemp(name))
            model = AutoModelForCausalLM.from_pretrained(directory).eval()
            made[name] = Tiny(name, directory, gguf_of(directory), model, AutoTokenizer.from_pretrained(directory))
            torch.set_num_threads(1)
        return made[name]

    return get


@pytest.fixture(scope="session")
def serving(tiny):
    """A server for each model and engine, started when first asked for."""
    servers = {}
    with ExitStack() as stack:

        def get(model, engine):
            return exactly(model, engine, {"parallel": 2})

        def exactly(model, engine, settings):
            key = (model, engine, *settings)
            if key not in servers:
                artifact = tiny(model).directory if engine == "transformers" else tiny(model).gguf
                opened = open_artifact(artifact, replace(SETTINGS, **settings))
                assert opened.engine.name == engine
                servers[key] = stack.enter_context(running(opened.engine, **settings))
            return servers[key]

        get.exactly = exactly

        yield get


@pytest.fixture(params=[(model, engine) for model in MODELS for engine in ENGINES], ids="-".join)
def case(request, tiny, serving) -> tuple[Tiny, Running, str]:
    model, engine = request.param
    return tiny(model), serving(model, engine), engine


@pytest.fixture(params=[(model, engine) for model in MODELS for engine in ENGINES], ids="-".join)
def exact_case(request, tiny, serving) -> tuple[Tiny, Running, str]:
    """One sequence a step: replies are the same to the bit whatever else runs."""
    model, engine = request.param
    return tiny(model), serving.exactly(model, engine, EXACT), engine


@pytest.fixture(params=ENGINES)
def plain(request, tiny, serving) -> tuple[Tiny, Running, str]:
    return tiny("llama"), serving("llama", request.param), request.param


def test_greedy_chat_equals_generate(case):
    tiny, server, kind = case
    ids = tiny.chat_ids()
    wanted = tiny.greedy(ids, 40)
    answer = server.client.chat.completions.create(model="model", messages=MESSAGES, temperature=0, max_tokens=40)
    text = answer.choices[0].message.content
    assert answer.usage.prompt_tokens == len(ids)
    if kind == "transformers":
        assert answer.usage.completion_tokens == len(wanted)
    else:  # up to the first token that was nearly a tie, which the float16 cache may decide the other way
        best = np.sort(tiny.logprobs(ids + wanted)[len(ids) - 1 : -1])
        ties = np.flatnonzero(best[:, -1] - best[:, -2] < 0.01)
        wanted = wanted[: ties[0]] if len(ties) else wanted
        assert len(wanted) > 5
    engine = server.engine
    data = b"".join(engine.token_bytes(token, special=False) for token in wanted if token not in engine.eos)
    said = data.decode("utf-8", "replace")
    assert text == said if kind == "transformers" else text.startswith(said.rstrip("\ufffd"))
    if tiny.name == "llama":  # SentencePiece's decoder gives up on the whole of a run of bytes with a bad one in it
        assert said == tiny.tokenizer.decode(wanted, skip_special_tokens=True)


def test_a_stream_has_the_text_and_logprobs_of_the_whole(case):
    _, server, _ = case
    body = {"messages": MESSAGES, "seed": 5, "max_tokens": 60, "logprobs": True, "top_logprobs": 1}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]
    chunks = server.events("/v1/chat/completions", body)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    streamed = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert streamed == whole["logprobs"]["content"]


def test_same_seed_same_text_beside_others_too(exact_case):
    _, server, _ = exact_case
    found = {}

    def ask(place, seed):
        body = {"messages": MESSAGES, "seed": seed, "max_tokens": 50, "top_p": 0.9}
        found[place] = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(place, place % 3)) for place in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == 3
    assert all(found[place] == found[place % 3] for place in range(9))


def test_logprobs_of_the_prompt_and_the_reply_are_the_model_s(case):
    tiny, server, engine = case
    prompt = [(7 * i * i + 3 * i + 11) % 250 + 5 for i in range(2 * CHUNK + 20)]
    body = {"prompt": prompt, "max_tokens": 8, "echo": True, "logprobs": 3, "temperature": 0}
    found = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    ids = prompt + tiny.greedy(prompt, 8)
    count = len(found["tokens"])
    assert count >= len(prompt) + 7
    wanted = tiny.logprobs(ids)
    assert found["token_logprobs"][0] is None
    values = [wanted[place - 1, ids[place]] for place in range(1, count)]
    np.testing.assert_allclose(found["token_logprobs"][1:], values, atol=TOLERANCE[engine])
    tops = [np.sort(wanted[place - 1])[-3:][::-1] for place in range(1, count)]
    best = [sorted(table.values(), reverse=True)[:3] for table in found["top_logprobs"][1:]]
    assert max(np.abs(a[0] - b[0]) for a, b in zip(best, tops, strict=True)) < TOLERANCE[engine]


def test_reuse_of_a_prefix_changes_no_bit(exact_case):
    tiny, server, engine = exact_case
    prompt = [(5 * i * i + i + 3) % 200 + 5 for i in range(2 * CHUNK + 30)]
    body = {"prompt": prompt, "max_tokens": 10, "logprobs": 2, "seed": 1}
    first, second, third = [server.post("/v1/completions", body).json() for _ in range(3)]
    assert second["choices"] == first["choices"] == third["choices"]
    cached = third["usage"]["prompt_tokens_details"]["cached_tokens"]
    windowed = tiny.name == "gemma3" and engine == "llama.cpp"
    assert cached == (0 if windowed else 2 * CHUNK), "a sliding window can't be gone back in"


def test_a_reused_prefix_gives_the_same_logprobs(case):
    _, server, engine = case
    prompt = [(11 * i * i + i + 3) % 200 + 5 for i in range(100)]
    body = {"max_tokens": 1, "logprobs": 3, "temperature": 0}
    whole = {"prompt": [*prompt, 9, 10, 11], **body}
    before = server.post("/v1/completions", whole).json()
    server.post("/v1/completions", {"prompt": [7] * 200, **body})
    server.post("/v1/completions", {"prompt": [8] * 200, **body})
    after = server.post("/v1/completions", whole).json()
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) + 2
    logprobs = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in (before, after)]
    np.testing.assert_allclose(*logprobs, atol=TOLERANCE[engine] / 5)


def test_stop_string_across_tokens(plain):
    _, server, _ = plain
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    text = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    for begin in range(3, len(text) - 3, 5):
        stop = text[begin : begin + 3]
        answer = server.post("/v1/chat/completions", {**body, "stop": stop}).json()["choices"][0]
        assert answer["message"]["content"] == text[: text.index(stop)]
        assert answer["finish_reason"] == "stop"


def test_the_end_token_ends_it_and_is_not_said(case):
    tiny, server, _ = case
    end = tiny.tokenizer.eos_token_id
    answer = server.chat("a", logit_bias={str(end): 100}, temperature=0).json()
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("text", ["Hello 12 🦙", "<|im_start|>Hello", "a"])
def test_bos_stands_in_front_once(case, text):
    tiny, server, _ = case
    engine = server.engine
    wanted = tiny.tokenizer(text).input_ids
    begin = tiny.tokenizer.bos_token_id
    wanted = wanted[1:] if wanted[:2] == [begin, begin] else wanted
    assert engine.encode(text) == wanted
    answer = server.complete(text, max_tokens=1, echo=True, logprobs=0, temperature=0).json()
    assert answer["usage"]["prompt_tokens"] == len(wanted)
    choice = answer["choices"][0]
    assert choice["text"].startswith(text)
    assert choice["logprobs"]["text_offset"][len(wanted)] == len(text)


def test_chat_ids_are_those_of_transformers(case):
    tiny, server, _ = case
    messages = [
        {"role": role, "content": text} for role, text in zip(["system", "user", "assistant"] * 3, TEXTS, strict=False)
    ]
    text = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert server.engine.encode_chat(messages) == tiny.tokenizer(text, add_special_tokens=False).input_ids


def test_bytes_of_tokens_make_up_the_text(case):
    tiny, server, _ = case
    engine = server.engine
    for text in TEXTS:
        data = b"".join(engine.token_bytes(token, special=False) for token in engine.encode(text))
        assert data.decode() in (text, " " + text)
    end = tiny.tokenizer.eos_token_id
    assert engine.token_bytes(end, special=False) == b""
    assert engine.token_bytes(end, special=True) == b"<|im_end|>"


@pytest.mark.parametrize("model", MODELS)
def test_engines_agree_on_every_token(model, serving):
    one, other = (serving(model, engine).engine for engine in ENGINES)
    assert one.vocab_size == other.vocab_size
    assert one.context == other.context == 512
    assert one.eos <= other.eos  # llama.cpp knows some end tokens by their names
    known = range(one.vocab_size - 5)  # the last rows of the embedding have no token
    for token in known:
        for special in (True, False):
            assert one.token_bytes(token, special) == other.token_bytes(token, special), token


def test_seeds_mean_the_same_to_both_engines(serving):
    body = {"messages": MESSAGES, "seed": 11, "max_tokens": 12}
    texts = [serving("llama", e).post("/v1/chat/completions", body).json()["choices"] for e in ENGINES]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_sequences_do_not_see_each_other(engine, tiny):
    artifact = tiny("llama").directory if engine == "transformers" else tiny("llama").gguf
    model = open_artifact(artifact, SETTINGS).engine
    prompts = [[(a * i * i + i) % 250 + 5 for i in range(40)] for a in (3, 7)]
    sequences = [model.open(prompt) for prompt in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        model.step([Piece(sequence, prompt, 0)])
    for token in (9, 99):
        rows = model.step([Piece(sequence, [token + shift], 1) for shift, sequence in enumerate(sequences)])
    for row, prompt, shift in zip(rows, prompts, (0, 1), strict=True):
        wanted = tiny("llama").logprobs([*prompt, 9 + shift, 99 + shift])[-1]
        np.testing.assert_allclose(log_softmax(row[0]), wanted, atol=TOLERANCE[engine])


REFUSALS = {
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}x": "no system role",
    "{{ 1 + messages[0]['content'] }}": "refused",
    None: "/v1/completions",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("template", REFUSALS)
def test_templates_that_are_missing_or_refuse(template, engine, tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    artifact = directory if engine == "transformers" else gguf_of(directory)
    with running(open_artifact(artifact, SETTINGS).engine) as server:
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        answer = server.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400, answer.text
        assert REFUSALS[template] in answer.json()["error"]["message"]
        assert server.complete("a", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__.os.x }}",
    ],
)
def test_a_template_is_a_stranger_s_program(attack):
    with pytest.raises(ChatTemplateError):
        render(attack, [{"role": "user", "content": "a"}], {})


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}\n  {{ m.role | upper }}: {{ m | tojson }}\n{% endfor %}{{ bos_token + eos_token }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{{ strftime_now('%Y') }}{% if tools is defined and tools %}tools{% endif %}{{ add_generation_prompt }}",
        "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
    ],
)
def test_our_rendering_equals_that_of_transformers(template, tiny):
    tokenizer = tiny("llama").tokenizer
    messages = [{"role": "user", "content": "a <b> & 'c' 🦙\n"}, {"role": "assistant", "content": "x"}]
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    assert render(template, messages, special) == tokenizer.apply_chat_template(messages, **options)


def test_the_artifact_s_evals_and_name_are_served(tiny, tmp_path):
    artifact = tmp_path / "smol-q4"
    artifact.mkdir()
    (artifact / "model.gguf").symlink_to(tiny("llama").gguf)
    (artifact / "llmlite.json").write_text(json.dumps({"format": "gguf:f32", "evals": {"x": 1}}))
    opened = open_artifact(artifact, SETTINGS)
    assert opened.name == "smol-q4"
    assert opened.manifest == {"format": "gguf:f32", "evals": {"x": 1}}


def test_added_tokens_are_their_own_letters(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["ção"])
    vocabulary = Vocabulary(tokenizer, directory)
    (token,) = vocabulary.encode("ção")
    assert vocabulary.token_bytes(token, special=False) == "ção".encode(), "not the bytes that GPT-2 writes so"


def test_a_context_beyond_the_trained_one_is_refused_before_it_is_allocated(tiny, monkeypatch):
    make = llama_cpp.llama_init_from_model

    def small(model, params):
        return make(model, params) if params.n_ctx <= 512 else pytest.fail("was allocated")

    monkeypatch.setattr("llama_cpp.llama_init_from_model", small)
    with pytest.raises(InputError, match="context 1000000: this model was trained for 512 tokens at most"):
        open_artifact(tiny("llama").gguf, ServeSettings(threads=1, parallel=2, context=1_000_000))
