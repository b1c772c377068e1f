from typing import Any

import pytest
import torch

from llmlite.formats.gguf.types import pack
from llmlite.quantize.grid import fit
from llmlite.quantize.rtn import nearest, round_to_nearest
from llmlite.quantize.types import Grid, Ranges
from tests.quantize.dense import code_values
from tests.quantize.synthetic import GGUF, GRIDS, SUPERS, weights

PLAIN = [name for name in GRIDS if name not in SUPERS]
ROWS, WIDTH = 8, 512


def importances() -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).mul(1.5).exp()


def assert_stored(ranges: Any, grid: Grid) -> None:
    """What the file keeps is exact: float16 (or the format's dtype), whole codes in range, and their products."""

    def kept(values: torch.Tensor | None, dtype: torch.dtype) -> None:
        assert values is not None
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
        assert torch.equal(values.to(dtype).float(), values)

    block = grid.super_block
    if block is None:
        assert (ranges.d, ranges.dmin, ranges.scale_codes, ranges.offset_codes) == (None,) * 4
        kept(ranges.scales, grid.scale_dtype)
        if grid.zero == "minimum":
            kept(ranges.offsets, grid.scale_dtype)
        elif grid.zero == "integer":
            assert torch.equal(ranges.offsets, ranges.offsets.round().clamp(0, grid.levels - 1))
        else:
            assert ranges.offsets is None
        return
    pairs = [(ranges.scales, ranges.d, ranges.scale_codes, block.scale_range)]
    if block.offset_bits is not None:
        pairs.append((ranges.offsets, -ranges.dmin, ranges.offset_codes, (0, 2**block.offset_bits - 1)))
        assert (ranges.dmin >= 0).all()
    for products, factor, codes, (low, high) in pairs:
        kept(factor, torch.float16)
        assert codes.dtype == torch.int16
        assert low <= codes.min()
        assert codes.max() <= high
        assert torch.equal(products, factor.repeat_interleave(block.groups, 1) * codes)


def errors(weight: torch.Tensor, ranges: Ranges, grid: Grid, importance: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each group, float64 [out, groups], every weight on its nearest value."""
    size = weight.shape[1] // ranges.scales.shape[1]
    offsets = None if ranges.offsets is None else ranges.offsets.repeat_interleave(size, 1)
    values = code_values(grid, ranges.scales.repeat_interleave(size, 1), offsets)
    rest = (values - weight.double()[..., None]).abs().amin(-1)
    return (rest.square() * importance).reshape(len(weight), -1, size).sum(-1)


@pytest.mark.parametrize("kind", ["normal", "student", "positive"])
@pytest.mark.parametrize("name", GRIDS)
def test_stored_values_are_exact_and_codes_nearest(name: str, kind: str):
    grid, weight, importance = GRIDS[name], weights(kind, ROWS, WIDTH), importances()
    for given in (None, importance, torch.ones(WIDTH)):
        rounded = round_to_nearest(weight, None, grid, given)
        assert_stored(rounded.ranges, grid)
        if name in GGUF:
            pack(rounded, name)  # refuses what would not be stored as it is
        ones = torch.ones(WIDTH)
        best = errors(weight, rounded.ranges, grid, ones).sum(-1)
        seen = (rounded.dequantize().double() - weight.double()).square().sum(-1)
        torch.testing.assert_close(seen, best, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "student", "positive"])
@pytest.mark.parametrize("name", PLAIN)
def test_importance_is_never_worse_than_the_full_range_in_any_group(name: str, kind: str):
    grid, weight, importance = GRIDS[name], weights(kind, ROWS, WIDTH), importances()
    plain = errors(weight, fit(weight, grid), grid, importance)
    weighted = errors(weight, fit(weight, grid, importance), grid, importance)
    assert (weighted <= plain * (1 + 1e-6) + 1e-15).all()
    assert weighted.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("name", [name for name in PLAIN if GRIDS[name].scale_rule != "half" or GRIDS[name].codebook])
def test_a_weight_that_lies_on_the_grid_stays_there(name: str):
    grid = GRIDS[name]
    weight = round_to_nearest(weights("normal", ROWS, WIDTH), None, grid).dequantize()
    again = round_to_nearest(weight, None, grid).dequantize()
    assert (again - weight).square().sum() < 1e-5 * weight.square().sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_zeros_tiny_weights_and_an_outlier_stay_finite(name: str, weighted: bool):
    grid, importance = GRIDS[name], importances() if weighted else None
    weight = torch.zeros(6, WIDTH)
    weight[1] = 1e-9  # below the smallest float16
    weight[2, 7] = 1e6  # its scale is above the largest in some grids
    weight[3] = -weights("positive", 1, WIDTH)
    weight[4, ::3] = weights("normal", 1, WIDTH)[0, ::3]
    weight[5] = 1e-9 * weights("normal", 1, WIDTH)[0]
    rounded = round_to_nearest(weight, None, grid, importance)
    assert_stored(rounded.ranges, grid)
    seen = rounded.dequantize()
    assert torch.isfinite(seen).all()
    assert torch.equal(seen[0], weight[0])
    assert seen[[1, 5]].abs().max() <= 2e-6
    assert (seen[3] - weight[3]).square().sum() < 0.25 * weight[3].square().sum()
    if grid.zero != "minimum" and 0.0 in (grid.codebook or (0.0,)):
        assert torch.equal(seen[4] * (weight[4] == 0), torch.zeros(WIDTH))
    alone = nearest(weight[2:3], fit(weight[2:3], grid, importance), grid).dequantize()
    assert torch.equal(alone, seen[2:3])


@pytest.mark.parametrize("name", GRIDS)
def test_channels_without_importance_leave_a_usable_grid(name: str):
    grid, weight = GRIDS[name], weights("normal", ROWS, WIDTH)
    importance = importances()
    importance[:256] = 0
    rounded = round_to_nearest(weight, None, grid, importance)
    assert_stored(rounded.ranges, grid)
    plain = round_to_nearest(weight, None, grid).dequantize()[:, :256]
    lost = (rounded.dequantize()[:, :256] - weight[:, :256]).square().sum()
    assert lost <= 4 * (plain - weight[:, :256]).square().sum()


@pytest.mark.parametrize("name", GRIDS)
def test_the_size_of_the_importance_does_not_matter(name: str):
    grid, weight, importance = GRIDS[name], weights("normal", ROWS, WIDTH), importances()
    want = errors(weight, fit(weight, grid, importance), grid, importance).sum()
    for size in (2.0**-40, 2.0**40):
        got = errors(weight, fit(weight, grid, importance * size), grid, importance).sum()
        assert got <= want * 1.001


def test_importance_helps_where_an_outlier_matters_little():
    weight, importance = weights("normal", ROWS, WIDTH), torch.ones(WIDTH)
    weight[:, 5] *= 8
    importance[5] = 1e-3
    grid = Grid(4, 32)
    plain = errors(weight, fit(weight, grid), grid, importance)[:, 0]
    assert errors(weight, fit(weight, grid, importance), grid, importance)[:, 0].sum() < 0.5 * plain.sum()


@pytest.mark.parametrize(("grid", "words"), [(Grid(4, 32), "width of 100"), (GGUF["q4_k"], "groups of 256")])
def test_a_width_that_does_not_divide_is_refused(grid: Grid, words: str):
    with pytest.raises(ValueError, match=words):
        round_to_nearest(torch.randn(2, 100), None, grid)


def test_pieces_of_rows_change_nothing(monkeypatch):
    weight = weights("normal", 9, WIDTH)
    whole = round_to_nearest(weight, None, GGUF["q4_k"], importances())
    monkeypatch.setattr("llmlite.quantize.rtn.PIECE", 2 * WIDTH)
    pieces = round_to_nearest(weight, None, GGUF["q4_k"], importances())
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.dequantize(), pieces.dequantize())
    assert whole.error == pytest.approx(pieces.error)
