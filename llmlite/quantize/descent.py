"""Cyclic coordinate descent on a rounded weight: every code, then every scale, chosen again with the rest as it is.

Each step can only lower tr(E M ET), E = rounded - target: QuantEase (arXiv:2309.01885) and CDQuant (2406.17542) for the
codes; the scales of a group (and its minimums), a super-block's whole numbers and its own scales are each the solution
of a small least-squares problem with the full M, rounded as the file keeps them and taken where the loss falls.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmlite.quantize.columns import ColumnGrid, chunk_of
from llmlite.quantize.grid import half, inverse, steps_of, stored
from llmlite.quantize.types import Rounded


def descend(
    target: torch.Tensor, rounded: Rounded, matrix: torch.Tensor, sweeps: int, *, refit: bool = True
) -> Rounded:
    """``sweeps`` over all codes of ``rounded``, the scales refitted between two of them.

    ``target`` float32 [out, in]; ``matrix`` float32 [in, in], positive definite: the damped second moments.
    """
    work = _Work(target, rounded, matrix)
    for sweep in range(sweeps):
        if sweep and refit:
            work.choose_scales()
        work.choose_codes()
    return work.result()


class _Work:
    """A weight in the making, transposed: a channel of every row is contiguous, which is four times as fast."""

    def __init__(self, target: torch.Tensor, rounded: Rounded, matrix: torch.Tensor):
        self.grid, self.matrix, self.start = rounded.grid, matrix, rounded
        self.codes = rounded.codes.T.float() if rounded.grid.codebook is None else rounded.codes.T.long()
        self.codes = self.codes.contiguous()
        self.ranges = rounded.ranges.map(lambda part: part.T.contiguous())
        self.values = rounded.dequantize().T.contiguous()
        self.slopes = matrix @ (self.values - target.T)  # half the gradient of the loss
        self.size = rounded.grid.group or len(matrix)
        self.block = rounded.grid.block(len(matrix))

    def result(self) -> Rounded:
        codes = self.codes.T.to(torch.uint8).contiguous()
        return replace(self.start, codes=codes, ranges=self.ranges.map(lambda part: part.T.contiguous()))

    def choose_codes(self) -> None:
        """One sweep over the channels."""
        columns = ColumnGrid(self.grid, self.ranges.scales, self.ranges.offsets)
        pivots = self.matrix.diagonal().tolist()
        chunk = chunk_of(self.block)
        for start in range(0, len(self.matrix), chunk):
            stop = start + chunk
            slopes, values = self.slopes[start:stop].clone(), self.values[start:stop].clone()
            near = self.matrix[start:stop, start:stop]
            for i in range(chunk):
                wanted = torch.sub(values[i], slopes[i], alpha=1 / pivots[start + i])
                code, value = columns.round(wanted, (start + i) // self.size)
                slopes.addr_(near[i], value - values[i])
                self.codes[start + i] = code
                values[i] = value
            self._move(start, stop, values - self.values[start:stop])

    def _move(self, start: int, stop: int, change: torch.Tensor) -> None:
        """Add ``change`` [stop - start, out] to the values of these channels."""
        self.slopes.addmm_(self.matrix[:, start:stop], change)
        self.values[start:stop] += change

    def choose_scales(self) -> None:
        """Refit the scale (and minimum) of each group, and of each super-block, with the codes as they are."""
        if self.grid.super_block is None:
            for group in range(len(self.ranges.scales)):
                self._refit_group(group)
            return
        for group in range(len(self.ranges.scales)):
            self._refit_whole_numbers(group)
        assert self.ranges.d is not None
        for number in range(len(self.ranges.d)):
            self._refit_super_scales(number)

    def _solve(self, start: int, stop: int, directions: list[torch.Tensor]) -> list[torch.Tensor]:
        """How far to go along each direction [channels, out] for the least loss: float32 [out] each."""
        near, slopes = self.matrix[start:stop, start:stop], self.slopes[start:stop]
        first = directions[0]
        bent = near @ first
        size, pull = (first * bent).sum(0), (first * slopes).sum(0)
        if len(directions) == 1:
            return [torch.where(size > 0, -pull / size.clamp(min=1e-30), torch.zeros_like(size))]
        second = directions[1]
        both = (second * bent).sum(0)
        other_size, other_pull = (second * (near @ second)).sum(0), (second * slopes).sum(0)
        spread = size * other_size - both * both
        fits = spread > 1e-6 * size * other_size
        spread = torch.where(fits, spread, torch.ones_like(spread))
        none = torch.zeros_like(size)
        return [
            torch.where(fits, (both * other_pull - other_size * pull) / spread, none),
            torch.where(fits, (both * pull - size * other_pull) / spread, none),
        ]

    def _accept(self, start: int, stop: int, change: torch.Tensor) -> torch.Tensor:
        """Take ``change`` [channels, out] in the rows where it lowers the loss: bool [out]."""
        near, slopes = self.matrix[start:stop, start:stop], self.slopes[start:stop]
        better = (change * (near @ change + 2 * slopes)).sum(0) < 0
        self._move(start, stop, change * better)
        return better

    def _refit_group(self, group: int) -> None:
        start, stop = group * self.size, (group + 1) * self.size
        scale = self.ranges.scales[group]
        offset = None if self.ranges.offsets is None else self.ranges.offsets[group]
        steps = steps_of(self.codes[start:stop], offset, self.grid)
        if self.grid.zero != "minimum":
            (go,) = self._solve(start, stop, [steps])
            new = stored(scale + go, self.grid)
            better = self._accept(start, stop, steps * (new - scale))
            self.ranges.scales[group] = torch.where(better, new, scale)
            return
        assert offset is not None
        go, shift = self._solve(start, stop, [steps, torch.ones_like(steps)])
        new, low = stored(scale + go, self.grid), stored(offset + shift, self.grid)
        better = self._accept(start, stop, steps * (new - scale) + (low - offset))
        self.ranges.scales[group] = torch.where(better, new, scale)
        self.ranges.offsets[group] = torch.where(better, low, offset)  # type: ignore[index]

    def _refit_whole_numbers(self, group: int) -> None:
        """A group's scale code (and minimum's code), with its super-block's scales as they are."""
        ranges, block = self.ranges, self.grid.super_block
        assert block is not None and ranges.d is not None and ranges.scale_codes is not None
        start, stop, number = group * self.size, (group + 1) * self.size, group // block.groups
        d, scale = ranges.d[number], ranges.scales[group]
        steps = steps_of(self.codes[start:stop], None, self.grid)
        if ranges.offsets is None or ranges.offset_codes is None or ranges.dmin is None:
            (go,) = self._solve(start, stop, [steps])
            code = ((scale + go) * inverse(d)).round_().clamp_(*block.scale_range)
            better = self._accept(start, stop, steps * (d * code - scale))
        else:
            assert block.offset_bits is not None
            dmin, offset = ranges.dmin[number], ranges.offsets[group]
            go, shift = self._solve(start, stop, [steps, torch.ones_like(steps)])
            code = ((scale + go) * inverse(d)).round_().clamp_(*block.scale_range)
            low = (-(offset + shift) * inverse(dmin)).round_().clamp_(0, 2**block.offset_bits - 1)
            better = self._accept(start, stop, steps * (d * code - scale) + (-dmin * low - offset))
            ranges.offset_codes[group] = torch.where(better, low.to(torch.int16), ranges.offset_codes[group])
            ranges.offsets[group] = torch.where(better, -dmin * low, offset)
        ranges.scale_codes[group] = torch.where(better, code.to(torch.int16), ranges.scale_codes[group])
        ranges.scales[group] = torch.where(better, d * code, scale)

    def _refit_super_scales(self, number: int) -> None:
        """A super-block's own float16 scale (and that of its minimums), with the whole numbers as they are."""
        ranges, block = self.ranges, self.grid.super_block
        assert block is not None and ranges.d is not None and ranges.scale_codes is not None
        start, stop = number * self.block, (number + 1) * self.block
        groups = slice(number * block.groups, (number + 1) * block.groups)
        whole = ranges.scale_codes[groups].float()
        d = ranges.d[number]
        along = steps_of(self.codes[start:stop], None, self.grid) * whole.repeat_interleave(self.size, 0)
        if ranges.offsets is None or ranges.offset_codes is None or ranges.dmin is None:
            (go,) = self._solve(start, stop, [along])
            new = half(d + go)
            better = self._accept(start, stop, along * (new - d))
        else:
            lows, dmin = ranges.offset_codes[groups].float(), ranges.dmin[number]
            down = -lows.repeat_interleave(self.size, 0)
            go, shift = self._solve(start, stop, [along, down])
            new, new_min = half(d + go).clamp_(min=0), half(dmin + shift).clamp_(min=0)
            better = self._accept(start, stop, along * (new - d) + down * (new_min - dmin))
            ranges.dmin[number] = torch.where(better, new_min, dmin)
            ranges.offsets[groups] = -ranges.dmin[number] * lows
        ranges.d[number] = torch.where(better, new, d)
        ranges.scales[groups] = ranges.d[number] * whole
