"""GGML tensor types: how rounded and dense weights lie in a GGUF file, byte for byte.

Format: the block structs of ggml-common.h (block_q4_0, block_q4_1, block_q8_0). A row is cut into blocks of 32
weights; every block carries its own float16 scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.quantize.types import Grid, Rounded


@dataclass(frozen=True)
class GgmlType:
    """One tensor type: ``number`` is its id in the file, ``ftype`` the id of a file that is mostly of this type.

    ``block`` counts weights that are stored together in ``block_bytes`` bytes; ``dtype`` is None on a grid.
    """

    name: str
    number: int
    ftype: int
    block: int
    block_bytes: int
    grid: Grid | None = None
    dtype: torch.dtype | None = None


TYPES = {
    row.name: row
    for row in (
        GgmlType("f32", 0, 0, 1, 4, dtype=torch.float32),
        GgmlType("f16", 1, 1, 1, 2, dtype=torch.float16),
        GgmlType("bf16", 30, 32, 1, 2, dtype=torch.bfloat16),
        GgmlType("q8_0", 8, 7, 32, 34, grid=Grid(8, 32, scale_rule="narrow")),
        GgmlType("q4_0", 2, 2, 32, 18, grid=Grid(4, 32, scale_rule="signed")),
        GgmlType("q4_1", 3, 3, 32, 20, grid=Grid(4, 32, zero="minimum")),
    )
}


def grid_of(name: str) -> Grid:
    """The grid that weights of this type lie on; ValueError for f32, f16 and bf16, which have none."""
    grid = TYPES[name].grid
    if grid is None:
        raise ValueError(f"{name} is not a grid")
    return grid


def refusal(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this shape can't have this type, None if it can."""
    kind = TYPES[name]
    if kind.grid is None:
        return None
    if len(shape) != 2:
        return f"gguf:{kind.name} holds matrices and this tensor has {len(shape)} dimension(s); gguf:f32 holds it"
    if shape[1] % kind.block:
        return (
            f"gguf:{kind.name} stores blocks of {kind.block} input channels and {shape[1]} is not a multiple of "
            f"{kind.block}; gguf:f16 holds it"
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
    """A rounded weight in q8_0, q4_0 or q4_1: uint8 [out, bytes of a row].

    Scales and minimums must be float16 values already, and groups must be neighbouring channels: ValueError.
    """
    kind = TYPES[name]
    if kind.grid is None or (rounded.grid.bits, rounded.grid.group, rounded.grid.zero) != (
        kind.grid.bits, kind.grid.group, kind.grid.zero,
    ):  # fmt: skip
        raise ValueError(f"{rounded.grid} is not the grid of {name}")
    if rounded.group_index is not None:
        raise ValueError(f"{name} has no place for a group index")
    rows, width = rounded.codes.shape
    codes = rounded.codes.cpu().reshape(rows, width // kind.block, kind.block)
    parts = [_float16_bytes(rounded.scales)]
    if kind.grid.zero == "minimum":
        assert rounded.offsets is not None
        parts.append(_float16_bytes(rounded.offsets))
    if kind.grid.bits == 8:
        parts.append((codes.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
    else:
        half = kind.block // 2  # weight j lies in the low nibble of byte j, weight j + 16 in the high one
        parts.append(codes[..., :half] | (codes[..., half:] << 4))
    return torch.cat(parts, dim=-1).reshape(rows, -1).numpy()


def unpack(data: np.ndarray, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a reader of the bytes computes with: float32, of the given shape."""
    kind = TYPES[name]
    raw = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy())
    if kind.dtype is not None:
        return raw.view(kind.dtype).float().reshape(shape)
    assert kind.grid is not None
    blocks = raw.reshape(-1, kind.block_bytes)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind.grid.bits == 8:
        return (blocks[:, 2:].contiguous().view(torch.int8).float() * scales).reshape(shape)
    nibbles = blocks[:, -kind.block // 2 :]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float()
    if kind.grid.zero == "minimum":
        return (codes * scales + blocks[:, 2:4].contiguous().view(torch.float16).float()).reshape(shape)
    return ((codes - 8) * scales).reshape(shape)


def _float16_bytes(values: torch.Tensor) -> torch.Tensor:
    stored = values.detach().cpu().half()
    if not torch.equal(stored.float(), values.detach().cpu().float()):
        raise ValueError("scales and minimums must be finite float16 values before any code is chosen")
    return stored.unsqueeze(-1).view(torch.uint8)
