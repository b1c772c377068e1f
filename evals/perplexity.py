"""Perplexity by three named protocols; figures of different protocols can't be compared.

A text of n token ids x_0 .. x_(n-1) (x_0 is the beginning-of-text token where the tokenizer puts one in front) is cut
into windows. Each window starts from an empty cache, and some of its predictions are scored; S is the set of scored
tokens, c(t) the tokens of the window that stand before token t:

    nll_t = -ln p(x_t | c(t))        perplexity = exp(mean of nll_t over S)

- ``llama.cpp``: windows k of W = 512 tokens, x_(kW) .. x_(kW+W-1), their first token replaced by the
  beginning-of-text token where there is one; a rest shorter than W is left out. S: the tokens at W/2 + 1 .. W - 1 of
  each window, so each is predicted from more than half a window. This is llama-perplexity's default
  (llama.cpp, tools/perplexity).
- ``paper``: windows k of W = 2,048 tokens, as they stand; a rest is left out. S: the tokens at 1 .. W - 1 of each.
  GPTQ (arXiv 2210.17323, section 4) and the papers after it report this.
- ``sliding``: windows of W = 1,024 tokens that begin at 0, s, 2s, ... with the stride s = 512, the last one cut short
  where the text ends. S: in each window the tokens that no window before it had, so every token of the text but x_0
  is scored once, all but the first W - 1 from at least W - s tokens. transformers' documentation calls this
  "perplexity of fixed-length models"; s = 1 would be the exact figure for a context of W, at W times the work.

By the delta method the standard error is perplexity * std(nll) / sqrt(|S| - 1), std taken with divisor |S|: what
llama-perplexity prints. It takes the tokens as independent.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.texts import Text

BUCKETS = 8  # ranges of positions that figures are told for


@dataclass(frozen=True)
class Window:
    """``tokens`` int64 [n] of a text; ``start``: where they begin in it; ``first``: position of the first scored
    prediction, that of the token after it."""

    tokens: np.ndarray
    start: int
    first: int

    @property
    def scored(self) -> int:
        """How many predictions count."""
        return len(self.tokens) - 1 - self.first


class Tokenizes(typing.Protocol):
    """What makes token ids int64 [n] of a text, and the id to put in front of them, None for nothing."""

    bos: int | None

    def tokenize(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Protocol:
    """One of the ways in the module's text; the fields say where they differ.

    ``window``: W; ``stride``: s, None where windows stand side by side; ``bos_per_window``: the first token of every
    window is replaced by the beginning-of-text token; ``second_half``: only those predictions count.
    """

    name: str
    window: int
    stride: int | None = None
    bos_per_window: bool = False
    second_half: bool = False

    def windows(
        self, ids: np.ndarray, bos: int | None, window: int, stride: int | None, limit: int | None
    ) -> list[Window]:
        """The first ``limit`` windows of a tokenized text; `Windows.cut` refuses one that is too short."""
        if bos is not None:
            ids = np.concatenate([[bos], ids])
        if stride is not None:
            return self._sliding(ids, window, stride)[:limit]
        first = window // 2 if self.second_half else 0
        out = []
        for start in range(0, len(ids) - window + 1, window)[:limit]:
            tokens = ids[start : start + window].copy()
            if self.bos_per_window and bos is not None:
                tokens[0] = bos
            out.append(Window(tokens, start, first))
        return out

    def _sliding(self, ids: np.ndarray, window: int, stride: int) -> list[Window]:
        out, had = [], 1  # nothing predicts the first token
        for start in range(0, len(ids), stride):
            stop = min(start + window, len(ids))
            if stop > had:
                out.append(Window(ids[start:stop].copy(), start, had - 1 - start))
            had = stop
            if stop == len(ids):
                break
        return out


PROTOCOLS = {
    "llama.cpp": Protocol("llama.cpp", 512, bos_per_window=True, second_half=True),
    "paper": Protocol("paper", 2048),
    "sliding": Protocol("sliding", 1024, stride=512),
}


@dataclass(frozen=True)
class Windows:
    """How much of a text is scored: ``window`` tokens each, ``stride`` apart (None: the protocol's), at most
    ``limit`` of them."""

    protocol: Protocol
    window: int | None = None
    limit: int | None = None
    stride: int | None = None

    @property
    def length(self) -> int:
        return self.window or self.protocol.window

    @property
    def step(self) -> int | None:
        """The stride in use, None where windows stand side by side; half a window where only that was named."""
        if self.protocol.stride is None:
            return None
        return self.stride or (self.protocol.stride if self.window is None else self.length // 2)

    def to_json(self) -> dict:
        """Plain data that says which tokens of a text are scored; ``windows`` is None for all of them."""
        out: dict = {"name": self.protocol.name, "window": self.length, "windows": self.limit}
        return out if self.step is None else {**out, "stride": self.step}

    def cut(self, tokenizer: Tokenizes, text: Text) -> list[Window]:
        """A text's windows; `InputError` if it has less than one."""
        ids = tokenizer.tokenize(text.text)
        held = len(ids) + (tokenizer.bos is not None)
        if held < self.length:
            raise InputError(
                f"text {text.name!r} has {held:,} tokens, and protocol {self.protocol.name} needs {self.length:,} for "
                "a window: a longer text or a smaller --window is right"
            )
        return self.protocol.windows(ids, tokenizer.bos, self.length, self.step, self.limit)


@dataclass(frozen=True)
class Bucket:
    """A figure of the scored tokens that stand at ``start`` .. ``stop`` - 1 of their windows."""

    start: int
    stop: int
    tokens: int
    value: float


@dataclass(frozen=True)
class Places:
    """Where the scored tokens stand, int64 [n] each: ``window`` number, ``position`` in it, ``index`` in the text.

    A token's position is the number of tokens that it is predicted from.
    """

    window: np.ndarray
    position: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Places:
        position = [np.arange(w.first + 1, len(w.tokens)) for w in windows]
        return cls(
            np.concatenate([np.full(len(p), n) for n, p in enumerate(position)]),
            np.concatenate(position),
            np.concatenate([w.start + p for w, p in zip(windows, position, strict=True)]),
        )

    def by_position(self, values: np.ndarray) -> tuple[Bucket, ...]:
        """Means of float64 [n] over `BUCKETS` ranges of positions, as equal in width as whole numbers allow."""
        edges = np.linspace(self.position.min(), self.position.max() + 1, BUCKETS + 1).astype(int)
        out = []
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            inside = values[(self.position >= start) & (self.position < stop)]
            if len(inside):
                out.append(Bucket(start, stop, len(inside), float(inside.mean())))
        return tuple(out)

    def by_window(self, values: np.ndarray) -> tuple[float, ...]:
        """The mean of float64 [n] in each window."""
        return tuple((np.bincount(self.window, values) / np.bincount(self.window)).tolist())


@dataclass(frozen=True)
class Perplexity:
    """``value`` and ``stderr`` as in the module's text; ``tokens``: predictions scored; ``windows``: windows used.

    ``by_position``: the perplexity of ranges of positions; ``by_window``: the mean nll of each window in nats, for
    comparing two models window by window.
    """

    value: float
    stderr: float
    tokens: int
    windows: int
    by_position: tuple[Bucket, ...]
    by_window: tuple[float, ...]


def perplexity(nll: np.ndarray, places: Places) -> Perplexity:
    """From nll float64 [n], n >= 2, in the order of ``places``."""
    value = float(np.exp(nll.mean()))
    buckets = tuple(Bucket(b.start, b.stop, b.tokens, float(np.exp(b.value))) for b in places.by_position(nll))
    windows = places.by_window(nll)
    stderr = value * float(nll.std()) / float(np.sqrt(len(nll) - 1))
    return Perplexity(value, stderr, len(nll), len(windows), buckets, windows)
