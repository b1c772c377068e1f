"""The solver: asymmetric target, error feedback, coordinate descent, and plain rounding where that is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llmlite.quantize.descent import descend
from llmlite.quantize.feedback import feedback
from llmlite.quantize.grid import fit
from llmlite.quantize.rtn import choose_rows, nearest, relative_error, row_errors
from llmlite.quantize.target import corrected
from llmlite.quantize.types import Grid, Moments, Ranges, Rounded


@dataclass(frozen=True)
class SolverSettings:
    """How the solver goes about it.

    ``damping``: what is added to the moments' diagonal, as a share of its median. ``sweeps``: rounds of coordinate
    descent. ``drift``: how much is applied of the correction for what earlier layers lost (see `corrected`), 0 to 1.
    ``desc_act``: groups are made of channels by falling second moment, which needs a group index in the file.
    """

    damping: float = 0.02
    sweeps: int = 4
    drift: float = 1.0
    desc_act: bool = False


def solve(
    weight: torch.Tensor,
    moments: Moments,
    grid: Grid,
    settings: SolverSettings = SolverSettings(),
    snap: Callable[[torch.Tensor], Ranges] | None = None,
) -> Rounded:
    """The weight [out, in] on the grid, with the moments of the same [in] channels.

    Row by row the result is no worse on the held-out moments (the moments themselves where none were held out) than
    weighted rounding to nearest is. ``snap`` turns the scales [out, groups] that fit best into the ones that the file
    can hold, for a format that keeps those of a whole tensor together; they then stay. Raises ValueError if the moments
    are not finite, or not positive definite with the damping.
    """
    weight = weight.float()
    _check_finite(moments)
    if settings.desc_act:
        return _by_activation_order(weight, moments, grid, settings)
    matrix = damped(moments.xxt, settings.damping)
    target = weight
    if moments.cross is not None and settings.drift > 0:
        target = corrected(weight, moments, matrix, settings.drift)
    judge = moments.held or moments
    matrix /= matrix.diagonal().mean()  # its size matters to nothing but the range of the numbers to come
    solved = feedback(target, matrix, grid, snap)
    plain = nearest(target, fit(target, grid, matrix.diagonal()) if snap is None else solved.ranges, grid)
    solved = descend(target, solved, matrix, settings.sweeps, refit=snap is None)
    better = row_errors(target, solved.dequantize(), judge) <= row_errors(target, plain.dequantize(), judge)
    if not better.all():
        solved = choose_rows(better, solved, plain)
    return replace(solved, error=relative_error(target, solved.dequantize(), judge))


def _check_finite(moments: Moments) -> None:
    for part in (moments.xxt, moments.cross, moments.residual):
        if part is not None and not torch.isfinite(part).all():
            raise ValueError("the second moments of its inputs are not finite")
    if moments.held is not None:
        _check_finite(moments.held)


def damped(xxt: torch.Tensor, damping: float) -> torch.Tensor:
    """The second moments with ``damping`` times their median diagonal added to it; the identity where all are zero.

    (GPTQ takes the mean. One massive activation can raise that a hundredfold, and drown all other channels.)
    """
    diagonal = xxt.diagonal()
    usual = diagonal.median()
    if usual == 0:
        usual = diagonal.mean()
    if usual == 0:  # no input at all: nothing to go by
        return torch.eye(len(xxt), dtype=xxt.dtype, device=xxt.device)
    matrix = xxt.clone()
    matrix.diagonal().add_(damping * usual)
    return matrix


def _by_activation_order(weight: torch.Tensor, moments: Moments, grid: Grid, settings: SolverSettings) -> Rounded:
    """The channels by falling second moment, solved as if they lay so, and put back with an index of their groups."""
    order = torch.argsort(moments.xxt.diagonal(), descending=True, stable=True)
    solved = solve(weight[:, order], in_order(moments, order), grid, replace(settings, desc_act=False))
    width = weight.shape[1]
    codes = torch.empty_like(solved.codes)
    codes[:, order] = solved.codes
    index = torch.empty_like(order)
    index[order] = torch.arange(width, device=order.device) // (grid.group or width)
    return replace(solved, codes=codes, group_index=index)


def in_order(moments: Moments, order: torch.Tensor) -> Moments:
    """The moments of the channels in another order."""

    def turn(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[order[:, None], order]

    cross = None if moments.cross is None else turn(moments.cross)
    residual = None if moments.residual is None else moments.residual[:, order]
    held = None if moments.held is None else in_order(moments.held, order)
    return Moments(turn(moments.xxt), moments.count, cross, residual, held)
