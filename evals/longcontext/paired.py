"""Paired comparison of two models on the same questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT = 16  # differences up to which every pattern of signs is tried
PATTERNS = 100_000


@dataclass(frozen=True)
class Paired:
    """Mean of ``mine - theirs`` with its standard error, and how likely a difference as large is by chance.

    ``p``: two-sided, of a sign-flip permutation test (Fisher 1935): under the null hypothesis each difference is as
    likely with the other sign. All patterns of signs are tried up to 16 differences, else 100,000 of a fixed seed,
    and then p is (as extreme + 1) / (tried + 1).
    """

    change: float
    stderr: float
    p: float
    count: int


def paired(mine: np.ndarray, theirs: np.ndarray) -> Paired:
    """From two rows float64 [n], n >= 1, item by item the same questions."""
    differences = np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)
    count = len(differences)
    stderr = float(differences.std() / np.sqrt(count - 1)) if count > 1 else float("nan")
    return Paired(float(differences.mean()), stderr, _sign_flips(differences), count)


def _sign_flips(differences: np.ndarray) -> float:
    moved = differences[differences != 0]  # others are the same under both signs
    if len(moved) == 0:
        return 1.0
    seen = abs(moved.sum()) * (1 - 1e-12)
    if len(moved) <= EXACT:
        codes = np.arange(1 << len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((1 - 2 * codes) @ moved) >= seen).mean())
    random = np.random.default_rng(0)
    extreme = 0
    for _ in range(100):
        signs = 1 - 2 * random.integers(0, 2, (PATTERNS // 100, len(moved)))
        extreme += int((np.abs(signs @ moved) >= seen).sum())
    return (extreme + 1) / (PATTERNS + 1)
