"""Perplexity by two named protocols; figures of different protocols can't be compared.

With nll the natural logarithm's negative of the probability of each scored token, and n of them:
perplexity = exp(mean(nll)), and by the delta method its standard error is perplexity * std(nll) / sqrt(n - 1),
std taken with divisor n: what llama-perplexity prints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmlite.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scored predictions.

    The text is tokenized once, with the beginning-of-text token in front where the tokenizer adds one, and cut
    into windows of ``window`` tokens; a rest shorter than a window is left out. Each window starts from an empty
    cache. ``bos_per_window``: the first token of every window is replaced by the beginning-of-text token, where
    there is one. ``second_half``: only predictions made with at least half a window of context count, those of
    tokens window/2 + 1 to window - 1; otherwise all, those of tokens 1 to window - 1.
    """

    name: str
    window: int
    bos_per_window: bool
    second_half: bool

    def first(self, window: int) -> int:
        """The first position whose prediction is scored."""
        return window // 2 if self.second_half else 0

    def windows(self, ids: np.ndarray, bos: int | None, window: int, limit: int | None) -> np.ndarray:
        """int64 [count, window] of a tokenized text; `InputError` if it has less than one window."""
        if bos is not None:
            ids = np.concatenate([[bos], ids])
        count = len(ids) // window
        if count == 0:
            raise InputError(
                f"the text has {len(ids):,} tokens, and protocol {self.name} needs {window:,} for a window"
            )
        out = ids[: count * window].reshape(count, window)[:limit].copy()
        if self.bos_per_window and bos is not None:
            out[:, 0] = bos
        return out


PROTOCOLS = {
    # llama-perplexity's default: windows of 512, 255 predictions of each scored
    "llama.cpp": Protocol("llama.cpp", 512, bos_per_window=True, second_half=True),
    # what GPTQ (arXiv 2210.17323) and the papers after it report: windows of 2,048, all 2,047 predictions scored
    "paper": Protocol("paper", 2048, bos_per_window=False, second_half=False),
}


@dataclass(frozen=True)
class Perplexity:
    """``value`` and ``stderr`` as in the module's text; ``tokens``: predictions scored; ``windows``: windows used.

    ``by_window``: the mean nll of each window in nats, for comparing two models window by window.
    """

    value: float
    stderr: float
    tokens: int
    windows: int
    by_window: tuple[float, ...] = ()


def window_means(values: np.ndarray, windows: int) -> tuple[float, ...]:
    """The mean of float64 [n] in each of ``windows`` windows of one length."""
    return tuple(values.reshape(windows, -1).mean(axis=1).tolist())


def perplexity(nll: np.ndarray, windows: int) -> Perplexity:
    """From nll float64 [n], n >= 2."""
    value = float(np.exp(nll.mean()))
    stderr = value * float(nll.std()) / float(np.sqrt(len(nll) - 1))
    return Perplexity(value, stderr, len(nll), windows)
