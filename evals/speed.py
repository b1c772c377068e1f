"""How fast an artifact reads a prompt and writes an answer, one request at a time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmlite.evals.energy import Meter

PROMPT_TOKENS = 512  # of the main context, and most that are read in one pass
ANSWER_TOKENS = 64
REPEATS = 3
CONTEXTS = (1, PROMPT_TOKENS)


@dataclass(frozen=True)
class Spread:
    """The median of the repeats, and the least and the most of them."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class SpeedAt:
    """Speed at one context: a prompt of ``context`` tokens from an empty cache, and 64 greedy tokens after it.

    Tokens per second of prompt and answer, seconds to the first token of the answer; ``prompt_joules`` and
    ``generate_joules``: energy per token of what ``meter`` counts, median; None where the machine can't tell.
    """

    context: int
    prompt_tps: Spread
    generate_tps: Spread
    first_token_s: Spread
    prompt_joules: float | None = None
    generate_joules: float | None = None
    meter: str | None = None


@dataclass(frozen=True)
class Speed:
    """Medians at the main context (see `main_context`): tokens per second of the prompt and of the answer.

    ``first_token_s``: seconds from an empty cache to the first token of the answer. ``contexts``: every context
    measured, with the spread of the repeats.
    """

    prompt_tps: float
    generate_tps: float
    first_token_s: float
    contexts: tuple[SpeedAt, ...] = ()

    @classmethod
    def of(cls, contexts: Sequence[SpeedAt]) -> Speed:
        main = main_context([at.context for at in contexts])
        at = next(at for at in contexts if at.context == main)
        return cls(at.prompt_tps.median, at.generate_tps.median, at.first_token_s.median, tuple(contexts))

    def to_json(self) -> dict:
        """Plain data; what the machine could not tell has no key."""
        said = dataclasses.asdict(self)
        contexts = [{key: value for key, value in at.items() if value is not None} for at in said["contexts"]]
        return {**said, "contexts": contexts}


def main_context(contexts: Sequence[int]) -> int:
    """The context that one figure stands for: 512 where it was measured, else the longest."""
    return PROMPT_TOKENS if PROMPT_TOKENS in contexts else max(contexts)


class Runner(Protocol):
    """A model that answers: each method returns the most likely next token."""

    vocab_size: int

    def prompt(self, tokens: np.ndarray) -> int:
        """Forget everything and read ``tokens`` int64 [n]."""
        ...

    def step(self, token: int) -> int:
        """Read one more token."""
        ...


def answer(runner: Runner, context: int) -> None:
    """A prompt of ``context`` tokens and 64 tokens after it."""
    token = runner.prompt(_prompt(runner, context))
    for _ in range(ANSWER_TOKENS):
        token = runner.step(token)


def _prompt(runner: Runner, context: int) -> np.ndarray:
    """Random tokens, which no engine minds."""
    return np.random.default_rng(0).integers(0, runner.vocab_size, context)


def measure_speed(
    runner: Runner, context: int = PROMPT_TOKENS, repeats: int = REPEATS, meter: Meter | None = None
) -> SpeedAt:
    """Time ``runner``, which has answered before; ``repeats`` is 1 or more."""
    tokens = _prompt(runner, context)
    marks = []
    for _ in range(repeats):
        begin = _mark(meter)
        token = runner.prompt(tokens)
        middle = _mark(meter)
        for _ in range(ANSWER_TOKENS):
            token = runner.step(token)
        marks.append((begin, middle, _mark(meter)))
    first = [middle[0] - begin[0] for begin, middle, _ in marks]
    rest = [end[0] - middle[0] for _, middle, end in marks]
    return SpeedAt(
        context,
        prompt_tps=Spread.of([context / seconds for seconds in first]),
        generate_tps=Spread.of([ANSWER_TOKENS / seconds for seconds in rest]),
        first_token_s=Spread.of(first),
        prompt_joules=statistics.median(m[1] - b[1] for b, m, _ in marks) / context if meter else None,
        generate_joules=statistics.median(e[1] - m[1] for _, m, e in marks) / ANSWER_TOKENS if meter else None,
        meter=meter.name if meter else None,
    )


def _mark(meter: Meter | None) -> tuple[float, float]:
    """The time in seconds, and the energy used so far in joules."""
    return time.perf_counter(), meter.joules() if meter else 0.0
