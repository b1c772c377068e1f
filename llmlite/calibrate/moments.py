"""Second moments of the inputs of a linear layer, summed in float32 batch by batch."""

from __future__ import annotations

import torch

from llmlite.quantize.types import Moments

TILE = 512  # channels to a side; of a symmetric product only the tiles on and below the diagonal are computed
HELD_EVERY = 8  # every eighth row of the calibration text is kept from the solvers


class MomentSums:
    """Sums x xT, and y xT where the unquantized network's inputs y are given, over the rows of a corpus.

    Of a corpus of at least `HELD_EVERY` rows every eighth goes into the held-out moments instead.
    """

    def __init__(self, width: int, rows: int, device: str | torch.device = "cpu", *, drift: bool = False):
        self._held = _Sum(width, device, cross=False) if rows >= HELD_EVERY else None
        self._sum = _Sum(width, device, cross=drift)

    def add(self, start: int, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Take in rows [rows, length, in] of the corpus from ``start``; y alike."""
        if self._held is None:
            self._sum.add(x, y)
            return
        held = torch.arange(start, start + len(x)) % HELD_EVERY == HELD_EVERY - 1
        if held.any():
            self._held.add(x[held], None)
            x, y = x[~held], None if y is None else y[~held]
        if len(x):
            self._sum.add(x, y)

    def moments(self) -> Moments:
        """What was summed."""
        held = None if self._held is None else self._held.moments(None)
        return self._sum.moments(held)


class _Sum:
    def __init__(self, width: int, device: str | torch.device, *, cross: bool):
        self.xxt = torch.zeros(width, width, device=device)
        self.cross = torch.zeros_like(self.xxt) if cross else None
        self.absmax = torch.zeros(width, device=device)
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        for top in range(0, len(self.xxt), TILE):
            rows = x[:, top : top + TILE].T
            self.xxt[top : top + TILE, : top + TILE].addmm_(rows, x[:, : top + TILE])
        if self.cross is not None and y is not None:
            self.cross.addmm_(y.reshape(-1, y.shape[-1]).float().T, x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.count += len(x)

    def moments(self, held: Moments | None) -> Moments:
        for top in range(0, len(self.xxt), TILE):  # what lies above the diagonal mirrors what lies below
            self.xxt[:top, top : top + TILE] = self.xxt[top : top + TILE, :top].T
        return Moments(self.xxt, self.absmax, self.count, self.cross, held)
