"""How the hidden states of a text's tokens become one vector: the mean of them, the first or the last."""

from __future__ import annotations

from typing import Literal

import numpy as np

Pooling = Literal["mean", "cls", "last"]

CHUNK = 128
"""Tokens of a text that are run at a time; others have their turn between two of these."""


class Pool:
    """Takes in the hidden states of one text, part by part."""

    def __init__(self, pooling: Pooling, width: int) -> None:
        self._pooling = pooling
        self._sum = np.zeros(width, np.float64)
        self._count = 0

    def take(self, states: np.ndarray) -> None:
        """The states float32 [tokens, width] of the next tokens."""
        if self._pooling == "mean":
            self._sum += states.sum(axis=0, dtype=np.float64)
        elif self._pooling == "last":
            self._sum[:] = states[-1]
        elif self._count == 0:
            self._sum[:] = states[0]
        self._count += len(states)

    def vector(self) -> np.ndarray:
        """float32 [width] of length 1. Raises `FloatingPointError` where the states are not finite or all zero."""
        length = float(np.linalg.norm(self._sum))
        if not np.isfinite(length) or length == 0:
            raise FloatingPointError("the model's hidden states are not finite or all zero")
        return (self._sum / length).astype(np.float32)
