"""The bytes of each GGML type, held against libggml, and against the package gguf where that is enough."""

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmlite.errors import InputError
from llmlite.evals.llama import library
from llmlite.formats.gguf import types
from llmlite.formats.gguf.types import TYPES, encode, fallback, grid_of, nbytes, pack, read, refusal, unpack
from llmlite.quantize.types import Grid, Ranges, Rounded

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

GRIDS = [name for name, kind in TYPES.items() if kind.grid is not None]
SUPERS = [name for name in GRIDS if grid_of(name).super_block is not None]
DENSE = [name for name, kind in TYPES.items() if kind.grid is None]
ROWS, WIDTH = 5, 768


class Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


class CpuTraits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(None, ctypes.c_int, *[ctypes.c_void_p, ctypes.c_size_t] * 3, ctypes.c_int),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


class Ggml:
    """The functions of libggml, on arrays."""

    def __init__(self):
        library()  # the log stays off the terminal
        from llama_cpp.llama_cpp import _lib

        self.get_type_traits = _lib.ggml_get_type_traits
        self.get_type_traits.argtypes, self.get_type_traits.restype = [ctypes.c_int], ctypes.POINTER(Traits)
        self.get_cpu_traits = _lib.ggml_get_type_traits_cpu
        self.get_cpu_traits.argtypes, self.get_cpu_traits.restype = [ctypes.c_int], ctypes.POINTER(CpuTraits)
        _lib.ggml_cpu_init()  # fills the tables of the kernels
        self.validate = _lib.ggml_validate_row_data
        self.validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self.validate.restype = ctypes.c_bool
        self.quantize_chunk = _lib.ggml_quantize_chunk
        self.quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
        self.quantize_chunk.argtypes += [ctypes.c_void_p]
        self.quantize_chunk.restype = ctypes.c_size_t

    def traits(self, name: str) -> Traits:
        return self.get_type_traits(TYPES[name].number).contents

    def is_valid(self, data: np.ndarray, name: str) -> bool:
        return self.validate(TYPES[name].number, data.ctypes.data, data.nbytes)

    def dequantize(self, data: np.ndarray, name: str) -> torch.Tensor:
        out = np.empty((ROWS, WIDTH), np.float32)
        self.traits(name).to_float(data.ctypes.data, out.ctypes.data, out.size)
        return torch.from_numpy(out)

    def multiply(self, data: np.ndarray, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """The rows of ``data`` times ``inputs``, which the kernel rounds to the 8-bit type that it wants."""
        kernel = self.get_cpu_traits(TYPES[name].number).contents
        wanted = self.get_type_traits(kernel.vec_dot_type).contents
        source = np.ascontiguousarray(inputs.numpy())
        rounded = np.zeros(source.size // wanted.block * wanted.block_bytes, np.uint8)
        self.get_cpu_traits(kernel.vec_dot_type).contents.from_float(
            source.ctypes.data, rounded.ctypes.data, source.size
        )
        out = np.empty(len(data), np.float32)
        for row, room in zip(data, out.reshape(-1, 1), strict=True):
            kernel.vec_dot(source.size, room.ctypes.data, 0, row.ctypes.data, 0, rounded.ctypes.data, 0, 1)
        return torch.from_numpy(out)

    def quantize(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> np.ndarray:
        rows, width = weight.shape
        source = np.ascontiguousarray(weight.numpy())
        weights = None if importance is None else np.ascontiguousarray(importance.numpy())
        out = np.zeros((rows, nbytes(name, (1, width))), np.uint8)
        place = None if weights is None else weights.ctypes.data
        size = self.quantize_chunk(TYPES[name].number, source.ctypes.data, out.ctypes.data, 0, rows, width, place)
        assert size == out.nbytes
        return out


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


def random_rounded(name: str) -> Rounded:
    """Every code, every scale and offset code, scales of both signs and of float16's extremes, and minimums."""
    torch.manual_seed(7)
    grid = grid_of(name)
    codes = torch.randint(0, grid.levels, (ROWS, WIDTH), dtype=torch.uint8)
    codes[0] = torch.arange(WIDTH) % grid.levels
    blocks = WIDTH // grid.block(WIDTH)
    d = (torch.randn(ROWS, blocks) * 0.1).half().float()
    d[1, :3] = torch.tensor([65504.0, -(2.0**-24), 0.0])
    dmin = torch.randn(ROWS, blocks).half().float()
    block = grid.super_block
    if block is None:
        return Rounded(grid, codes, Ranges(d, dmin if grid.zero == "minimum" else None))

    def draw(low: int, high: int) -> torch.Tensor:
        drawn = torch.randint(low, high + 1, (ROWS, blocks * block.groups), dtype=torch.int16)
        some = torch.arange(low, high + 1)[torch.randperm(high + 1 - low)]
        drawn[2:].view(-1)[: len(some)] = some[: drawn[2:].numel()]
        drawn[0, :2] = torch.tensor([low, high])
        drawn[0, -2:] = torch.tensor([high, low])
        return drawn

    scale_codes = draw(*block.scale_range)
    scales = d.repeat_interleave(block.groups, 1) * scale_codes
    if block.offset_bits is None:
        return Rounded(grid, codes, Ranges(scales, None, d, None, scale_codes))
    offset_codes = draw(0, 2**block.offset_bits - 1)
    offsets = -dmin.repeat_interleave(block.groups, 1) * offset_codes
    return Rounded(grid, codes, Ranges(scales, offsets, d, dmin, scale_codes, offset_codes))


def with_ranges(rounded: Rounded, **change: Any) -> Rounded:
    return replace(rounded, ranges=replace(rounded.ranges, **change))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero among them."""
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", GRIDS)
def test_libggml_sees_the_rounded_weight(name, ggml):
    rounded = random_rounded(name)
    data = pack(rounded, name)
    assert data.dtype == np.uint8
    assert data.shape == (ROWS, nbytes(name, (1, WIDTH)))
    assert ggml.is_valid(data, name)
    seen = ggml.dequantize(data, name)
    assert same_bits(unpack(data, name, (ROWS, WIDTH)), seen)
    assert same_bits(rounded.dequantize(), seen)


@pytest.mark.parametrize("name", ["q4_k", "iq4_nl"])
def test_unpacking_some_rows_at_a_time_changes_nothing(name, monkeypatch):
    rounded = random_rounded(name)
    monkeypatch.setattr(types, "UNPACKED", 2 * WIDTH + 1)
    assert same_bits(unpack(pack(rounded, name), name, (ROWS, WIDTH)), rounded.dequantize())


@pytest.mark.parametrize("name", GRIDS)
def test_the_kernels_multiply_with_the_rounded_weight(name, ggml):
    """Whole inputs, the largest of each 32 being 127, are rounded to 8 bits without an error."""
    rounded = random_rounded(name)
    inputs = torch.randint(-100, 101, (WIDTH,)).float()
    inputs[::32] = 127.0
    seen = ggml.multiply(pack(rounded, name), name, inputs)
    weight = rounded.dequantize().double()
    terms = weight * inputs
    assert ((seen - terms.sum(1)).abs() < 1e-5 * terms.abs().sum(1)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_what_was_packed_is_read_back(name):
    rounded = random_rounded(name)
    found = read(pack(rounded, name), name, (ROWS, WIDTH))
    assert found.grid == rounded.grid
    assert torch.equal(found.codes, rounded.codes)
    for had, has in zip(rounded.ranges.tensors(), found.ranges.tensors(), strict=True):
        if had is None or has is None:
            assert had is has
        else:
            assert torch.equal(had, has)
            assert had.dtype == has.dtype


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_bytes_that_libggml_wrote_are_read_and_packed_alike(name, weighted, ggml):
    torch.manual_seed(8)
    weight = torch.randn(ROWS, WIDTH) * 0.05 * torch.rand(ROWS, WIDTH // 16).exp().repeat_interleave(16, 1)
    weight[1, :256] = 0.0
    weight[2] = weight[2].abs()
    weight[3, 32:64] = 7.0
    data = ggml.quantize(weight, name, torch.rand(WIDTH) + 0.1 if weighted else None)
    found = read(data, name, (ROWS, WIDTH))
    assert np.array_equal(pack(found, name), data)
    assert same_bits(found.dequantize(), ggml.dequantize(data, name))


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
    seen = gguf.quants.dequantize(data.reshape(3, -1).view(view), gguf.GGMLQuantizationType(TYPES[name].number))
    assert torch.equal(torch.from_numpy(seen).float(), tensor.to(TYPES[name].dtype).float())


@pytest.mark.parametrize("name", TYPES)
def test_numbers_and_sizes_are_those_of_ggml(name, ggml):
    kind, traits = TYPES[name], ggml.traits(name)
    assert traits.type_name.decode().lower() == name
    assert (traits.block, traits.block_bytes) == (kind.block, kind.block_bytes)
    assert traits.is_quantized == (kind.grid is not None)
    assert gguf.GGMLQuantizationType[name.upper()] == kind.number
    file_type = gguf.LlamaFileType(kind.ftype).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    assert file_type.lower() in (name, f"{name}_m")
    if kind.grid is not None:
        assert kind.grid.block(WIDTH) == kind.block


def test_a_width_that_does_not_divide_is_refused_with_the_way_out():
    assert refusal("q4_0", (8, 96)) is None
    assert refusal("f16", (8, 100)) is None
    reason = refusal("q4_0", (8, 100)) or ""
    assert "100" in reason
    assert "gguf:f16" in reason
    assert "gguf:f32" in (refusal("q4_k", (256,)) or "")


@pytest.mark.parametrize("name", SUPERS)
def test_a_width_without_whole_super_blocks_is_refused_with_a_type_that_holds_it(name):
    assert refusal(name, (8, 512)) is None
    assert fallback(name, 512) == name
    reason = refusal(name, (8, 576)) or ""
    assert "256" in reason
    assert "576" in reason
    other = fallback(name, 576)
    assert f"gguf:{other} holds it" in reason
    assert refusal(other, (8, 576)) is None
    assert TYPES[other].block == 32
    assert TYPES[other].block_bytes / 32 >= TYPES[name].block_bytes / 256
    assert fallback(name, 100) == "f16"
    codes = torch.zeros(8, 576, dtype=torch.uint8)
    with pytest.raises(ValueError, match="576"):
        pack(replace(random_rounded(name), codes=codes), name)
    with pytest.raises(ValueError, match="576"):
        read(np.zeros(8, np.uint8), name, (8, 576))


def test_what_a_type_cannot_hold_is_not_packed():
    with pytest.raises(InputError, match="bf16"):
        encode(torch.tensor([1e5]), "f16")
    rounded = random_rounded("q4_0")
    for other in ("q4_1", "iq4_nl", "q5_0"):
        with pytest.raises(ValueError, match="not the grid"):
            pack(rounded, other)
    with pytest.raises(ValueError, match="not a grid"):
        pack(rounded, "f16")
    with pytest.raises(ValueError, match="group index"):
        pack(replace(rounded, group_index=torch.arange(WIDTH) // 32), "q4_0")
    with pytest.raises(ValueError, match="0 to 15"):
        pack(replace(rounded, codes=rounded.codes + 1), "q4_0")
    with pytest.raises(ValueError, match="not the grid"):
        pack(random_rounded("iq4_xs"), "iq4_nl")


def float16_fields(name: str) -> tuple[str, ...]:
    fields = ("d", "dmin") if name in SUPERS else ("scales", "offsets")
    return fields if grid_of(name).zero == "minimum" else fields[:1]


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in GRIDS for field in float16_fields(name)])
def test_what_is_no_finite_float16_value_is_not_packed(name, field):
    rounded = random_rounded(name)
    values = getattr(rounded.ranges, field)
    for changed in (values * 1.0001, values + float("inf"), values * float("nan"), values + 1e5):
        with pytest.raises(ValueError, match="finite float16"):
            pack(with_ranges(rounded, **{field: changed}), name)
    for changed in (values[:, 1:], None):
        with pytest.raises(ValueError, match="for each"):
            pack(with_ranges(rounded, **{field: changed}), name)


@pytest.mark.parametrize("name", SUPERS)
def test_super_blocks_are_packed_only_with_products_of_codes_in_range(name):
    rounded = random_rounded(name)
    ranges: Any = rounded.ranges

    def refused(words: str, **change: Any) -> None:
        with pytest.raises(ValueError, match=words):
            pack(with_ranges(rounded, **change), name)

    refused("scale codes go", scale_codes=ranges.scale_codes + 1)
    refused("scale codes go", scale_codes=ranges.scale_codes - 1)
    refused("int16", scale_codes=ranges.scale_codes.float())
    refused("for each group", scale_codes=None)
    refused("for each group", scale_codes=ranges.scale_codes[:, 1:])
    refused("one scale is not", scales=ranges.scales * 1.0001)
    refused("one scale is not", scale_codes=ranges.scale_codes.flip(1))
    if ranges.offsets is not None:
        refused("offset codes go", offset_codes=ranges.offset_codes + 1)
        refused("offset codes go", offset_codes=ranges.offset_codes - 1)
        refused("one offset is not", offsets=-ranges.offsets)
        refused("for each group", offset_codes=None)


def test_bytes_of_another_size_are_not_read():
    data = pack(random_rounded("q4_k"), "q4_k")
    for name in ("q4_k", "q5_k"):
        with pytest.raises(ValueError, match="bytes"):
            read(data[1:] if name == "q4_k" else data, name, (ROWS, WIDTH))
    with pytest.raises(ValueError, match="not a grid"):
        read(data, "f16", (ROWS, WIDTH))


def test_a_grid_of_another_group_is_refused():
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    rounded = Rounded(Grid(4, 128, scale_rule="signed"), codes, Ranges(torch.ones(2, 1)))
    with pytest.raises(ValueError, match="not the grid"):
        pack(rounded, "q4_0")
