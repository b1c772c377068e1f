import pytest
import torch

from llmlite.quantize.grid import codes_of, fit, values_of
from llmlite.quantize.rtn import round_to_nearest, split_groups
from llmlite.quantize.types import Grid

GRIDS = [
    Grid(bits, group, zero, torch.float16)
    for bits in (2, 3, 4, 8)
    for group in (32, None)
    for zero in ("symmetric", "integer", "minimum")
]
GRIDS += [Grid(4, 32, scale_rule="signed"), Grid(8, 32, scale_rule="narrow")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_lies_on_the_nearest_value_of_its_group(grid: Grid):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 6)[:, None]
    rounded = round_to_nearest(weight, None, grid)
    seen = rounded.dequantize()
    size = grid.group or 96
    low = 1 if grid.scale_rule == "narrow" else 0
    for row in range(6):
        for column in range(96):
            scale = rounded.scales[row, column // size]
            if grid.zero == "minimum":
                values = torch.arange(low, grid.levels) * scale + rounded.offsets[row, column // size]
            else:
                zero = grid.levels // 2 if rounded.offsets is None else rounded.offsets[row, column // size]
                values = (torch.arange(low, grid.levels) - zero) * scale
            best = (values - weight[row, column]).abs().min()
            assert (seen[row, column] - weight[row, column]).abs() <= best + 1e-6 * scale.abs()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_and_minimums_fit_their_stored_dtype(grid: Grid):
    rounded = round_to_nearest(torch.randn(4, 64), None, grid)
    assert torch.equal(rounded.scales.half().float(), rounded.scales)
    if grid.zero == "minimum":
        assert torch.equal(rounded.offsets.half().float(), rounded.offsets)
    if grid.zero == "integer":
        assert torch.equal(rounded.offsets, rounded.offsets.round().clamp(0, grid.levels - 1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_and_vanishing_weights_stay_finite(grid: Grid):
    weight = torch.zeros(2, 64)
    weight[1] = 1e-9  # below the smallest float16
    seen = round_to_nearest(weight, None, grid).dequantize()
    assert torch.equal(seen[0], weight[0])
    assert seen.abs().max() <= 1e-6


def test_importance_is_never_worse_than_the_full_range_and_helps_with_an_outlier():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    weight[:, 5] *= 8
    importance = torch.ones(4, 32)
    importance[0, 5] = 1e-3
    grid = Grid(4, 32)
    groups = split_groups(weight, grid)

    def error(scale: torch.Tensor) -> torch.Tensor:
        values = values_of(codes_of(groups, scale[..., None], None, grid), scale[..., None], None, grid)
        return ((values - groups).square() * importance).sum(-1)

    plain, weighted = error(fit(groups, grid)[0]), error(fit(groups, grid, importance)[0])
    assert (weighted <= plain).all()
    assert weighted[:, 0].sum() < 0.5 * plain[:, 0].sum()


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="width of 100"):
        round_to_nearest(torch.randn(2, 100), None, Grid(4, 32))
