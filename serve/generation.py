"""One sequence from prompt to finish: prefill chunk by chunk, then a token at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmlite.serve.constraint import Constraint
from llmlite.serve.engines.base import CHUNK, Engine, Sequence
from llmlite.serve.sampling import Sampling, allowed, choose, generator, log_softmax, most_likely
from llmlite.serve.text import TextStream


@dataclass(frozen=True)
class Work:
    """What one sequence is to do. ``len(prompt) + max_tokens`` fits the engine's context; the prompt isn't empty.

    ``top_logprobs`` None: no log-probabilities; ``score_prompt``: those of the prompt's tokens, too; ``adapter``:
    the low-rank adapter to run with; ``constraint`` makes the state of the grammar that the output must follow;
    ``shown``: control tokens whose letters are part of the text.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    choice: int = 0
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    score_prompt: bool = False
    adapter: str | None = None
    constraint: Callable[[], Constraint] | None = None
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability (None for the first token of a prompt) and the likeliest tokens in its place.

    ``offset`` is the character of the text at which it begins.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int = 0


@dataclass(frozen=True)
class Delta:
    """What one step added: text that is certain, and the scores of the tokens whose text is out.

    ``finish``: None while it goes on, then "stop" or "length". ``generated`` counts all tokens drawn so far, the
    end token included; ``reused`` the prompt tokens that were in the cache.
    """

    text: str
    scores: list[TokenScore]
    finish: str | None
    generated: int
    reused: int
    prompt_scores: list[TokenScore] | None = None


class Generation:
    """The state of one sequence; `advance` does one bounded piece of work on the engine."""

    def __init__(self, work: Work, engine: Engine) -> None:
        self._work = work
        self._engine = engine
        self._sequence: Sequence | None = None
        self._text = TextStream(work.stops)
        self._constraint = None if work.constraint is None else work.constraint()
        self._random = None if work.sampling.greedy else generator(work.seed, work.choice)
        self._counts: Counter[int] = Counter()
        self._generated = 0
        self._last = 0
        self._pending: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] | None = None
        if work.score_prompt:
            self._prompt_scores = [TokenScore(work.prompt[0], None, [])]

    def advance(self) -> Delta | None:
        """One prefill chunk (None until the last one) or one token."""
        prompt = self._work.prompt
        if self._sequence is None:
            self._sequence = self._engine.open(prompt, reuse=not self._work.score_prompt)
        if self._generated:
            return self._next(self._engine.step([self._sequence], [self._last])[0])
        begin = len(self._sequence.tokens)
        rows = self._engine.prefill(self._sequence, prompt[begin : begin + CHUNK], self._work.score_prompt)
        if self._prompt_scores is not None:
            self._score_prompt(rows, begin)
        return self._next(rows[-1]) if begin + CHUNK >= len(prompt) else None

    def close(self, keep: bool) -> None:
        """Give the sequence back to the engine, if it was ever opened."""
        if self._sequence is not None:
            self._engine.close(self._sequence, keep)
            self._sequence = None

    def _next(self, logits: np.ndarray) -> Delta:
        if not np.isfinite(logits.max()):
            raise FloatingPointError("the model's logits are not finite: its weights are damaged or it overflowed")
        if self._work.max_tokens == 0:
            return self._delta("", "length")
        mask = None if self._constraint is None else self._constraint.mask()
        token = choose(allowed(logits, mask), self._work.sampling, self._counts, self._random)
        self._generated += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if token in self._engine.eos:
            return self._delta(self._text.finish(), "stop")
        self._last = token
        self._counts[token] += 1
        if self._work.top_logprobs is not None:
            self._pending.append(self._score(log_softmax(logits), token, self._text.length))
        text = self._text.push(self._engine.token_bytes(token, special=token in self._work.shown))
        finish = None
        if not self._text.stopped and self._generated == self._work.max_tokens:
            text += self._text.finish()
            finish = "length"
        return self._delta(text, "stop" if self._text.stopped else finish)

    def _delta(self, text: str, finish: str | None) -> Delta:
        """Scores go out with the first character of their token; what a stop string swallowed goes with it."""
        emitted = self._text.emitted
        everything = finish is not None and not self._text.stopped
        scores = [score for score in self._pending if everything or score.offset < emitted]
        self._pending = self._pending[len(scores) :]
        reused = self._sequence.reused if self._sequence else 0
        prompt_scores, self._prompt_scores = self._prompt_scores, None
        return Delta(text, scores, finish, self._generated, reused, prompt_scores)

    def _score(self, logprobs: np.ndarray, token: int, offset: int) -> TokenScore:
        top = most_likely(logprobs, self._work.top_logprobs or 0)
        return TokenScore(token, float(logprobs[token]), top, offset)

    def _score_prompt(self, rows: np.ndarray, begin: int) -> None:
        assert self._prompt_scores is not None
        following = self._work.prompt[begin + 1 : begin + len(rows) + 1]
        for row, token in zip(rows, following, strict=False):  # the last row of the prompt has no prompt token to score
            self._prompt_scores.append(self._score(log_softmax(row), token, 0))
