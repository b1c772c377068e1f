"""The bytes of each GGML type, held against the reference reader (the package gguf)."""

import numpy as np
import pytest
import torch

from llmlite.errors import InputError
from llmlite.formats.gguf.types import TYPES, encode, grid_of, nbytes, pack, refusal, unpack
from llmlite.quantize.types import Grid, Ranges, Rounded

gguf = pytest.importorskip("gguf")

GRIDS = [name for name, kind in TYPES.items() if kind.grid is not None]
DENSE = [name for name, kind in TYPES.items() if kind.grid is None]


def random_rounded(name: str, rows: int = 5, width: int = 96) -> Rounded:
    """Every code, scales of both signs, and minimums: what a solver may return."""
    torch.manual_seed(7)
    grid = grid_of(name)
    codes = torch.randint(0, grid.levels, (rows, width), dtype=torch.uint8)
    scales = (torch.randn(rows, width // 32) * 0.1).half().float()
    offsets = torch.randn(rows, width // 32).half().float() if grid.zero == "minimum" else None
    return Rounded(grid, codes, Ranges(scales, offsets))


def reference(data: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(TYPES[name].number)))


@pytest.mark.parametrize("name", GRIDS)
def test_reference_reader_sees_the_rounded_weight(name):
    rounded = random_rounded(name)
    data = pack(rounded, name)
    assert data.nbytes == nbytes(name, rounded.codes.shape)
    assert torch.equal(reference(data, name), rounded.dequantize())
    assert torch.equal(unpack(data, name, tuple(rounded.codes.shape)), rounded.dequantize())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_golden_bytes(name):
    """One block by hand, from the structs in ggml-common.h: float16 0.5 is 00 38, -2 is 00 c0."""
    grid = grid_of(name)
    codes = (torch.arange(32) % grid.levels).to(torch.uint8).reshape(1, 32)
    offsets = torch.tensor([[-2.0]]) if grid.zero == "minimum" else None
    head = {"q4_0": "0038", "q4_1": "003800c0", "q8_0": "0038"}[name]
    if grid.bits == 8:
        body = bytes((n - 128) % 256 for n in range(32)).hex()
    else:
        body = bytes(n | n << 4 for n in range(16)).hex()
    data = pack(Rounded(grid, codes, Ranges(torch.tensor([[0.5]]), offsets)), name)
    assert data.tobytes().hex() == head + body


@pytest.mark.parametrize("name", DENSE)
def test_dense_types(name):
    tensor = torch.randn(3, 20) * 1e3
    data = encode(tensor, name)
    assert data.nbytes == nbytes(name, (3, 20))
    assert torch.equal(unpack(data, name, (3, 20)), tensor.to(TYPES[name].dtype).float())
    view = {"f32": np.float32, "f16": np.float16, "bf16": np.uint8}[name]
    rows = data.reshape(3, -1).view(view)
    assert torch.equal(reference(rows, name).float(), tensor.to(TYPES[name].dtype).float())


def test_type_numbers_and_sizes_are_those_of_ggml():
    for name, kind in TYPES.items():
        number = gguf.GGMLQuantizationType[name.upper()]
        assert number == kind.number
        assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.block_bytes)
        assert gguf.LlamaFileType(kind.ftype).name.endswith(name.upper())


def test_a_width_that_does_not_divide_is_refused_with_the_way_out():
    assert refusal("q4_0", (8, 96)) is None
    assert refusal("f16", (8, 100)) is None
    reason = refusal("q4_0", (8, 100))
    assert "100" in reason
    assert "gguf:f16" in reason


def test_what_a_type_cannot_hold_is_not_packed():
    with pytest.raises(InputError, match="bf16"):
        encode(torch.tensor([1e5]), "f16")
    rounded = random_rounded("q4_0")
    with pytest.raises(ValueError, match="not the grid"):
        pack(rounded, "q4_1")
    with pytest.raises(ValueError, match="float16"):
        pack(Rounded(rounded.grid, rounded.codes, Ranges(rounded.scales + 1e-5)), "q4_0")
    index = torch.arange(96) // 32
    with pytest.raises(ValueError, match="group index"):
        pack(Rounded(rounded.grid, rounded.codes, rounded.ranges, index), "q4_0")


def test_a_grid_of_another_group_is_refused():
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    rounded = Rounded(Grid(4, 128, scale_rule="signed"), codes, Ranges(torch.ones(2, 1)))
    with pytest.raises(ValueError, match="not the grid"):
        pack(rounded, "q4_0")
