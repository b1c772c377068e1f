"""Second moments of the inputs of a linear layer, summed in float32 batch by batch."""

from __future__ import annotations

import torch

from llmlite.quantize.types import Moments

TILE = 512  # channels to a side; of a symmetric product only the tiles on and below the diagonal are computed
HELD_EVERY = 8  # every eighth row of the calibration text is kept from the solvers


def held_out(start: int, count: int) -> torch.Tensor:
    """Which of ``count`` rows of a corpus from ``start`` judge: bool [count]."""
    return torch.arange(start, start + count) % HELD_EVERY == HELD_EVERY - 1


class MomentSums:
    """Sums x xT, and y xT and r xT where they are given, over the rows of a corpus.

    y: the unquantized network's inputs in x's place; r: what its residual stream has more where these layers write to
    it. Of a corpus of at least `HELD_EVERY` rows every eighth goes into the held-out moments instead.
    """

    def __init__(self, width: int, rows: int, device: str | torch.device = "cpu"):
        self._held = _Sum(width, device) if rows >= HELD_EVERY else None
        self._sum = _Sum(width, device)

    def add(self, start: int, x: torch.Tensor, y: torch.Tensor | None = None, r: torch.Tensor | None = None) -> None:
        """Take in rows [rows, length, in] of the corpus from ``start``; y alike, r [rows, length, out]."""
        if self._held is None:
            self._sum.add(x, y, r)
            return
        held = held_out(start, len(x))
        for rows, total in ((held, self._held), (~held, self._sum)):
            if rows.all():
                total.add(x, y, r)
            elif rows.any():
                total.add(x[rows], None if y is None else y[rows], None if r is None else r[rows])

    @property
    def finite(self) -> bool:
        """False where an input was infinite or no number (or so large that its square is)."""
        sums = [self._sum] if self._held is None else [self._sum, self._held]
        return all(bool(torch.isfinite(part.xxt.diagonal()).all()) for part in sums)

    def moments(self) -> Moments:
        """What was summed."""
        held = None if self._held is None else self._held.moments(None)
        return self._sum.moments(held)


class _Sum:
    def __init__(self, width: int, device: str | torch.device):
        self.xxt = torch.zeros(width, width, device=device)
        self.count = 0
        self.cross: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor | None, r: torch.Tensor | None) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        for top in range(0, len(self.xxt), TILE):
            rows = x[:, top : top + TILE].T
            self.xxt[top : top + TILE, : top + TILE].addmm_(rows, x[:, : top + TILE])
        if y is not None:
            self.cross = _plus(self.cross, y, x)
        if r is not None:
            self.residual = _plus(self.residual, r, x)
        self.count += len(x)

    def moments(self, held: Moments | None) -> Moments:
        for top in range(0, len(self.xxt), TILE):  # what lies above the diagonal mirrors what lies below
            self.xxt[:top, top : top + TILE] = self.xxt[top : top + TILE, :top].T
        return Moments(self.xxt, self.count, self.cross, self.residual, held)


def _plus(total: torch.Tensor | None, left: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The total with leftT @ x added, float32; a new one where there is none yet."""
    left = left.reshape(-1, left.shape[-1]).float()
    return left.T @ x if total is None else total.addmm_(left.T, x)
