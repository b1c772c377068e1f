"""Typical sampling and the penalties for repeating, held against transformers and llama.cpp's own samplers."""

import ctypes

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)

from llmlite.serve.repeats import BreakerTable, Dry, History, Repeats
from llmlite.serve.sampling import Sampling, candidates, choose, generator
from tests.serve.conftest import running
from tests.serve.scripted_engine import ScriptedEngine

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

from tests.gguf_models import LlamaCpp, gguf_of, save_tiny  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = LlamaCpp(gguf_of(save_tiny("llama", tmp_path_factory.mktemp("vocab"))))
    yield model
    model.close()


def random_logits(seed, size):
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def sampled(sampler, logits, accepted=()):
    """What a sampler of llama.cpp makes of logits after some tokens: {token: logit}."""
    for token in accepted:
        llama_cpp.llama_sampler_accept(sampler, token)
    data = (llama_cpp.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        data[token].id, data[token].logit = token, float(logit)
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    llama_cpp.llama_sampler_free(sampler)
    return {array.data[place].id: array.data[place].logit for place in range(array.size)}


def penalized(logits, tokens, repeats, cut):
    """Our penalties after ``tokens``, the first ``cut`` of which are the prompt."""
    history = History(tokens[:cut], repeats)
    for token in tokens[cut:]:
        history.accept(token)
    logits = logits.copy()
    history.penalize(logits)
    return logits


@pytest.mark.parametrize(("size", "seed"), [(3000, 0), (3000, 1), (3000, 2), (49152, 0)])
@pytest.mark.parametrize("typical_p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("top_k", [0, 40])
def test_typical_is_that_of_transformers_and_of_llama_cpp(typical_p, top_k, size, seed):
    logits = random_logits(seed, size)
    ids, weights = candidates(logits, Sampling(typical_p=typical_p, top_k=top_k))
    scores = torch.from_numpy(logits)[None].double()
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TypicalLogitsWarper(typical_p)(None, scores)[0]
    assert sorted(ids.tolist()) == torch.nonzero(torch.isfinite(scores))[:, 0].tolist()
    probabilities = weights / weights.sum(dtype=np.float64)
    np.testing.assert_allclose(probabilities, torch.softmax(scores, -1)[torch.from_numpy(ids)], rtol=2e-5)
    if not top_k and size == 3000:  # llama.cpp adds up in float32
        theirs = sampled(llama_cpp.llama_sampler_init_typical(typical_p, 1), logits)
        assert sorted(theirs) == sorted(ids.tolist())


def test_typical_takes_of_equal_logits_those_with_lower_ids():
    logits = np.zeros(3000, np.float32)
    logits[1000:] = -np.inf
    ids, _ = candidates(logits, Sampling(typical_p=0.25))
    assert ids.tolist() == list(range(250))


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    tokens = np.random.default_rng(4).integers(0, 500, 300).tolist()
    logits = random_logits(4, 500)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), torch.from_numpy(logits)[None].clone())
    for cut in (1, 150, 300):
        found = penalized(logits, tokens, Repeats(penalty), cut)
        np.testing.assert_allclose(found, wanted[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("last_n", [1, 20, 64, 1000])
def test_repetition_penalty_of_the_last_tokens_is_that_of_llama_cpp(last_n):
    tokens = np.random.default_rng(5).integers(0, 500, 300).tolist()
    logits = random_logits(5, 500)
    theirs = sampled(llama_cpp.llama_sampler_init_penalties(500, last_n, 1.4, 0, 0), logits, tokens)
    found = penalized(logits, tokens, Repeats(1.4, last_n), 100)
    np.testing.assert_allclose(found, [theirs[token] for token in range(500)], rtol=1e-6)
    np.testing.assert_array_equal(penalized(logits, tokens, Repeats(1.4, 0), 9), logits)


def dry_case(seed):
    """Few different tokens, with whole passages said again: runs of all lengths."""
    random = np.random.default_rng(seed)
    tokens = random.integers(60, 60 + random.integers(2, 9), 150).tolist()
    for _ in range(3):
        begin = random.integers(0, 100)
        tokens += tokens[begin : begin + random.integers(3, 50)]
    return tokens


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "dry",
    [Dry(0.8), Dry(2.0, 1.1, 1), Dry(0.5, 3.0, 4, 40), Dry(1.0, 1.0, 2), Dry(1.0, 1.75, 2, 3), Dry(1.0, 9.0, 2)],
    ids=str,
)
@pytest.mark.parametrize("texts", [[], ["a"], ["fe", "\n", "x[0]"]], ids=str)
def test_dry_is_that_of_llama_cpp(dry, texts, seed, model):
    size = llama_cpp.llama_vocab_n_tokens(model.vocab)
    tokens = dry_case(seed)
    logits = random_logits(seed, size)
    last_n = len(tokens) if dry.last_n < 0 else dry.last_n  # llama.cpp's -1 is the size of the context
    raw = (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])
    made = llama_cpp.llama_sampler_init_dry(
        model.vocab, dry.multiplier, dry.base, dry.allowed_length, last_n, raw, len(texts)
    )
    theirs = sampled(made, logits, tokens)

    def token_bytes(token, special):
        room = ctypes.create_string_buffer(64)
        length = llama_cpp.llama_token_to_piece(model.vocab, token, room, 64, 0, special)
        return room.raw[:length]

    table = BreakerTable(size, token_bytes, lambda text: model.tokenize(text, special=False))
    ours = Repeats(dry=Dry(dry.multiplier, dry.base, dry.allowed_length, dry.last_n, table.breakers(texts)))
    wanted = [max(theirs[token], -1e30) for token in range(size)]  # beyond it ours stays a number
    for cut in (1, 100, len(tokens)):
        found = penalized(logits, tokens, ours, cut)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if not texts and dry.last_n < 0:
        assert (found != logits).any(), "or the test is none"


def test_dry_of_a_long_repeat_leaves_numbers_behind():
    history = History([5] * 5000, Repeats(dry=Dry(100.0, 100.0)))
    logits = np.full(10, -np.inf, np.float32)
    logits[5] = 3
    history.penalize(logits)
    assert np.isfinite(logits[5])


@pytest.mark.parametrize("repeats", [Repeats(1.3), Repeats(dry=Dry(1.0)), Repeats(1.2, 64, Dry(1.0, last_n=500))])
def test_draws_with_a_seed_stay_the_same(repeats):
    def draws(cut):
        tokens = [int(token) for token in np.random.default_rng(1).integers(0, 50, 200)]
        history, random = History(tokens[:cut], repeats), generator(3, 0)
        for token in tokens[cut:]:
            history.accept(token)
        sampling, out = Sampling(repeats=repeats, typical_p=0.9), []
        for step in range(60):
            token = choose(random_logits(step, 50), sampling, {}, random, history)
            history.accept(token)
            out.append(token)
        return out

    assert draws(200) == draws(10) == draws(1)


def test_the_fields_reach_the_sampler():
    with running(ScriptedEngine()) as server:

        def say(prompt="say:aaaaaaaa", tokens=8, **more):
            answer = server.complete(prompt, max_tokens=tokens, temperature=0, **more)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        near = {"logit_bias": {"98": 27}}  # b is nearly as likely as a
        assert say(**near) == "aaaaaaaa"
        assert say(**near, repetition_penalty=2.0) == "bbbbbbbb", "a stands in the prompt"
        assert say(**near, repetition_penalty=2.0, repeat_last_n=0) == "aaaaaaaa"
        assert say(**near, dry_multiplier=5.0, dry_sequence_breakers=[], tokens=1) == "b"
        assert say(**near, dry_multiplier=5.0, dry_sequence_breakers=["a"]) == "aaaaaaaa"
        assert say(**near, dry_multiplier=5.0, dry_allowed_length=100) == "aaaaaaaa"
        assert say(**near, dry_multiplier=5.0, dry_penalty_last_n=2) == "aaaaaaaa"
        assert say(**near, dry_multiplier=5.0, dry_base=1.0, dry_allowed_length=3, tokens=1) == "b"
        flat = {"logit_bias": {"97": -30}, "seed": 3}
        texts = {server.complete("say:aaaa", max_tokens=4, typical_p=p, **flat).text for p in (0.01, 1.0)}
        assert len(texts) == 2
