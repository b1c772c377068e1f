"""Round to nearest: every weight on its own."""

from __future__ import annotations

import torch

from llmlite.quantize.grid import codes_of, fit, values_of
from llmlite.quantize.types import IntegerGrid, Moments, Rounded


def round_to_nearest(weight: torch.Tensor, moments: Moments | None, grid: IntegerGrid) -> Rounded:
    """Each weight on the nearest value of its group's grid; the range is each group's extremes.

    ``weight`` float [out, in]; ``moments`` are used for the reported error only.
    """
    weight = weight.float()
    groups = split_groups(weight, grid)
    scales, offsets = fit(groups, grid)
    return nearest(weight, scales, offsets, grid, moments)


def split_groups(weight: torch.Tensor, grid: IntegerGrid) -> torch.Tensor:
    """[out, in] -> [out, groups, group]."""
    rows, width = weight.shape
    return weight.reshape(rows, grid.groups(width), -1)


def nearest(
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    grid: IntegerGrid,
    moments: Moments | None,
) -> Rounded:
    """Round onto scales and offsets [out, groups] that are already chosen."""
    groups = split_groups(weight, grid)
    wide_offsets = None if offsets is None else offsets[..., None]
    codes = codes_of(groups, scales[..., None], wide_offsets, grid)
    values = values_of(codes, scales[..., None], wide_offsets, grid).reshape(weight.shape)
    error = relative_error(weight, values, moments)
    return Rounded(grid, codes.to(torch.uint8).reshape(weight.shape), scales, offsets, None, error)


def row_errors(weight: torch.Tensor, values: torch.Tensor, moments: Moments | None) -> torch.Tensor:
    """e M eT for each row e of weight - values, float32 [out]; M is the identity without moments."""
    rest = weight - values
    weighted = rest if moments is None else rest @ moments.xxt
    return (weighted * rest).sum(-1)


def relative_error(weight: torch.Tensor, values: torch.Tensor, moments: Moments | None) -> float:
    """The summed row errors as a share of the weight's own weighted size."""
    whole = row_errors(weight, torch.zeros_like(weight), moments).sum().item()
    lost = row_errors(weight, values, moments).sum().item()
    return lost / whole if whole > 0 else 0.0
