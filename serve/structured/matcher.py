"""The state of one sequence within a grammar."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher

from llmlite.errors import LlmliteError


class GrammarTooHard(LlmliteError):
    """Following the grammar took more than a step may take, or it came to where no token goes on."""


class GrammarConstraint:
    """A `Constraint` by llguidance. ``matcher`` belongs to it alone."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self._vocab_size = vocab_size

    def mask(self) -> np.ndarray:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise GrammarTooHard(reason(self._matcher))
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise GrammarTooHard(reason(self._matcher))


def reason(matcher: LLMatcher) -> str:
    """The matcher's error in one line, without the excerpt of the grammar and what it says of its state."""
    message = matcher.get_error().split("\n<")[0]
    if message.startswith("NoExtension"):
        return "no token of this model goes on where the grammar stands"
    message = message.split("failed to compile JSON schema: ")[-1]
    lines = [line.strip() for line in message.splitlines() if line.strip() and line.strip(" ^|") and " | " not in line]
    return "; ".join(lines)[:500].removesuffix(" <non-verbose/>") or "it can't be followed"
