import pytest
import torch

from llmlite.quantize.lattice import share_on_low_bit_grid
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trained_weight_is_not_on_a_grid(dtype: torch.dtype):
    assert share_on_low_bit_grid(torch.randn(64, 256).to(dtype)) < 0.01


@pytest.mark.parametrize("grid", [Grid(4, 32, "minimum"), Grid(4, 128), Grid(3, None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_weight_is(grid: Grid, dtype: torch.dtype):
    weight = round_to_nearest(torch.randn(64, 256), None, grid).dequantize().to(dtype)
    assert share_on_low_bit_grid(weight) > 0.99


def test_reordered_columns_leave_the_grid():
    weight = round_to_nearest(torch.randn(64, 2048), None, Grid(4, 32, "minimum")).dequantize()
    assert share_on_low_bit_grid(weight[:, torch.randperm(2048)]) < 0.05


def test_zeros_do_not_count():
    assert share_on_low_bit_grid(torch.zeros(4, 64)) == 0.0
