"""Fit an integer grid to the groups of a weight, and put values on it."""

from __future__ import annotations

import torch

from llmlite.quantize.types import Grid, values_of

SHRINK = tuple(1 - 0.025 * step for step in range(21))  # 1.0 down to 0.5 of the full range


def fit(
    groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and offsets for weights [out, groups, group], float32.

    Without importance each group's extremes are its range. With importance (float32 [groups, group], one weight
    per channel, at least zero) the range is shrunk as far as that lowers the weighted squared rounding error:
    21 factors are tried and the best kept, group by group, so the result is never worse than the full range.
    Returns scales float32 [out, groups] and offsets alike (None on a symmetric grid), both already rounded to
    ``grid.scale_dtype``.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    scale, offset = _from_range(low, high, 1.0, grid)
    if importance is None:
        return scale, offset
    best = _weighted_error(groups, scale, offset, grid, importance)
    for shrink in SHRINK[1:]:
        scale_try, offset_try = _from_range(low, high, shrink, grid)
        error = _weighted_error(groups, scale_try, offset_try, grid, importance)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, scale_try, scale)
        if offset is not None and offset_try is not None:
            offset = torch.where(better, offset_try, offset)
    return scale, offset


def _from_range(
    low: torch.Tensor, high: torch.Tensor, shrink: float, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor | None]:
    steps = grid.levels - 1
    if grid.zero == "minimum":
        middle, half = (high + low) / 2, (high - low) / 2 * shrink
        return _stored(2 * half / steps, grid), _stored(middle - half, grid)
    if grid.zero == "integer":  # the range must hold zero, so that a zero weight stays zero
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = _stored((high - low) / steps, grid)
        return scale, torch.clamp(torch.round(-low * _inverse(scale)), 0, steps)
    if grid.scale_rule == "signed":
        extreme = torch.where(high.abs() > low.abs(), high, low)
        return _stored(extreme * shrink / -(grid.levels // 2), grid), None
    divisor = steps / 2 if grid.scale_rule == "half" else grid.levels // 2 - 1
    return _stored(torch.maximum(high.abs(), low.abs()) * shrink / divisor, grid), None


def _stored(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    return values.to(grid.scale_dtype).float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0: a group of zeros, or one too small for the scale's dtype."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _weighted_error(
    groups: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, grid: Grid, importance: torch.Tensor
) -> torch.Tensor:
    scale = scale[..., None]
    offset = None if offset is None else offset[..., None]
    rest = values_of(codes_of(groups, scale, offset, grid), scale, offset, grid).sub_(groups)
    return rest.square_().mul_(importance).sum(-1)


def codes_of(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """The nearest code of each weight, as whole numbers in float32; scale and offset broadcast against it."""
    if grid.zero == "minimum":
        assert offset is not None
        codes = (weight - offset) * _inverse(scale)
    else:
        codes = weight * _inverse(scale) + (grid.levels // 2 if offset is None else offset)
    low = 1 if grid.scale_rule == "narrow" else 0
    return codes.round_().clamp_(low, grid.levels - 1)
