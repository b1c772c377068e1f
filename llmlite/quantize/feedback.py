"""Rounding with error feedback: GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), on any grid.

Channels are rounded one after the other, and the error of each is made good by the channels still to come, in the
measure that the inputs' second moments allow. A block's ranges (a group's, or a super-block's) are fitted when it is
reached, on the weights as compensated so far, each channel weighed by what an error of it costs once the channels to
come have made good what they can; inside a block the channels go by falling second moment, since the first ones err the
least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmlite.quantize.columns import ColumnGrid, chunk_of
from llmlite.quantize.grid import fit
from llmlite.quantize.types import Grid, Ranges, Rounded


def feedback(
    target: torch.Tensor, matrix: torch.Tensor, grid: Grid, snap: Callable[[torch.Tensor], Ranges] | None = None
) -> Rounded:
    """The weight ``target`` float32 [out, in] on the grid; ``matrix`` float32 [in, in] is the damped second moments.

    With ``snap`` all ranges are what it makes of the scales [out, groups] that fit the weight as it is, and the
    channels go by falling second moment across all blocks. Raises ValueError if the matrix is not positive definite.
    """
    width, rows = target.shape[1], target.shape[0]
    block = grid.block(width)
    order = _order(matrix.diagonal(), block if snap is None else width)
    upper = feedback_factor(matrix, order)
    costs = _in_place(upper.diagonal() ** -2, order)
    fixed = None
    if snap is not None:
        fixed = snap(fit(target, grid, costs).scales)
    elif block == width:
        fixed = fit(target, grid, costs)
    pivots, size = upper.diagonal().tolist(), grid.group or width
    homes = (order // size).tolist()
    rest = target.T[order]
    codes = torch.empty(width, rows, dtype=torch.uint8, device=target.device)
    chunk = chunk_of(width if fixed is not None else block)
    found: list[Ranges] = []
    base, columns = 0, None
    if fixed is not None:
        columns = ColumnGrid(grid, *_transposed(fixed))
    for start in range(0, width, chunk):
        stop = start + chunk
        if fixed is None and start % block == 0:
            inside = torch.argsort(order[start : start + block])  # back to the channels' own order
            found.append(fit(rest[start : start + block][inside].T, grid, costs[start : start + block]))
            columns, base = ColumnGrid(grid, *_transposed(found[-1])), start // size
        assert columns is not None
        errors = torch.empty(stop - start, rows, device=target.device)
        for j in range(start, stop):
            code, value = columns.round(rest[j], homes[j] - base)
            codes[j] = code
            error = torch.sub(rest[j], value, out=errors[j - start]).div_(pivots[j])
            rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    kept = fixed if fixed is not None else _side_by_side(found)
    return Rounded(grid, _in_place(codes, order).T.contiguous(), kept)


def _in_place(ordered: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What was in ``order`` [in, ...] in the channels' own order."""
    out = torch.empty_like(ordered)
    out[order] = ordered
    return out


def _order(diagonal: torch.Tensor, block: int) -> torch.Tensor:
    """Channels by falling second moment inside each block, int64 [in]; equal ones keep their order everywhere."""
    inside = torch.argsort(diagonal.reshape(-1, block), descending=True, stable=True)
    return (inside + torch.arange(0, len(diagonal), block, device=diagonal.device)[:, None]).reshape(-1)


def feedback_factor(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U.T @ U = inv(M), M the matrix in the given order; ValueError if it has none.

    With the order of rows and columns reversed, chol(M) is lower; reversed back it is an upper R with R @ R.T = M,
    so U = inv(R): one factorization and one triangular inverse, and M is never inverted.
    """
    backward = order.flip(0)
    turned = matrix[backward[:, None], backward]
    try:
        torch.linalg.cholesky(turned, out=turned)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the second moments are not positive definite: {error}") from None
    root = turned.flip(0, 1)
    del turned
    eye = torch.eye(len(order), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, eye, upper=True)


def _transposed(ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor | None]:
    offsets = None if ranges.offsets is None else ranges.offsets.T.contiguous()
    return ranges.scales.T.contiguous(), offsets


def _side_by_side(parts: list[Ranges]) -> Ranges:
    columns = zip(*(part.tensors() for part in parts), strict=True)
    return Ranges(*(None if column[0] is None else torch.cat(column, 1) for column in columns))  # type: ignore[arg-type]
