"""Slow oracles of the solver in float64: no factorization, no chunks, no sums carried along, no transposed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmlite.quantize.grid import fit
from llmlite.quantize.types import Grid, Ranges


def code_values(grid: Grid, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """What each code stands for: float64 [..., codes that may be used]."""
    steps = torch.arange(1 if grid.scale_rule == "narrow" else 0, grid.levels, dtype=torch.float64)
    scale = scale.double()[..., None]
    if grid.codebook is not None:
        return torch.tensor(grid.codebook, dtype=torch.float64) * scale
    if offset is None:
        return (steps - grid.levels // 2) * scale
    offset = offset.double()[..., None]
    return steps * scale + offset if grid.zero == "minimum" else (steps - offset) * scale


def nearest_value(wanted: torch.Tensor, grid: Grid, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The index of the value of its grid that lies nearest, int64, for each of wanted."""
    return (code_values(grid, scale, offset) - wanted.double()[..., None]).abs().argmin(-1)


@dataclass
class Dense:
    """A weight on its grid: what a reader sees, float64 [out, in], from indices into `code_values` [out, in]."""

    grid: Grid
    index: torch.Tensor
    ranges: Ranges

    def channel(self, c: int) -> torch.Tensor:
        """The values that channel c may take in each row, float64 [out, codes]."""
        group = c // (self.grid.group or self.index.shape[1])
        offset = None if self.ranges.offsets is None else self.ranges.offsets[:, group]
        return code_values(self.grid, self.ranges.scales[:, group], offset)

    def values(self) -> torch.Tensor:
        columns = [self.channel(c).gather(1, self.index[:, c : c + 1]) for c in range(self.index.shape[1])]
        return torch.cat(columns, 1)


def loss(target: torch.Tensor, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    rest = values - target.double()
    return ((rest @ matrix.double()) * rest).sum(-1)


def optimal_brain(target: torch.Tensor, matrix: torch.Tensor, grid: Grid, fixed: Ranges | None = None) -> Dense:
    """Optimal brain quantization in a fixed order (arXiv:2208.11580, and what 2210.17323 derives its algorithm from).

    After each channel the inverse of the moments of the channels still to come is updated by eliminating that one.
    """
    rows, width = target.shape
    diagonal = matrix.diagonal()
    block = width if fixed is not None else grid.block(width)
    order = [start + int(c) for start in range(0, width, block)
             for c in torch.argsort(diagonal[start : start + block], descending=True, stable=True)]  # fmt: skip
    costs = _costs(matrix, order)
    rest, inverse = target.double().clone(), torch.linalg.inv(matrix.double())
    index = torch.zeros(rows, width, dtype=torch.long)
    parts: list[Ranges] = []
    size, base = grid.group or width, 0
    for place, c in enumerate(order):
        if fixed is None and place % block == 0:
            here = slice(place, place + block)
            parts.append(fit(rest[:, here].to(target.dtype), grid, costs[here].to(target.dtype)))
            base = place // size
        ranges = fixed if fixed is not None else parts[-1]
        group = c // size - base
        offset = None if ranges.offsets is None else ranges.offsets[:, group]
        index[:, c] = nearest_value(rest[:, c], grid, ranges.scales[:, group], offset)
        value = code_values(grid, ranges.scales[:, group], offset).gather(1, index[:, c : c + 1])[:, 0]
        error = (rest[:, c] - value) / inverse[c, c]
        rest = rest - error[:, None] * inverse[c]
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, c] = 1.0  # eliminated: never used again
    if fixed is not None:
        return Dense(grid, index, fixed)
    columns = zip(*(part.tensors() for part in parts), strict=True)
    return Dense(grid, index, Ranges(*(None if c[0] is None else torch.cat(c, 1) for c in columns)))  # type: ignore[arg-type]


def _costs(matrix: torch.Tensor, order: list[int]) -> torch.Tensor:
    """What is left of each channel's second moment once those after it in the order explain it: float64 [in]."""
    m, out = matrix.double(), torch.zeros(len(matrix), dtype=torch.float64)
    for place, c in enumerate(order):
        later = order[place + 1 :]
        out[c] = m[c, c] - (m[c, later] @ torch.linalg.solve(m[later][:, later], m[later, c]) if later else 0)
    return out


def sweep(weight: Dense, target: torch.Tensor, matrix: torch.Tensor) -> None:
    """Every code in turn becomes the one with the least loss, found by trying them all."""
    m, values = matrix.double(), weight.values()
    for c in range(weight.index.shape[1]):
        slope = (values - target.double()) @ m[:, c]
        options = weight.channel(c)
        step = options - values[:, c : c + 1]
        best = (step * step * m[c, c] + 2 * step * slope[:, None]).argmin(1, keepdim=True)
        weight.index[:, c : c + 1] = best
        values[:, c : c + 1] = options.gather(1, best)


def _keep_better(weight: Dense, tried: list[torch.Tensor | None], target: torch.Tensor, matrix: torch.Tensor) -> None:
    """Take the tried ranges in the rows where they lower the loss."""
    other = Dense(weight.grid, weight.index, Ranges(*tried))  # type: ignore[arg-type]
    better = loss(target, other.values(), matrix) < loss(target, weight.values(), matrix)
    pairs = zip(tried, weight.ranges.tensors(), strict=True)
    kept = [None if a is None or b is None else torch.where(better[:, None], a.to(b.dtype), b) for a, b in pairs]
    weight.ranges = Ranges(*kept)  # type: ignore[arg-type]


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().double()


def refit(weight: Dense, target: torch.Tensor, matrix: torch.Tensor) -> None:
    """Each group's scale (and minimum) by least squares on the whole loss; then the super-blocks' own."""
    grid, block = weight.grid, weight.grid.super_block
    size = grid.group or target.shape[1]
    for group in range(weight.ranges.scales.shape[1]):
        scales, offsets, d, dmin, whole, low = (None if t is None else t.clone() for t in weight.ranges.tensors())
        channels = torch.arange(group * size, (group + 1) * size)
        unit = _units(weight, channels, 0 if block else group)
        directions = [unit] + ([torch.ones_like(unit)] if grid.zero == "minimum" else [])
        go = _best(weight, target, matrix, channels, directions)
        assert scales is not None
        wanted = scales[:, group].double() + go[0]
        if block is None:
            scales[:, group] = wanted.to(grid.scale_dtype)
            if grid.zero == "minimum":
                assert offsets is not None
                offsets[:, group] = (offsets[:, group].double() + go[1]).to(grid.scale_dtype)
        else:
            assert d is not None
            assert whole is not None
            mine = d[:, group // block.groups].double()
            code = torch.where(mine == 0, mine, wanted / mine).round().clamp(*block.scale_range)
            whole[:, group], scales[:, group] = code, mine * code
            if offsets is not None:
                assert dmin is not None
                assert low is not None
                assert block.offset_bits is not None
                mine = dmin[:, group // block.groups].double()
                lowest = -(offsets[:, group].double() + go[1])
                code = torch.where(mine == 0, mine, lowest / mine).round().clamp(0, 2**block.offset_bits - 1)
                low[:, group], offsets[:, group] = code, -mine * code
        _keep_better(weight, [scales, offsets, d, dmin, whole, low], target, matrix)
    if block is not None:
        assert weight.ranges.d is not None
        for number in range(weight.ranges.d.shape[1]):
            _refit_super(weight, target, matrix, number)


def _units(weight: Dense, channels: torch.Tensor, group: int) -> torch.Tensor:
    """What a scale of 1 and a minimum of 0 would make of the codes."""
    offset = None
    if weight.ranges.offsets is not None:
        offset = weight.ranges.offsets[:, group]
        offset = torch.zeros_like(offset) if weight.grid.zero == "minimum" else offset
    steps = code_values(weight.grid, torch.ones(len(weight.index)), offset)
    return steps.gather(1, weight.index[:, channels])


def _best(
    weight: Dense, target: torch.Tensor, matrix: torch.Tensor, channels: torch.Tensor, directions: list[torch.Tensor]
) -> list[torch.Tensor]:
    """How far to go along each direction [out, channels], row by row, for the least loss."""
    m = matrix.double()
    slope = ((weight.values() - target.double()) @ m)[:, channels]
    along = torch.stack(directions, 1)
    bent = along @ m[channels[:, None], channels] @ along.mT
    pull = (along * slope[:, None]).sum(-1)
    return list(torch.linalg.lstsq(bent, -pull[..., None], driver="gelsd").solution[..., 0].T)


def _refit_super(weight: Dense, target: torch.Tensor, matrix: torch.Tensor, number: int) -> None:
    block, size = weight.grid.super_block, weight.grid.group
    assert block is not None
    assert size is not None
    scales, offsets, d, dmin, whole, low = (None if t is None else t.clone() for t in weight.ranges.tensors())
    groups = slice(number * block.groups, (number + 1) * block.groups)
    channels = torch.arange(groups.start * size, groups.stop * size)
    assert scales is not None
    assert d is not None
    assert whole is not None
    units = _units(weight, channels, 0)
    directions = [units * whole[:, groups].double().repeat_interleave(size, 1)]
    if low is not None:
        directions.append(-low[:, groups].double().repeat_interleave(size, 1))
    go = _best(weight, target, matrix, channels, directions)
    new = _half(d[:, number].double() + go[0])
    if low is not None:
        assert dmin is not None
        assert offsets is not None
        new = new.clamp(min=0)
        dmin[:, number] = _half(dmin[:, number].double() + go[1]).clamp(min=0)
        offsets[:, groups] = -dmin[:, number : number + 1] * low[:, groups]
    d[:, number] = new
    scales[:, groups] = d[:, number : number + 1] * whole[:, groups]
    _keep_better(weight, [scales, offsets, d, dmin, whole, low], target, matrix)
