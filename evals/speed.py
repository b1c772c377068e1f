"""How fast an artifact reads a prompt and writes an answer, one request at a time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

PROMPT_TOKENS = 512
ANSWER_TOKENS = 64
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Medians of three runs: tokens per second of a 512-token prompt and of the 64 greedy tokens after it.

    ``first_token_s``: seconds from an empty cache to the first token of the answer.
    """

    prompt_tps: float
    generate_tps: float
    first_token_s: float


class Runner(Protocol):
    """A model that answers: each method returns the most likely next token."""

    vocab_size: int

    def prompt(self, tokens: np.ndarray) -> int:
        """Forget everything and read ``tokens`` int64 [n]."""
        ...

    def step(self, token: int) -> int:
        """Read one more token."""
        ...


def measure_speed(runner: Runner, repeats: int = REPEATS) -> Speed:
    """Time ``runner``, after one prompt that is not timed; the prompt's tokens are random, which no engine minds."""
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, PROMPT_TOKENS)
    runner.prompt(tokens)
    first, answer = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        token = runner.prompt(tokens)
        middle = time.perf_counter()
        for _ in range(ANSWER_TOKENS):
            token = runner.step(token)
        first.append(middle - begin)
        answer.append(time.perf_counter() - middle)
    first_token = statistics.median(first)
    return Speed(PROMPT_TOKENS / first_token, ANSWER_TOKENS / statistics.median(answer), first_token)
