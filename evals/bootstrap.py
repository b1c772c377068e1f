"""Paired bootstrap: how far a difference of two means may be chance, as blocks of data are drawn again.

The percentile method (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13) on pairs: each resample
draws blocks with replacement and takes both sides' sums over the same blocks. Blocks are windows of text, whose
tokens depend on each other, or items of a task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST_BLOCKS = 10  # below this the percentiles of a resample say little
RESAMPLES_AT_ONCE = 1 << 22  # draws held in memory


@dataclass(frozen=True)
class Interval:
    """A difference of means, its interval at the level asked for, and the wider one that holds for all at once."""

    difference: float
    low: float
    high: float
    family_low: float
    family_high: float
    blocks: int

    @property
    def real(self) -> bool | None:
        """The interval that holds for all comparisons at once excludes 0; None with too few blocks to say."""
        if self.blocks < FEWEST_BLOCKS:
            return None
        return self.family_low > 0 or self.family_high < 0


@dataclass(frozen=True)
class Resampling:
    """``resamples`` draws by the seed; ``level`` of each interval; ``comparisons`` are made at once (Bonferroni)."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95
    comparisons: int = 1


def paired(first: np.ndarray, second: np.ndarray, counts: np.ndarray, how: Resampling) -> Interval:
    """mean(first) - mean(second), from sums float64 [blocks] of both and the number of values int [blocks] in each.

    The same seed draws the same blocks, so intervals over the same blocks belong together.
    """
    apart = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    counts = np.asarray(counts, np.float64)
    blocks = len(apart)
    generator = np.random.default_rng(how.seed)
    means = []
    at_once = max(1, RESAMPLES_AT_ONCE // blocks)
    for start in range(0, how.resamples, at_once):
        rows = min(at_once, how.resamples - start)
        drawn = generator.integers(0, blocks, (rows, blocks))
        means.append(apart[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - how.level) / 2
    of_all = tail / how.comparisons
    low, high, wide_low, wide_high = np.quantile(np.concatenate(means), [tail, 1 - tail, of_all, 1 - of_all])
    return Interval(
        float(apart.sum() / counts.sum()), float(low), float(high), float(wide_low), float(wide_high), blocks
    )
