"""Round to nearest: every weight on its own."""

from __future__ import annotations

import torch

from llmlite.quantize.grid import codes_of, fit
from llmlite.quantize.types import Grid, Moments, Ranges, Rounded

PIECE = 2**24  # weights rounded at a time: a large head needs no more than its codes


def round_to_nearest(weight: torch.Tensor, moments: Moments | None, grid: Grid) -> Rounded:
    """Each weight on the nearest value of its group's grid; the range is each group's extremes.

    ``weight`` float [out, in]; ``moments`` are used for the reported error only.
    """
    rows, width = weight.shape
    step = max(PIECE // width, 1)
    pieces, lost, whole = [], 0.0, 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        scales, offsets = fit(split_groups(part, grid), grid)
        piece = nearest(part, scales, offsets, grid)
        lost += row_errors(part, piece.dequantize(), moments).sum().item()
        whole += row_errors(part, torch.zeros_like(part), moments).sum().item()
        pieces.append(piece)
    ranges = stack_ranges([piece.ranges for piece in pieces])
    return Rounded(grid, torch.cat([p.codes for p in pieces]), ranges, None, lost / whole if whole > 0 else 0.0)


def stack_ranges(parts: list[Ranges]) -> Ranges:
    """The ranges of a weight from those of its pieces, one below the other."""
    columns = zip(*(part.tensors() for part in parts), strict=True)
    return Ranges(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def split_groups(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[out, in] -> [out, groups, group]."""
    rows, width = weight.shape
    return weight.reshape(rows, grid.groups(width), -1)


def nearest(weight: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, grid: Grid) -> Rounded:
    """Round onto scales and offsets [out, groups] that are already chosen; the error is left at 0."""
    groups = split_groups(weight, grid)
    codes = codes_of(groups, scales[..., None], None if offsets is None else offsets[..., None], grid)
    return Rounded(grid, codes.to(torch.uint8).reshape(weight.shape), Ranges(scales, offsets))


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
