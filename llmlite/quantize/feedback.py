"""Rounding with error feedback: GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

Channels are rounded one after the other, and the error of each is made good by the channels still to come, in
the measure that the inputs' second moments allow. The grid's ranges are fitted with the moments' diagonal as
importance. A row of the result that is worse than plain rounding, on this objective, is replaced by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from llmlite.quantize.grid import codes_of, fit
from llmlite.quantize.rtn import nearest, relative_error, row_errors, split_groups
from llmlite.quantize.types import Grid, Moments, Ranges, Rounded, values_of

ActOrder = Literal["none", "static", "group"]


@dataclass(frozen=True)
class FeedbackSettings:
    """How error feedback goes about it.

    ``act_order``: ``none`` rounds channels as they lie; ``static`` by falling second moment, with each group's
    grid fitted beforehand and the groups where they lie (no file needs an index for it); ``group`` by falling
    second moment with the groups made of channels in that order, which needs a group index in the file.
    ``damping``: what is added to the moments' diagonal, as a share of its mean.
    ``block``: channels between two updates of everything to the right.
    """

    act_order: ActOrder = "static"
    damping: float = 0.01
    block: int = 32


def error_feedback(
    weight: torch.Tensor, moments: Moments, grid: Grid, settings: FeedbackSettings = FeedbackSettings()
) -> Rounded:
    """The weight [out, in] on the grid, rounded with feedback; moments over the same [in] channels.

    Raises ValueError if the moments are not positive definite even with the damping, which finite ones are.
    """
    weight = weight.float()
    width = weight.shape[1]
    diagonal = moments.xxt.diagonal()
    # Equal second moments keep their order, so that the result is the same on every machine.
    order = torch.arange(width, device=weight.device)
    if settings.act_order != "none":
        order = torch.argsort(diagonal, descending=True, stable=True)
    home = torch.arange(width, device=weight.device) // (grid.group or width)
    if settings.act_order == "group":
        home = torch.empty_like(home).index_copy_(0, order, home)
    upper = _feedback_factor(moments, order, settings.damping)

    importance = diagonal.clamp(min=0) + settings.damping * diagonal.mean()
    if settings.act_order == "static" or grid.group is None:
        plain = _fitted(weight, importance, grid)
        scales, offsets, codes = _sweep(weight[:, order], upper, home[order], grid, settings.block, static=plain)
    else:
        scales, offsets, codes = _sweep(
            weight[:, order], upper, home[order], grid, settings.block, importance=importance[order]
        )
        plain = _fitted(weight[:, order], importance[order], grid)
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    index = home if settings.act_order == "group" else None
    return _keep_better(weight, Rounded(grid, codes, Ranges(scales, offsets), index), plain, moments)


def _feedback_factor(moments: Moments, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U.T @ U = inv(M), M the damped moments in the given order.

    With the order of rows and columns reversed, chol(M) is lower; reversed back it is an upper R with R @ R.T = M,
    so U = inv(R): one factorization and one triangular inverse, and M is never inverted. Holds at most three
    matrices of the moments' size besides them.
    """
    backward = order.flip(0)
    matrix = moments.xxt[backward[:, None], backward]
    mean = matrix.diagonal().mean()
    eye = torch.eye(len(order), dtype=matrix.dtype, device=matrix.device)
    if mean == 0:  # no input at all: feedback has nothing to go by
        return eye
    matrix.diagonal().add_(damping * mean)
    try:
        torch.linalg.cholesky(matrix, out=matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the second moments are not positive definite: {error}") from None
    root = matrix.flip(0, 1)
    del matrix
    return torch.linalg.solve_triangular(root, eye, upper=True)


def _fitted(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    groups = grid.groups(weight.shape[1])
    return fit(split_groups(weight, grid), grid, importance.reshape(groups, -1))


def _sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    home: torch.Tensor,
    grid: Grid,
    block: int,
    *,
    static: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Round the columns of an already ordered weight from left to right.

    ``home`` is each column's group. With ``static`` the groups' grids are given; without it a group lies in one
    piece and is fitted when its first column is reached, on the weights as compensated so far. The block is then
    a whole number of groups or the reverse, so that such a fit never sees a half-updated group.
    Works on the transpose: a channel is then contiguous, which is four times as fast.
    """
    width, rows = weight.shape[1], weight.shape[0]
    rest = weight.T.contiguous()
    codes = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)
    size = grid.group or width
    if static is None:
        scales = weight.new_zeros(width // size, rows)
        offsets = None if grid.zero == "symmetric" else torch.zeros_like(scales)
        block = max(block // size, 1) * size
    else:
        scales = static[0].T.contiguous()
        offsets = None if static[1] is None else static[1].T.contiguous()
    homes, pivots = home.tolist(), upper.diagonal().tolist()
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for j in range(start, stop):
            group = homes[j]
            if static is None and j % size == 0:
                assert importance is not None
                fitted = fit(rest[j : j + size].T[:, None], grid, importance[None, j : j + size])
                scales[group] = fitted[0][:, 0]
                if offsets is not None and fitted[1] is not None:
                    offsets[group] = fitted[1][:, 0]
            scale, offset = scales[group], None if offsets is None else offsets[group]
            code = codes_of(rest[j], scale, offset, grid)
            codes[j] = code
            error = errors[j - start]
            torch.sub(rest[j], values_of(code, scale, offset, grid), out=error).div_(pivots[j])
            rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return scales.T.contiguous(), None if offsets is None else offsets.T.contiguous(), codes.T.contiguous()


def _keep_better(
    weight: torch.Tensor, solved: Rounded, plain: tuple[torch.Tensor, torch.Tensor | None], moments: Moments
) -> Rounded:
    """Row by row the solved codes, or plain rounding where that has the smaller error."""
    grid = solved.grid
    order = slice(None) if solved.group_index is None else torch.argsort(solved.group_index, stable=True)
    rounded = nearest(weight[:, order], plain[0], plain[1], grid)
    plain_codes = torch.empty_like(solved.codes)
    plain_codes[:, order] = rounded.codes
    other = Rounded(grid, plain_codes, Ranges(*plain), solved.group_index)
    keep = row_errors(weight, solved.dequantize(), moments) <= row_errors(weight, other.dequantize(), moments)
    pick = keep[:, None]
    offsets = None
    if solved.offsets is not None and other.offsets is not None:
        offsets = torch.where(pick, solved.offsets, other.offsets)
    codes = torch.where(pick, solved.codes, other.codes)
    scales = torch.where(pick, solved.scales, other.scales)
    merged = Rounded(grid, codes, Ranges(scales, offsets), solved.group_index)
    error = relative_error(weight, merged.dequantize(), moments)
    return Rounded(grid, codes, Ranges(scales, offsets), solved.group_index, error)
