"""The sampler, held against transformers' own warpers and against the definitions."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmlite.serve.sampling import Sampling, adjust, candidates, choose, generator, log_softmax, most_likely


def random_logits(seed, size=3000):
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_k=7),
        Sampling(top_p=0.5),
        Sampling(top_p=0.999),
        Sampling(temperature=2.0, top_p=0.99),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=400, top_p=0.9, min_p=0.02),
        Sampling(top_p=1e-9),
        Sampling(top_k=10**6),
    ],
)
def test_probabilities_equal_those_of_transformers(sampling, seed):
    logits = random_logits(seed)
    warped = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(logits)[None].double())
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    warped = TopPLogitsWarper(sampling.top_p)(None, warped) if sampling.top_p < 1 else warped
    warped = MinPLogitsWarper(sampling.min_p)(None, warped) if sampling.min_p else warped
    wanted = torch.softmax(warped[0], -1).numpy()
    found = np.zeros(len(logits))
    ids, weights = candidates(logits, sampling)
    ids = np.arange(len(logits)) if ids is None else ids
    found[ids] = weights / weights.sum(dtype=np.float64)
    assert len(set(ids.tolist())) == len(ids)
    np.testing.assert_allclose(found, wanted, atol=1e-12, rtol=2e-5)


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = generator(1, 0)
    for sampling, wanted in [(Sampling(), [0.5, 0.3, 0.15, 0.05]), (Sampling(top_k=2), [0.625, 0.375, 0, 0])]:
        drawn = np.bincount([choose(logits, sampling, {}, random) for _ in range(20000)], minlength=4) / 20000
        np.testing.assert_allclose(drawn, wanted, atol=0.015)


def test_greedy_is_the_first_of_the_largest():
    logits = np.array([1, 5, 5, 2], np.float32)
    assert choose(logits, Sampling(temperature=0), {}, None) == 1
    assert {choose(logits, Sampling(temperature=1e-7, top_k=1), {}, generator(s, 0)) for s in range(5)} == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-50, 5e-324])
def test_temperatures_that_float32_hardly_holds_are_greedy(temperature):
    logits = np.array([1, 2, 5, 3], np.float32)
    assert [choose(logits, Sampling(temperature), {}, generator(s, 0)) for s in range(5)] == [2] * 5


def test_penalties_and_bias_are_openais():
    logits = np.zeros(5, np.float32)
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 2.0, 0: -100.0})
    adjusted = adjust(logits, sampling, Counter({1: 3, 2: 1}))
    np.testing.assert_allclose(adjusted, [-100, -1.75, -0.75, 2, 0])
    assert not logits.any(), "the engine's row is not to be written to"


def test_same_seed_same_draws_and_other_choices_differ():
    def draws(seed, choice):
        random = generator(seed, choice)
        return [choose(random_logits(3), Sampling(), {}, random) for _ in range(20)]

    assert draws(7, 0) == draws(7, 0)
    assert draws(-7, 0) == draws(-7, 0)
    assert len({tuple(draws(seed, choice)) for seed in (7, 8, None) for choice in (0, 1)}) == 6


def test_log_softmax_and_the_most_likely():
    logits = random_logits(2)
    logprobs = log_softmax(logits)
    np.testing.assert_allclose(logprobs, torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy(), atol=1e-9)
    values, ids = torch.topk(torch.from_numpy(logprobs), 20)
    assert most_likely(logprobs, 20) == list(zip(ids.tolist(), values.tolist(), strict=True))
    assert most_likely(logprobs, 0) == []
    assert most_likely(np.array([0.0, 1, 1]), 9) == [(1, 1.0), (2, 1.0), (0, 0.0)]
