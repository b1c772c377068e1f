"""Speculative decoding: what a sequence will probably say next, and whether guessing pays.

A guess costs one more row of a step that is run anyway, and saves a step where it is right. Every token is still drawn
from the model's own logits, so guesses change how fast a reply comes, not what it says.
"""

from __future__ import annotations

from typing import Protocol

LONGEST, SHORTEST = 4, 2
MOST = 8
PAUSE = 48
"""Tokens after which a sequence whose guesses did not pay tries again."""


class Drafter(Protocol):
    """Guesses of one sequence. Used on the engine thread alone."""

    def ask(self, most: int) -> None:
        """Up to ``most`` guesses will be wanted for the next step; 0: none."""

    def propose(self) -> list[int]:
        """The guesses that were asked for, or fewer."""

    def accept(self, token: int) -> None:
        """The sequence has one more token."""

    def close(self) -> None:
        """The sequence is over."""


class Drafts(Protocol):
    """What makes `Drafter`s; ``seconds``: what one guess costs."""

    seconds: float

    def open(self, prompt: list[int]) -> Drafter:
        """The guesses for a sequence that begins with ``prompt``."""

    def run(self) -> None:
        """Make the guesses that were asked for since the last call."""

    def close(self) -> None:
        """Free what it holds."""


class PromptLookup:
    """Guesses that what followed the present few tokens the last time follows again.

    https://github.com/apoorvumang/prompt-lookup-decoding; good where a reply repeats its prompt: edits, code.
    """

    def __init__(self, prompt: list[int]) -> None:
        self._prompt = prompt  # noted with the first token of the reply: sequences that wait cost nothing
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._most = 0

    def ask(self, most: int) -> None:
        self._most = most

    def propose(self) -> list[int]:
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._ends.get(tuple(self._tokens[-size:]))
            if self._most and place is not None:
                return self._tokens[place : place + self._most]
        return []

    def accept(self, token: int) -> None:
        """Runs of tokens are noted one token late: the last one is what is looked up."""
        prompt, self._prompt = self._prompt, []
        for each in (*prompt, token):
            self._note(each)

    def _note(self, token: int) -> None:
        for size in range(SHORTEST, LONGEST + 1):
            if len(self._tokens) >= size:
                self._ends[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def close(self) -> None:
        pass


class Lookups:
    """`PromptLookup` for every sequence; guesses cost nothing."""

    seconds = 0.0

    def open(self, prompt: list[int]) -> PromptLookup:
        return PromptLookup(prompt)

    def run(self) -> None:
        pass

    def close(self) -> None:
        pass


class Pace:
    """How many guesses one sequence may make: more while they are right, none for a while when they don't pay."""

    def __init__(self) -> None:
        self._most = 2
        self._right = 0.5  # the share of guesses that were right, a moving average
        self._pause = 0

    def most(self, price: float) -> int:
        """Guesses for the next step; ``price``: what one costs, in steps that it could save."""
        if self._pause:
            self._pause -= 1
            return 0
        if self._right < price:
            self._pause = PAUSE
            self._most, self._right = 2, max(price, 0.3)
            return 0
        return self._most

    def note(self, proposed: int, right: int) -> None:
        """How the last guesses went."""
        self._right = 0.8 * self._right + 0.2 * right / proposed
        self._most = min(MOST, self._most * 2) if right == proposed else max(2, right + 1)
