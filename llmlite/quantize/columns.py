"""The inner step that error feedback and coordinate descent share: one input channel of every row onto its grid."""

from __future__ import annotations

import torch

from llmlite.quantize.grid import inverse
from llmlite.quantize.types import Grid

CHUNK = 32  # channels between two matrix products that update all the others


class ColumnGrid:
    """Rounds channels [out] with the ranges of their groups, given as [groups, out]: a channel is then contiguous."""

    def __init__(self, grid: Grid, scales: torch.Tensor, offsets: torch.Tensor | None):
        self.grid, self.scales, self.offsets = grid, scales, offsets
        self.inverses = inverse(scales)
        self.low, self.high = (1.0 if grid.scale_rule == "narrow" else 0.0), float(grid.levels - 1)
        self.middle = float(grid.levels // 2)
        if grid.codebook is not None:
            self.table = torch.tensor(grid.codebook, device=scales.device)
            self.middles = (self.table[1:] + self.table[:-1]) / 2

    def round(self, wanted: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes (float32, or int64 with a codebook) and their values, float32 [out]."""
        scale, back = self.scales[group], self.inverses[group]
        if self.grid.codebook is not None:
            index = torch.bucketize(wanted * back, self.middles)
            return index, self.table[index].mul_(scale)
        if self.offsets is None:
            codes = torch.mul(wanted, back).add_(self.middle).round_().clamp_(self.low, self.high)
            return codes, (codes - self.middle).mul_(scale)
        offset = self.offsets[group]
        if self.grid.zero == "minimum":
            codes = torch.sub(wanted, offset).mul_(back).round_().clamp_(self.low, self.high)
            return codes, torch.addcmul(offset, codes, scale)
        codes = torch.addcmul(offset, wanted, back).round_().clamp_(self.low, self.high)
        return codes, (codes - offset).mul_(scale)


def chunk_of(block: int) -> int:
    """Channels that are worked on between two updates of all others: they never cross a block of ranges."""
    if block % CHUNK == 0:
        return CHUNK
    return block if block < CHUNK else next(size for size in range(CHUNK, 0, -1) if block % size == 0)
