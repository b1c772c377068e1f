"""From logits to the next token: pure functions on one row of logits, the same for every engine.

Order, as in transformers and vLLM: logit_bias and penalties, temperature, top_k, top_p, min_p, draw. The
log-probabilities that are reported are the model's own, before all of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

LEAST_TEMPERATURE = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True)
class Sampling:
    """How to choose: ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 cut nothing.

    A temperature that float32, in which logits are divided by it, does not hold is greedy, too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE


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


def allowed(logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Logits [vocab] with minus infinity where ``mask``, bool [vocab], is false; None: as they are."""
    return logits if mask is None else np.where(mask, logits, np.float32(-np.inf))


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn and their probabilities (float32 weights, float64 sums that end at 1)."""
    with np.errstate(over="ignore"):  # minus infinity, of which exp makes the right 0
        weights = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
    ids: np.ndarray | None = None  # all
    if 0 < sampling.top_k < len(weights):
        ids = _heaviest(weights, sampling.top_k)
    if sampling.top_p < 1:
        ids = _nucleus(weights, ids, sampling.top_p)
    kept = weights if ids is None else weights[ids]
    if sampling.min_p > 0:
        enough = kept >= sampling.min_p  # the heaviest weight is exactly 1
        ids, kept = np.flatnonzero(enough) if ids is None else ids[enough], kept[enough]
    return np.arange(len(weights)) if ids is None else ids, kept / kept.sum(dtype=np.float64)


def _heaviest(weights: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` largest, largest first; equal ones by lower id."""
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    ids = np.flatnonzero(weights >= least)
    return ids[np.argsort(-weights[ids], kind="stable")][:count]


def _nucleus(weights: np.ndarray, ids: np.ndarray | None, top_p: float) -> np.ndarray:
    """The fewest of ``ids`` (None: of all) that hold a share of ``top_p``. Sorts no more than it must."""
    kept = weights if ids is None else weights[ids]
    enough = top_p * kept.sum(dtype=np.float64)
    count = min(256, len(kept))
    while True:
        best = _heaviest(kept, count)
        reached = np.cumsum(kept[best], dtype=np.float64)
        if reached[-1] >= enough or count == len(kept):
            best = best[: 1 + int(np.searchsorted(reached[:-1], enough))]
            return best if ids is None else ids[best]
        count = min(count * 8, len(kept))


def choose(
    logits: np.ndarray, sampling: Sampling, counts: Mapping[int, int], random: np.random.Generator | None
) -> int:
    """The next token for one row of logits. ``random`` is not touched when the choice is greedy."""
    logits = adjust(logits, sampling, counts)
    if sampling.greedy or random is None:
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
