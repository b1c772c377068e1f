from typing import Any

import pytest
import torch

from llmlite.calibrate.moments import HELD_EVERY, TILE, MomentSums

LENGTH = 3


def rows_of(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, LENGTH, width, generator=torch.Generator().manual_seed(seed)) + 0.2


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 5, 20])
@pytest.mark.parametrize("width", [5, TILE - 1, TILE, 700, 1100])
def test_sums_over_batches_are_the_dense_products(width: int, batch: int, given: bool):
    rows = 20
    x, y, r = rows_of(rows, width, 0), rows_of(rows, width, 1), rows_of(rows, 24, 2)
    sums = MomentSums(width, rows)
    for start in range(0, rows, batch):
        here = slice(start, start + batch)
        sums.add(start, x[here], *((y[here], r[here]) if given else ()))
    got: Any = sums.moments()
    held = torch.tensor([row in (7, 15) for row in range(rows)])
    kept = x[~held].reshape(-1, width).double()
    close(got.xxt, kept.T @ kept)
    assert got.count == 18 * LENGTH
    judge = x[held].reshape(-1, width).double()
    close(got.held.xxt, judge.T @ judge)
    assert got.held.count == 2 * LENGTH
    assert got.held.held is None
    for part, mine, base in ((got, ~held, kept), (got.held, held, judge)):
        if given:
            close(part.cross, y[mine].reshape(-1, width).double().T @ base)
            close(part.residual, r[mine].reshape(-1, 24).double().T @ base)
        else:
            assert part.cross is part.residual is None


def test_few_rows_are_all_summed_and_none_is_held_out():
    rows = HELD_EVERY - 1
    x = rows_of(rows, 700, 0)
    sums = MomentSums(700, rows)
    sums.add(0, x[:4])
    sums.add(4, x[4:])
    got, flat = sums.moments(), x.reshape(-1, 700).double()
    assert got.held is None
    assert got.count == rows * LENGTH
    close(got.xxt, flat.T @ flat)


def test_from_eight_rows_on_the_eighth_is_held_out():
    x = rows_of(HELD_EVERY, 10, 0)
    sums = MomentSums(10, HELD_EVERY)
    sums.add(0, x)
    got: Any = sums.moments()
    assert (got.count, got.held.count) == (7 * LENGTH, LENGTH)
    torch.testing.assert_close(got.held.xxt, x[7].T @ x[7])


def test_half_precision_inputs_are_summed_in_float32():
    x = torch.full((4, 50, 8), 300.0, dtype=torch.float16)  # 300 squared is above the largest float16
    sums = MomentSums(8, 4)
    sums.add(0, x)
    got = sums.moments()
    assert got.xxt.dtype == torch.float32
    assert torch.equal(got.xxt, torch.full((8, 8), 4 * 50 * 300.0**2))
