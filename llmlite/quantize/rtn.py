"""Round to nearest: every weight on its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmlite.quantize.grid import codes_of, fit
from llmlite.quantize.types import Grid, Moments, Ranges, Rounded

PIECE = 2**22  # weights rounded at a time: a large head needs no more than its codes


def round_to_nearest(
    weight: torch.Tensor, moments: Moments | None, grid: Grid, importance: torch.Tensor | None = None
) -> Rounded:
    """Each weight on the nearest value of its group's grid.

    ``weight`` float [out, in]; ``importance`` float32 [in] weighs the channels in the choice of the scales, without it
    the range is each group's extremes; ``moments`` are used for the reported error only.
    """
    rows, width = weight.shape
    step = max(PIECE // width, 1)
    pieces, lost, whole = [], 0.0, 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        piece = nearest(part, fit(part, grid, importance), grid)
        lost += row_errors(part, piece.dequantize(), moments).sum().item()
        whole += row_errors(part, torch.zeros_like(part), moments).sum().item()
        pieces.append(piece)
    rounded = stack(pieces)
    return replace(rounded, error=lost / whole if whole > 0 else 0.0)


def nearest(weight: torch.Tensor, ranges: Ranges, grid: Grid) -> Rounded:
    """Round a weight float32 [out, in] onto ranges that are already chosen; the error is left at 0."""
    groups = weight.reshape(len(weight), ranges.scales.shape[1], -1)
    offsets = None if ranges.offsets is None else ranges.offsets[..., None]
    codes = codes_of(groups, ranges.scales[..., None], offsets, grid)
    return Rounded(grid, codes.to(torch.uint8).reshape(weight.shape), ranges)


def stack(pieces: list[Rounded]) -> Rounded:
    """One weight from its pieces of rows; the error is left at 0."""
    columns = zip(*(piece.ranges.tensors() for piece in pieces), strict=True)
    ranges = Ranges(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
    return Rounded(pieces[0].grid, torch.cat([piece.codes for piece in pieces]), ranges, pieces[0].group_index)


def choose_rows(first: torch.Tensor, one: Rounded, other: Rounded) -> Rounded:
    """``one`` in the rows where ``first`` bool [out] is true, else ``other``; the error is left at 0."""
    pick = first[:, None]
    pairs = zip(one.ranges.tensors(), other.ranges.tensors(), strict=True)
    ranges = Ranges(*(None if a is None or b is None else torch.where(pick, a, b) for a, b in pairs))  # type: ignore[arg-type]
    return Rounded(one.grid, torch.where(pick, one.codes, other.codes), ranges, one.group_index)


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
