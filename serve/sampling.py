"""From logits to the next token: pure functions on one row of logits, the same for every engine.

Order, as in transformers and vLLM: logit_bias and penalties, temperature, top_k, top_p, min_p, draw. The
log-probabilities that are reported are the model's own, before all of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to choose: ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 cut nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


def generator(seed: int | None, choice: int) -> np.random.Generator:
    """The random numbers of one choice of one request; without a seed they are new each time."""
    entropy = None if seed is None else [seed & (2**64 - 1), choice]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def adjust(logits: np.ndarray, sampling: Sampling, counts: Mapping[int, int]) -> np.ndarray:
    """Logits [vocab] less the penalties of the tokens generated so far (``counts``), plus the biases.

    As OpenAI documents it: logit - count * frequency_penalty - (count > 0) * presence_penalty.
    """
    penalized = counts and (sampling.frequency_penalty or sampling.presence_penalty)
    if not penalized and not sampling.logit_bias:
        return logits
    logits = logits.copy()
    if penalized:
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[ids] -= times * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
    for token, bias in sampling.logit_bias.items():
        logits[token] += np.float32(bias)
    return logits


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn and their probabilities (float64, sum 1)."""
    weights = logits.astype(np.float64)
    weights = np.exp((weights - weights.max()) / sampling.temperature)
    ids = np.arange(len(weights))
    if 0 < sampling.top_k < len(weights):
        ids = _heaviest(weights, sampling.top_k)
    if sampling.top_p < 1:
        ids = _nucleus(weights, ids, sampling.top_p)
    if sampling.min_p > 0:
        ids = ids[weights[ids] >= sampling.min_p]  # the heaviest weight is exactly 1
    kept = weights[ids]
    return ids, kept / kept.sum()


def _heaviest(weights: np.ndarray, count: int) -> np.ndarray:
    ids = np.argpartition(-weights, count - 1)[:count]
    return ids[np.lexsort((ids, -weights[ids]))]


def _nucleus(weights: np.ndarray, ids: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest of ``ids`` that hold a share of ``top_p``. Sorts only as far as it must: 49,152 take 4 ms."""
    enough = top_p * weights[ids].sum()
    count = min(256, len(ids))
    while True:
        best = ids[_heaviest(weights[ids], count)]
        reached = np.cumsum(weights[best])
        if reached[-1] >= enough or count == len(ids):
            return best[: 1 + int(np.searchsorted(reached[:-1], enough))]
        count = min(count * 8, len(ids))


def choose(
    logits: np.ndarray, sampling: Sampling, counts: Mapping[int, int], random: np.random.Generator | None
) -> int:
    """The next token for one row of logits. ``random`` is not touched when the choice is greedy."""
    logits = adjust(logits, sampling, counts)
    if sampling.temperature == 0 or random is None:
        return int(np.argmax(logits))
    ids, probabilities = candidates(logits, sampling)
    place = int(np.searchsorted(np.cumsum(probabilities), random.random(), side="right"))
    return int(ids[min(place, len(ids) - 1)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities, float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def most_likely(logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest tokens of one row, best first; equal ones by lower id."""
    count = min(count, len(logprobs))
    best = _heaviest(logprobs, count) if count else np.empty(0, np.int64)
    return [(int(token), float(logprobs[token])) for token in best]
