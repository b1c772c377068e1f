"""One sequence from prompt to finish: which tokens it runs next, and what comes of the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmlite.serve.constraint import Constraint
from llmlite.serve.drafting import Drafter, Pace
from llmlite.serve.engines.base import Engine, Piece, Sequence
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
    """The state of one sequence. In turns: `piece` says what to run next, `take` what came of it.

    ``drafter``: guesses its next tokens, None for none.
    """

    def __init__(self, work: Work, engine: Engine, drafter: Drafter | None = None) -> None:
        self.work = work
        self.ids = np.array(work.prompt, np.int32)
        self.sequence: Sequence | None = None
        self.generated = 0
        self._engine = engine
        self._drafter = drafter
        self._pace = Pace()
        self._draft: list[int] = []
        self._text = TextStream(work.stops)
        self._constraint = None if work.constraint is None else work.constraint()
        self._random = None if work.sampling.greedy else generator(work.seed, work.choice)
        self._counts: Counter[int] = Counter()
        self._last = 0
        self._begin = 0
        self._pending: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] | None = None
        if work.score_prompt:
            self._prompt_scores = [TokenScore(work.prompt[0], None, [])]

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that must be run yet; 0: it generates."""
        return len(self.work.prompt) - (0 if self.sequence is None else len(self.sequence.tokens))

    def is_short(self, tokens: int) -> bool:
        """Whether no more than ``tokens`` of the prompt had to be run from the start; the end of a long one is not."""
        return self.sequence is not None and len(self.work.prompt) - self.sequence.reused <= tokens

    def open(self) -> Sequence:
        """Take a slot of the engine."""
        self.sequence = self._engine.open(self.work.prompt, self.work.adapter, reuse=not self.work.score_prompt)
        return self.sequence

    def piece(self, most: int, price: float | None = None) -> Piece:
        """What to run next: up to ``most`` tokens of the prompt, or the last token drawn with guesses behind it.

        ``price``: what a guess costs, in steps that it could save; None: no guesses.
        """
        assert self.sequence is not None
        if self.prompt_left > 0:
            self._begin = len(self.sequence.tokens)
            if not self._engine.can_cut:  # the last token goes alone, for a copy of all before it to be kept
                most = min(most, max(1, self.prompt_left - 1))
            tokens = self.work.prompt[self._begin : self._begin + most]
            last = self._begin + len(tokens) == len(self.work.prompt)
            return Piece(self.sequence, tokens, len(tokens) if self.work.score_prompt else int(last))
        guesses = 0
        if self._drafter is not None and price is not None:
            guesses = min(most - 1, self._pace.most(price), self.work.max_tokens - self.generated - 1)
        self._draft = self._drafter.propose(guesses) if self._drafter is not None and guesses > 0 else []
        return Piece(self.sequence, [self._last, *self._draft], 1 + len(self._draft))

    def take(self, rows: np.ndarray) -> Delta | None:
        """What the logits of the last piece add, [piece's rows, vocab]; None while the prompt isn't through."""
        assert self.sequence is not None
        if self.generated == 0:
            if self._prompt_scores is not None:
                self._score_prompt(rows)
            if self.prompt_left == 1:
                self._engine.checkpoint(self.sequence)
            return None if self.prompt_left > 0 else self._delta(*self._next(rows[-1]))
        text, finish, right = "", None, 0
        for place, row in enumerate(rows):
            more, finish = self._next(row)
            text += more
            if finish or place == len(self._draft) or self._last != self._draft[place]:
                break
            right += 1
        if self._draft:
            self._pace.note(len(self._draft), right)
            wrong = len(self._draft) - right
            if wrong:
                self._engine.cut(self.sequence, len(self.sequence.tokens) - wrong)
        return self._delta(text, finish)

    def close(self, keep: bool) -> None:
        """Give the sequence back to the engine, if it was ever opened."""
        if self.sequence is not None:
            self._engine.close(self.sequence, keep)
            self.sequence = None

    def _next(self, logits: np.ndarray) -> tuple[str, str | None]:
        """Draw a token from one row of logits: the text that it makes certain, and why the sequence ends, or None."""
        if not np.isfinite(logits.max()):
            raise FloatingPointError("the model's logits are not finite: its weights are damaged or it overflowed")
        if self.work.max_tokens == 0:
            return "", "length"
        mask = None if self._constraint is None else self._constraint.mask()
        token = choose(allowed(logits, mask), self.work.sampling, self._counts, self._random)
        self.generated += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        self._last = token
        if token in self._engine.eos:
            return self._text.finish(), "stop"
        self._counts[token] += 1
        if self._drafter is not None:
            self._drafter.accept(token)
        if self.work.top_logprobs is not None:
            self._pending.append(self._score(log_softmax(logits), token, self._text.length))
        text = self._text.push(self._engine.token_bytes(token, special=token in self.work.shown))
        if self._text.stopped:
            return text, "stop"
        if self.generated == self.work.max_tokens:
            text += self._text.finish()
            return text, "stop" if self._text.stopped else "length"
        return text, None

    def _delta(self, text: str, finish: str | None) -> Delta:
        """Scores go out with the first character of their token; what a stop string swallowed goes with it."""
        emitted = self._text.emitted
        everything = finish is not None and not self._text.stopped
        scores = [score for score in self._pending if everything or score.offset < emitted]
        self._pending = self._pending[len(scores) :]
        reused = self.sequence.reused if self.sequence else 0
        prompt_scores, self._prompt_scores = self._prompt_scores, None
        return Delta(text, scores, finish, self.generated, reused, prompt_scores)

    def _score(self, logprobs: np.ndarray, token: int, offset: int) -> TokenScore:
        top = most_likely(logprobs, self.work.top_logprobs or 0)
        return TokenScore(token, float(logprobs[token]), top, offset)

    def _score_prompt(self, rows: np.ndarray) -> None:
        assert self._prompt_scores is not None
        following = self.work.prompt[self._begin + 1 : self._begin + len(rows) + 1]
        for row, token in zip(rows, following, strict=False):  # the last row of the prompt has no prompt token to score
            self._prompt_scores.append(self._score(log_softmax(row), token, 0))
