from typing import Any

import pytest
import torch

from llmlite.quantize.feedback import feedback
from llmlite.quantize.grid import fit
from llmlite.quantize.rtn import nearest
from llmlite.quantize.types import Grid
from tests.quantize.dense import Dense, loss, optimal_brain
from tests.quantize.synthetic import GGUF, GRIDS, OTHER, SMALL, matrix_of, row_losses, weights

CASES: dict[str, tuple[Grid, int]] = {
    "q4_0": (GGUF["q4_0"], 96),
    "q4_1": (GGUF["q4_1"], 96),
    "iq4_nl": (GGUF["iq4_nl"], 96),
    "integer": (OTHER["gptq-3-asymmetric"], 96),
    "row": (Grid(4, None), 100),
    "super-minimum": (SMALL["super-minimum"], 192),
    "q4_k": (GGUF["q4_k"], 512),
}


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fixed", [False, True], ids=["fitted", "fixed"])
@pytest.mark.parametrize("name", CASES)
def test_feedback_is_optimal_brain_quantization_in_a_fixed_order(name: str, fixed: bool, in_float64):
    """In float64, where no tie can fall the other way: the same codes and ranges, all of them."""
    grid, width = CASES[name]
    target, matrix = weights("normal", 6, width).double(), matrix_of(width, 3 * width).double()
    ranges = fit(target, grid, matrix.diagonal()) if fixed else None
    want = optimal_brain(target, matrix, grid, ranges)
    got = feedback(target, matrix, grid, None if ranges is None else lambda _: ranges)
    mine: Any
    theirs: Any
    for mine, theirs in zip(got.ranges.tensors(), want.ranges.tensors(), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    low = 1 if grid.scale_rule == "narrow" else 0
    assert torch.equal(got.codes.long(), want.index + low)
    torch.testing.assert_close(got.dequantize().double(), want.values(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, (_, width) in CASES.items() if width < 200])
def test_in_float32_it_loses_as_much(name: str):
    """A tie that falls the other way changes what comes after it in its row, and nothing in another row."""
    grid, width = CASES[name]
    target, matrix = weights("student", 16, width), matrix_of(width, 3 * width)
    want: Dense = optimal_brain(target, matrix, grid)
    got = feedback(target, matrix, grid)
    assert got.codes.dtype == torch.uint8
    total = loss(target, want.values(), matrix).sum().item()
    assert row_losses(target, got.dequantize(), matrix).sum().item() == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_correlated_inputs_make_it_better_than_rounding_to_nearest(name: str):
    grid, width = GRIDS[name], 256
    target, matrix = weights("normal", 8, width), matrix_of(width, 800)
    plain = nearest(target, fit(target, grid, matrix.diagonal()), grid).dequantize()
    solved = feedback(target, matrix, grid).dequantize()
    assert row_losses(target, solved, matrix).sum() < 0.9 * row_losses(target, plain, matrix).sum()


@pytest.mark.parametrize("width", [96, 7, 97, 33])
def test_uncorrelated_inputs_leave_every_weight_on_its_nearest_value(width: int):
    grid = Grid(4, None)
    target, matrix = weights("normal", 5, width), torch.diag(torch.rand(width) + 0.5)
    solved = feedback(target, matrix, grid)
    assert torch.equal(solved.codes, nearest(target, fit(target, grid, matrix.diagonal()), grid).codes)


def test_ranges_from_snap_are_kept():
    grid, matrix = GGUF["q4_k"], matrix_of(512, 600)
    target = weights("normal", 4, 512)
    ranges = fit(2 * target, grid)
    solved = feedback(target, matrix, grid, lambda _: ranges)
    mine: Any
    given: Any
    for mine, given in zip(solved.ranges.tensors(), ranges.tensors(), strict=True):
        assert torch.equal(mine, given)


def test_moments_that_are_not_positive_definite_are_refused():
    matrix = matrix_of(64, 200)
    values, vectors = torch.linalg.eigh(matrix)
    values[0] = -values[-1] / 10
    with pytest.raises(ValueError, match="not positive definite"):
        feedback(weights("normal", 2, 64), vectors @ values.diag() @ vectors.T, Grid(4, 32))
