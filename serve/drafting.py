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

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow."""

    def accept(self, token: int) -> None:
        """The sequence has one more token."""


class PromptLookup:
    """Guesses that what followed the present few tokens the last time follows again.

    https://github.com/apoorvumang/prompt-lookup-decoding; good where a reply repeats its prompt: edits, code.
    """

    def __init__(self, prompt: list[int]) -> None:
        self._prompt = prompt  # noted with the first token of the reply: sequences that wait cost nothing
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def propose(self, most: int) -> list[int]:
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._ends.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + most]
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
