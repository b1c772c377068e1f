"""Penalties for what a sequence would say again: of single tokens, and of runs of them (DRY).

Repetition penalty as in transformers and llama.cpp: over the prompt and what was generated. DRY as in llama.cpp: a
token that would go on with a run that stood in the text before loses ``multiplier * base ** (length of the run -
allowed_length)``. https://github.com/oobabooga/text-generation-webui/pull/5677
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

LARGEST_LOG = 88.7228391
"""Of a float32: llama.cpp lets the penalty grow no further."""

MOST_PENALTY = 1e30
"""Less than what float32 holds: among tokens that all have it, logits still are numbers."""

MAX_TAIL = 20
"""Tokens of a breaker behind its first one, as in llama.cpp."""

Breakers = Mapping[int, frozenset[tuple[int, ...]]]
"""A token with which a sequence breaker may begin, and the tokens that complete it: none where it is all in one."""


@dataclass(frozen=True)
class Dry:
    """``last_n`` tokens are looked at, -1 for all; ``breakers`` end a run."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    last_n: int = -1
    breakers: Breakers = field(default_factory=dict)


@dataclass(frozen=True)
class Repeats:
    """``penalty`` 1 is none; it looks at the ``last_n`` tokens, -1 for all. ``dry`` None is none."""

    penalty: float = 1.0
    last_n: int = -1
    dry: Dry | None = None

    @property
    def neutral(self) -> bool:
        return self.dry is None and (self.penalty == 1 or self.last_n == 0)


class History:
    """The tokens of one sequence, prompt and reply, as the penalties need them."""

    def __init__(self, prompt: Iterable[int], repeats: Repeats) -> None:
        tokens = np.fromiter(prompt, np.int32)
        self._repeats = repeats
        self._count = len(tokens)
        self._tokens = np.zeros(max(256, 2 * self._count), np.int32)
        self._tokens[: self._count] = tokens
        self._known = set(tokens.tolist())
        self._distinct = np.array(sorted(self._known), np.int64)
        self._runs = None if repeats.dry is None else _Runs(self._tokens[: self._count], repeats.dry)

    def accept(self, token: int) -> None:
        """The sequence has one more token."""
        if self._count == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._count] = token
        self._count += 1
        if token not in self._known:
            self._known.add(token)
            self._distinct = np.append(self._distinct, token)
        if self._runs is not None:
            self._runs.accept(self._tokens[: self._count])

    def penalize(self, logits: np.ndarray) -> None:
        """Change logits float32 [vocab] in place."""
        repeats = self._repeats
        if repeats.penalty != 1 and repeats.last_n:
            whole = not 0 < repeats.last_n < self._count
            ids = self._distinct if whole else self._tokens[self._count - repeats.last_n : self._count]
            found, factor = logits[ids], np.float32(repeats.penalty)
            logits[ids] = np.where(found < 0, found * factor, found / factor)
        if self._runs is not None:
            ids, lost = self._runs.penalties(self._tokens[: self._count])
            logits[ids] -= lost


class _Runs:
    """For every place of a text: how long the run that ends there is also the end of the text; kept up token by token.

    A place costs a few bytes and a nanosecond a token: 10,000 tokens 10 microseconds.
    """

    def __init__(self, tokens: np.ndarray, dry: Dry) -> None:
        self._dry = dry
        self._longest_tail = max((len(tail) for tails in dry.breakers.values() for tail in tails), default=0)
        self._lengths = np.zeros(max(256, 2 * len(tokens)), np.int32)
        self._lengths[: len(tokens)] = _agreement_with_end(tokens.tolist())
        self._spare = np.zeros_like(self._lengths)
        self._break = -1  # where the last breaker begins, and how many tokens it has behind its first
        self._tail = 0
        for end in range(len(tokens)):
            self._note_break(tokens, end)

    def accept(self, tokens: np.ndarray) -> None:
        """``tokens`` [n]: all of them, the last one new."""
        n = len(tokens)
        if n > len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
            self._spare = np.zeros_like(self._lengths)
        grown = self._spare[:n]
        np.add(self._lengths[: n - 1], 1, out=grown[1:])
        grown[0] = 1
        grown *= tokens == tokens[-1]
        grown[-1] = 0
        self._lengths, self._spare = self._spare, self._lengths
        self._note_break(tokens, n - 1)

    def penalties(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct tokens that would go on with a run, and what each loses, float32."""
        dry, n = self._dry, len(tokens)
        window = n if dry.last_n < 0 else min(n, dry.last_n)
        limit = window
        since = n - 1 - self._break
        if self._break >= 0 and since < window:
            limit = since - self._tail
        none = np.empty(0, np.int64), np.empty(0, np.float32)
        if limit < dry.allowed_length or window <= dry.allowed_length:
            return none
        begin = n - window
        places = begin + np.flatnonzero(self._lengths[begin : n - 1] >= dry.allowed_length)
        lengths = np.minimum(self._lengths[places], np.minimum(limit, places - begin + 1))
        places, lengths = places[lengths >= dry.allowed_length], lengths[lengths >= dry.allowed_length]
        if not len(places):
            return none
        ids, of = np.unique(tokens[places + 1], return_inverse=True)
        longest = np.zeros(len(ids), np.int32)
        np.maximum.at(longest, of, lengths)
        alone = np.array([() not in dry.breakers.get(int(token), ()) for token in ids])
        return ids[alone], self._lost(longest[alone])

    def _lost(self, lengths: np.ndarray) -> np.ndarray:
        dry = self._dry
        exponents = lengths - dry.allowed_length
        if dry.base > 1.000001:
            exponents = np.minimum(exponents, int(LARGEST_LOG / np.log(dry.base)))
        return np.minimum(dry.multiplier * dry.base ** exponents.astype(np.float64), MOST_PENALTY).astype(np.float32)

    def _note_break(self, tokens: np.ndarray, end: int) -> None:
        """The breaker that begins last counts; of those that begin there, the longest."""
        for tail in range(min(self._longest_tail, end) + 1):
            begin = end - tail
            if begin < self._break:
                return
            tails = self._dry.breakers.get(int(tokens[begin]))
            if tails is not None and tuple(tokens[begin + 1 : end + 1].tolist()) in tails:
                self._break, self._tail = begin, tail
                return


def _agreement_with_end(tokens: list[int]) -> list[int]:
    """For every place: the length of the longest run that ends there and also at the end; 0 for the end itself.

    The Z-algorithm on the reversed list: linear time. https://cp-algorithms.com/string/z-function.html
    """
    text = tokens[::-1]
    n = len(text)
    found = [0] * n
    left = right = 0
    for place in range(1, n):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < n and text[length] == text[place + length]:
            length += 1
        found[place] = length
        if place + length > right:
            left, right = place, place + length
    return found[::-1]


class BreakerTable:
    """The tokens that sequence breakers, given as text, can be made of. For one thread."""

    def __init__(self, vocab_size: int, token_bytes: Callable[[int, bool], bytes], encode: Callable[[str], list[int]]):
        self._vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._encode = encode
        self._texts: list[bytes] = []
        self._found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def breakers(self, texts: Iterable[str]) -> Breakers:
        """Every way in which tokens begin one of the texts and go on with it."""
        out: dict[int, set[tuple[int, ...]]] = {}
        for text in texts:
            if text not in self._found:
                if len(self._found) >= 256:
                    self._found.clear()
                self._found[text] = self._ways(text)
            for token, tail in self._found[text]:
                out.setdefault(token, set()).add(tail)
        return {token: frozenset(tails) for token, tails in out.items()}

    def _ways(self, text: str) -> list[tuple[int, tuple[int, ...]]]:
        if not self._texts:
            self._texts = [self._token_bytes(token, True) for token in range(self._vocab_size)]
        raw = text.encode()
        ways: list[tuple[int, tuple[int, ...]]] = [(t, ()) for t, word in enumerate(self._texts) if raw in word]
        for cut in range(1, len(text)):
            head, rest = text[:cut].encode(), tuple(self._encode(text[cut:])[:MAX_TAIL])
            ways += [(t, rest) for t, word in enumerate(self._texts) if word.endswith(head) and raw not in word]
        return ways
