"""From logits to the next token: pure functions on one row of logits, the same for every engine.

Order, as in transformers and vLLM: logit_bias and penalties, temperature, top_k, top_p, min_p, typical_p, draw. The
log-probabilities that are reported are the model's own, before all of that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmlite.serve.repeats import History, Repeats

FLOORS = (0.1, 1e-2, 1e-3, 1e-5, 1e-8)
"""Shares of the likeliest token's probability above which likely tokens are looked for first."""

SORTED = 512
"""So many values are sorted; of more it is first found out which matter."""

BINS = 4096
"""Of a histogram of values, each pass of which leaves those of one bin."""

NARROW = 1e-30
"""Values no further apart are sorted, however many: float32 could not hold the number of bins in that room."""

BLOCK = 64

LEAST_TEMPERATURE = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True)
class Sampling:
    """How to choose: ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` and ``typical_p`` 1, ``min_p`` 0 cut nothing.

    A temperature that float32, in which logits are divided by it, does not hold is greedy, too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeats: Repeats = field(default_factory=Repeats)
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


def adjust(
    logits: np.ndarray, sampling: Sampling, counts: Mapping[int, int], history: History | None = None
) -> np.ndarray:
    """Logits [vocab] less the penalties of the tokens generated so far (``counts``), plus the biases.

    As OpenAI documents it: logit - count * frequency_penalty - (count > 0) * presence_penalty; before that
    ``history`` has what `Repeats` asks for.
    """
    penalized = counts and (sampling.frequency_penalty or sampling.presence_penalty)
    if not penalized and not sampling.logit_bias and history is None:
        return logits
    logits = logits.copy()
    if history is not None:
        history.penalize(logits)
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


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that may be drawn, None for all, and their probabilities times a factor, float32.

    Valid until this thread's next call.
    """
    weights = _weights(logits, sampling)
    ids = _kept(weights, sampling)
    return ids, weights if ids is None else weights[ids]


def _weights(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities times a factor, float32 [vocab]: the likeliest token has exactly 1."""
    weights = _scratch(len(logits), "weights")
    with np.errstate(over="ignore"):  # minus infinity, of which exp makes the right 0
        np.subtract(logits, logits.max(), out=weights)
        if sampling.temperature != 1:
            np.divide(weights, np.float32(sampling.temperature), out=weights)
        return np.exp(weights, out=weights)


_local = threading.local()


def _scratch(size: int, what: str, kind: type = np.float32) -> np.ndarray:
    """This thread's array [size] for ``what``, used again at the next call: fresh memory costs more than what is done
    in it."""
    array = _local.__dict__.get(what)
    if array is None or len(array) < size:
        array = _local.__dict__[what] = np.empty(size, kind)
    return array[:size]


def _kept(weights: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """The ids that top_k, top_p, min_p and typical_p leave; None for all."""
    ids: np.ndarray | None = None
    if 0 < sampling.top_k < len(weights):
        ids = _heaviest(weights, sampling.top_k, FLOORS)
    if sampling.top_p < 1:
        ids = _nucleus(weights, ids, sampling.top_p)
    if sampling.min_p > 0:
        ids = np.flatnonzero(weights >= sampling.min_p) if ids is None else ids[weights[ids] >= sampling.min_p]
    if sampling.typical_p < 1:
        ids = _typical(weights, ids, sampling.typical_p)
    return ids


def _heaviest(values: np.ndarray, count: int, floors: Iterable[float]) -> np.ndarray:
    """Ids of the ``count`` largest, largest first; equal ones by lower id. ``floors``: where to look first.

    Only what lies above the first floor that enough lie above is sorted: 20 microseconds of a vocabulary of 49,152
    instead of 400.
    """
    for floor in floors:
        above = values >= floor
        if np.count_nonzero(above) >= count:
            ids = np.flatnonzero(above)
            return ids[np.argsort(-values[ids], kind="stable")][:count]
    return np.argsort(-values, kind="stable")[:count]


def _nucleus(weights: np.ndarray, ids: np.ndarray | None, top_p: float) -> np.ndarray:
    """The fewest of ``ids`` (None: of all) that hold a share of ``top_p``. Sorts no more than it must."""
    kept = weights if ids is None else weights[ids]
    enough = top_p * kept.sum(dtype=np.float64)
    for floor in (*FLOORS, 0.0):
        best = np.flatnonzero(kept >= floor)
        if floor == 0 or kept[best].sum(dtype=np.float64) >= enough:
            break
    best = best[np.argsort(-kept[best], kind="stable")]
    reached = np.cumsum(kept[best], dtype=np.float64)
    best = best[: 1 + int(np.searchsorted(reached[:-1], enough))]
    return best if ids is None else ids[best]


def _typical(weights: np.ndarray, ids: np.ndarray | None, typical_p: float) -> np.ndarray:
    """The fewest of ``ids`` (None: of all) that hold a share of ``typical_p``, those first whose surprise is nearest to
    the expected one (https://arxiv.org/abs/2202.00666)."""
    if ids is not None:
        ids = ids[weights[ids] > 0]
    elif not weights.all():
        ids = np.flatnonzero(weights > 0)
    kept = weights if ids is None else weights[ids]
    whole = float(kept.sum(dtype=np.float64))
    distances = np.log(kept, out=_scratch(len(kept), "distances"))
    distances -= np.float32(np.dot(kept, distances) / whole)
    np.abs(distances, out=distances)
    last, ties = _least(distances, kept, typical_p * whole)
    chosen = distances < last
    chosen[np.flatnonzero(distances == last)[:ties]] = True
    return np.flatnonzero(chosen) if ids is None else ids[chosen]


def _least(values: np.ndarray, weights: np.ndarray, enough: float) -> tuple[float, int]:
    """Which of the smallest values hold weights of ``enough`` together: the largest of them, and how many have it.

    Only values of one bin of a histogram are sorted, as a sort of 49,152 takes 4 milliseconds, the histogram 0.1.
    """
    before = 0.0
    while len(values) > SORTED:
        low, high = values.min(), values.max()
        if high - low < NARROW:
            break
        places = np.subtract(values, low, out=_scratch(len(values), "places"))
        bins = np.multiply(
            places, np.float32((BINS - 1) / (high - low)), out=_scratch(len(values), "bins", np.int64), casting="unsafe"
        )
        held = before + np.cumsum(np.bincount(bins, weights))
        place = min(int(np.searchsorted(held, enough)), int(bins.max()))
        before = float(held[place - 1]) if place else before
        inside = np.flatnonzero(bins == place)
        values, weights = values[inside], weights[inside]
    order = np.argsort(values, kind="stable")
    reached = before + np.cumsum(weights[order], dtype=np.float64)
    place = int(np.searchsorted(reached[:-1], enough))
    last = values[order[place]]
    return float(last), int(np.count_nonzero(values[order[: place + 1]] == last))


def choose(
    logits: np.ndarray,
    sampling: Sampling,
    counts: Mapping[int, int],
    random: np.random.Generator | None,
    history: History | None = None,
) -> int:
    """The next token for one row of logits. ``random`` is not touched when the choice is greedy."""
    logits = adjust(logits, sampling, counts, history)
    if sampling.greedy or random is None:
        return int(np.argmax(logits))
    ids, weights = candidates(logits, sampling)
    place = _draw(weights, random.random())
    return place if ids is None else int(ids[place])


def _draw(weights: np.ndarray, share: float) -> int:
    """The place at which the running sum of the weights passes ``share``, from 0 to 1, of the whole sum."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)
    sums = np.cumsum(blocks)
    wanted = share * sums[-1]
    block = min(int(np.searchsorted(sums, wanted, side="right")), len(blocks) - 1)
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    reached = np.cumsum(inside, dtype=np.float64) + (sums[block] - blocks[block])
    place = min(int(np.searchsorted(reached, wanted, side="right")), len(inside) - 1)
    while inside[place] == 0 and place:  # rounding at a block's end must not choose what can't be drawn
        place -= 1
    return block * BLOCK + place


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities, float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def most_likely(logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest tokens of one row, best first; equal ones by lower id."""
    count = min(count, len(logprobs))
    floors = logprobs.max() + np.log(FLOORS)
    best = _heaviest(logprobs, count, floors) if count else np.empty(0, np.int64)
    return [(int(token), float(logprobs[token])) for token in best]
