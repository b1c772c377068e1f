"""GGML tensor types: how rounded and dense weights lie in a GGUF file, byte for byte.

Format: the block structs of ggml-common.h (`blocks` has their bytes). A row is cut into blocks of 32 weights that
carry their own float16 scale, or into super-blocks of 256 whose groups of 16 or 32 have scales that are whole
numbers times the super-block's float16 scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.formats.gguf.blocks import read_blocks, write_blocks
from llmlite.quantize.types import Grid, Ranges, Rounded, SuperBlock

# kvalues_iq4nl of ggml-common.h: what the 16 codes of IQ4_NL and IQ4_XS stand for.
IQ4_VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


@dataclass(frozen=True)
class GgmlType:
    """One tensor type: ``number`` is its id in the file, ``ftype`` the id of a file that is mostly of this type.

    (ggml_type of ggml.h and llama_ftype of llama.h; of the mixtures S, M and L of a k-quant, M.)
    ``block`` counts weights that are stored together in ``block_bytes`` bytes; ``dtype`` is None on a grid.
    """

    name: str
    number: int
    ftype: int
    block: int
    block_bytes: int
    grid: Grid | None = None
    dtype: torch.dtype | None = None


_WITH_MINIMUMS_4, _WITH_MINIMUMS_6 = SuperBlock(16, 4, offset_bits=4), SuperBlock(8, 6, offset_bits=6)
TYPES = {
    row.name: row
    for row in (
        GgmlType("f32", 0, 0, 1, 4, dtype=torch.float32),
        GgmlType("f16", 1, 1, 1, 2, dtype=torch.float16),
        GgmlType("bf16", 30, 32, 1, 2, dtype=torch.bfloat16),
        GgmlType("q8_0", 8, 7, 32, 34, grid=Grid(8, 32, scale_rule="narrow")),
        GgmlType("q6_k", 14, 18, 256, 210, grid=Grid(6, 16, super_block=SuperBlock(16, 8, signed=True))),
        GgmlType("q5_k", 13, 17, 256, 176, grid=Grid(5, 32, zero="minimum", super_block=_WITH_MINIMUMS_6)),
        GgmlType("q5_1", 7, 9, 32, 24, grid=Grid(5, 32, zero="minimum")),
        GgmlType("q5_0", 6, 8, 32, 22, grid=Grid(5, 32, scale_rule="signed")),
        GgmlType("q4_k", 12, 15, 256, 144, grid=Grid(4, 32, zero="minimum", super_block=_WITH_MINIMUMS_6)),
        GgmlType("q4_1", 3, 3, 32, 20, grid=Grid(4, 32, zero="minimum")),
        GgmlType("q4_0", 2, 2, 32, 18, grid=Grid(4, 32, scale_rule="signed")),
        GgmlType("iq4_nl", 20, 25, 32, 18, grid=Grid(4, 32, codebook=IQ4_VALUES)),
        GgmlType(
            "iq4_xs", 23, 30, 256, 136,
            grid=Grid(4, 32, codebook=IQ4_VALUES, super_block=SuperBlock(8, 6, signed=True)),
        ),
        GgmlType("q3_k", 11, 12, 256, 110, grid=Grid(3, 16, super_block=SuperBlock(16, 6, signed=True))),
        GgmlType("q2_k", 10, 10, 256, 84, grid=Grid(2, 16, zero="minimum", super_block=_WITH_MINIMUMS_4)),
    )
}  # fmt: skip
UNPACKED = 2**20  # weights that `unpack` computes at once, which takes 20 bytes each
# What llama-quantize takes where 256 does not divide the width (tensor_type_fallback in llama-quant.cpp).
_SMALLER_BLOCKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "iq4_xs": "iq4_nl", "q3_k": "q4_0", "q2_k": "q4_0"}


def grid_of(name: str) -> Grid:
    """The grid that weights of this type lie on; ValueError for f32, f16 and bf16, which have none."""
    grid = TYPES[name].grid
    if grid is None:
        raise ValueError(f"{name} is not a grid")
    return grid


def fallback(name: str, width: int) -> str:
    """The type that llama-quantize gives a matrix of ``width`` input channels where this one was asked for.

    It is ``name`` itself where its blocks divide the width, else a type with blocks of 32, else f16.
    """
    for choice in (name, _SMALLER_BLOCKS.get(name, name)):
        if width % TYPES[choice].block == 0:
            return choice
    return "f16"


def refusal(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this shape can't have this type, with the type that it can have; None if it can."""
    kind = TYPES[name]
    if kind.grid is None:
        return None
    if len(shape) != 2:
        return f"gguf:{kind.name} holds matrices and this tensor has {len(shape)} dimension(s); gguf:f32 holds it"
    if shape[1] % kind.block:
        return (
            f"gguf:{kind.name} stores blocks of {kind.block} input channels and {shape[1]} is not a multiple of "
            f"{kind.block}; gguf:{fallback(name, shape[1])} holds it"
        )
    return None


def nbytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data, without the file's alignment."""
    kind = TYPES[name]
    return math.prod(shape) // kind.block * kind.block_bytes


def encode(tensor: torch.Tensor, name: str) -> np.ndarray:
    """A tensor in f32, f16 or bf16, rounded to nearest even: uint8 [nbytes].

    Raises `InputError` for a value that f16 can't hold.
    """
    kind = TYPES[name]
    assert kind.dtype is not None, f"{name} is a grid: round first, then pack"
    stored = tensor.detach().cpu().to(kind.dtype).contiguous()
    if kind.dtype == torch.float16 and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
        raise InputError(f"a weight of magnitude {tensor.abs().max():.3g} does not fit in f16; bf16 or f32 holds it")
    return stored.reshape(-1).view(torch.uint8).numpy()


def pack(rounded: Rounded, name: str) -> np.ndarray:
    """A rounded weight in the bytes of a type with a grid: uint8 [out, bytes of a row].

    ValueError if that loses anything: for another grid, groups that are not neighbouring channels, codes out of
    range, scales and minimums (d and dmin of super-blocks) that are not finite float16 values, and scales that are
    not their super-block's d times their code.
    """
    kind = TYPES[name]
    grid = grid_of(name)
    held = rounded.grid
    if (held.bits, held.group, held.zero, held.codebook, held.super_block) != (
        grid.bits, grid.group, grid.zero, grid.codebook, grid.super_block,
    ):  # fmt: skip
        raise ValueError(f"{held} is not the grid of {name}")
    if rounded.group_index is not None:
        raise ValueError(f"{name} has no place for a group index")
    shape = (rounded.codes.shape[0], rounded.codes.shape[1])
    _check_shape(name, shape)
    rows, blocks = shape[0], shape[1] // kind.block
    codes, ranges = rounded.codes.detach().cpu().contiguous(), rounded.ranges.map(lambda part: part.detach().cpu())
    if codes.dtype != torch.uint8 or int(codes.max()) >= grid.levels:
        raise ValueError(f"the codes of {name} are uint8 from 0 to {grid.levels - 1}")
    scale, offset = (ranges.scales, ranges.offsets) if grid.super_block is None else (ranges.d, ranges.dmin)
    parts = {"codes": codes.view(rows, blocks, kind.block), "scale": _float16(scale, rows, blocks)}
    if grid.zero == "minimum":
        parts["offset"] = _float16(offset, rows, blocks)
    if grid.super_block is not None:
        parts["ranges"] = _range_codes(ranges, grid.super_block, rows, blocks)
    return write_blocks(name, parts).view(rows, -1).numpy()


def read(data: np.ndarray, name: str, shape: tuple[int, ...]) -> Rounded:
    """The codes and ranges that the bytes of a type with a grid hold; `pack` of them is the same bytes.

    ``shape`` is [out, in]. ValueError if the type can't hold it, or if the bytes are not as many as it takes.
    """
    kind, grid = TYPES[name], grid_of(name)
    _check_shape(name, shape)
    raw = _bytes_of(data, name, shape)
    rows, blocks = shape[0], shape[1] // kind.block
    parts = read_blocks(name, raw.view(rows, blocks, kind.block_bytes))
    codes = parts["codes"].view(shape)
    scale = parts["scale"].view(rows, blocks)
    offset = parts["offset"].view(rows, blocks) if grid.zero == "minimum" else None
    block = grid.super_block
    if block is None:
        return Rounded(grid, codes, Ranges(scale, offset))
    whole = parts["ranges"].to(torch.int16)
    scale_codes = (whole[..., : block.groups] + block.scale_range[0]).reshape(rows, -1)
    scales = _times_codes(scale, scale_codes)
    if offset is None:
        return Rounded(grid, codes, Ranges(scales, None, scale, None, scale_codes))
    offset_codes = whole[..., block.groups :].reshape(rows, -1)
    offsets = _times_codes(-offset, offset_codes)
    return Rounded(grid, codes, Ranges(scales, offsets, scale, offset, scale_codes, offset_codes))


def unpack(data: np.ndarray, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a reader of the bytes computes with: float32, of the given shape, bit for bit what ggml makes of them.

    ValueError as in `read`.
    """
    dtype = TYPES[name].dtype
    if dtype is not None:
        return _bytes_of(data, name, shape).view(dtype).float().view(shape)
    rounded = read(data, name, shape)
    weight = torch.empty(shape)
    step = max(1, UNPACKED // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        weight[rows] = rounded.map(itemgetter(rows)).dequantize()
    return weight


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    reason = refusal(name, shape)
    if reason is not None:
        raise ValueError(reason)


def _bytes_of(data: np.ndarray, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if raw.size != nbytes(name, shape):
        raise ValueError(f"{name} of shape {tuple(shape)} takes {nbytes(name, shape)} bytes and these are {raw.size}")
    return torch.from_numpy(raw.copy())


def _float16(values: torch.Tensor | None, rows: int, blocks: int) -> torch.Tensor:
    """The same values [rows, blocks, 1], known to be float16 values."""
    if values is None or values.shape != (rows, blocks):
        raise ValueError(f"{rows} rows of {blocks} blocks need a scale (and minimum) for each, and these have not")
    values = values.float()
    if not torch.isfinite(values).all() or not torch.equal(values.half().float(), values):
        raise ValueError("scales and minimums must be finite float16 values before any code is chosen")
    return values.unsqueeze(-1)


def _times_codes(factor: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The super-blocks' ``factor`` [rows, blocks] times the codes of their groups [rows, groups]."""
    return factor.repeat_interleave(codes.shape[1] // factor.shape[1], dim=1) * codes


def _range_codes(ranges: Ranges, block: SuperBlock, rows: int, blocks: int) -> torch.Tensor:
    """What the super-blocks keep of their groups: uint8 [rows, blocks, groups], or twice the groups with offsets."""
    kinds: list[tuple[str, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, tuple[int, int]]]
    kinds = [("scale", ranges.scales, ranges.d, ranges.scale_codes, block.scale_range)]
    if block.offset_bits is not None:
        assert ranges.dmin is not None
        highest = 2**block.offset_bits - 1
        kinds.append(("offset", ranges.offsets, -ranges.dmin, ranges.offset_codes, (0, highest)))
    found = []
    for what, products, factor, codes, (low, high) in kinds:
        if codes is None or products is None or factor is None or codes.shape != (rows, blocks * block.groups):
            raise ValueError(f"super-blocks of {block.groups} groups need a {what} and its code for each group")
        if codes.dtype != torch.int16:
            raise ValueError(f"{what} codes are int16, and these are {codes.dtype}")
        if int(codes.min()) < low or int(codes.max()) > high:
            raise ValueError(f"{what} codes go from {low} to {high}, and these from {codes.min()} to {codes.max()}")
        if not torch.equal(products.float(), _times_codes(factor.float(), codes)):
            raise ValueError(f"one {what} is not its super-block's float16 factor times its code")
        found.append((codes - low).to(torch.uint8).view(rows, blocks, block.groups))
    return torch.cat(found, dim=-1)
