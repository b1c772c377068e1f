"""How keys and values lie in memory: as they are, in another floating type, or as whole numbers with a scale.

``q8_0`` and ``q4_0`` are llama.cpp's blocks of 32 values along the head: whole numbers of 8 or 4 bits times a float16
scale. A head whose size is no multiple of 32 is one block.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmlite.errors import InputError

BLOCK = 32
GROWTH = 256
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Codec(Protocol):
    """Turns values [..., head_dim] into tensors with the same leading dimensions, and back."""

    def encode(self, values: Tensor) -> list[Tensor]:
        """What is stored."""

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The values that are stored, as ``dtype``."""


class Floats:
    """Values rounded to ``dtype``; None: as they are."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def encode(self, values: Tensor) -> list[Tensor]:
        return [values.to(self._dtype or values.dtype)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


class Q8:
    """int8, the largest of a block at 127."""

    def encode(self, values: Tensor) -> list[Tensor]:
        blocks = _blocks(values.float())
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        steps = torch.where(scales == 0, 1, scales).float()
        return [torch.round(blocks / steps).clamp_(-127, 127).to(torch.int8).flatten(-2), scales.squeeze(-1)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        return (codes.unflatten(-1, (scales.shape[-1], -1)).to(dtype) * scales.to(dtype).unsqueeze(-1)).flatten(-2)


class Q4:
    """4 bits, two to a byte, the value farthest from zero at -8."""

    def encode(self, values: Tensor) -> list[Tensor]:
        blocks = _blocks(values.float())
        farthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scales = (farthest / -8).half()
        steps = torch.where(scales == 0, 1, scales).float()
        codes = (torch.round(blocks / steps) + 8).clamp_(0, 15).to(torch.uint8)
        low, high = codes.chunk(2, -1)
        return [(low | (high << 4)).flatten(-2), scales.squeeze(-1)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        codes = codes.unflatten(-1, (scales.shape[-1], -1))
        values = torch.cat([codes & 15, codes >> 4], -1).to(dtype) - 8
        return (values * scales.to(dtype).unsqueeze(-1)).flatten(-2)


def codec(name: str | None) -> Codec:
    """The codec of a cache type; None: values as they are. `InputError` for a type that torch can't hold."""
    if name is None or name in FLOATS:
        return Floats(None if name is None else FLOATS[name])
    if name in ("q8_0", "q4_0"):
        return Q8() if name == "q8_0" else Q4()
    raise InputError(f"kv {name}: safetensors artifacts are served with f32, f16, bf16, q8_0 or q4_0")


class Store:
    """The keys, or the values, of one layer: per part a tensor [slots, heads, capacity, ...] that grows as needed."""

    def __init__(self, codec: Codec, slots: int, limit: int) -> None:
        self._codec = codec
        self._slots = slots
        self._limit = limit
        self._parts: list[Tensor] = []

    @property
    def capacity(self) -> int:
        """Positions that each slot has memory for."""
        return self._parts[0].shape[2] if self._parts else 0

    @property
    def position_bytes(self) -> int:
        """What one position of one slot takes."""
        return sum(math.prod((part.shape[1], *part.shape[3:])) * part.itemsize for part in self._parts)

    def in_place(self, dtype: torch.dtype) -> bool:
        """Whether values are stored as ``dtype``, so that reading copies nothing."""
        return isinstance(self._codec, Floats) and self._parts[0].dtype == dtype

    def shape_like(self, values: Tensor) -> None:
        """Make room for heads like those of ``values`` [1, heads, positions, head_dim], unless that is done."""
        if not self._parts:
            for part in self._codec.encode(values):
                shape = (self._slots, part.shape[1], 0, *part.shape[3:])
                self._parts.append(_zeros(shape, part))

    def reserve(self, positions: int, lengths: list[int]) -> None:
        """Memory for so many positions in every slot; the first ``lengths`` of each are kept.

        It at least doubles, so that a sequence that grows token by token is copied a few times in all.
        """
        if positions <= self.capacity:
            return
        capacity = max(2 * self.capacity, -(-positions // GROWTH) * GROWTH)
        for place, old in enumerate(self._parts):
            shape = (*old.shape[:2], min(capacity, max(self._limit, positions)), *old.shape[3:])
            new = _zeros(shape, old)
            for slot, length in enumerate(lengths):
                new[slot, :, :length] = old[slot, :, :length]
            self._parts[place] = new

    def write(self, slots: Tensor | int, positions: Tensor | slice, values: Tensor) -> None:
        """Put values [rows, heads, n, head_dim] at ``positions`` [rows, n] of their slots; of one slot a slice."""
        for part, new in zip(self._parts, self._codec.encode(values), strict=True):
            if isinstance(slots, int):
                part[slots, :, positions] = new[0]
            else:
                part[slots[:, None], :, positions] = new.transpose(1, 2)

    def read(self, slots: slice | Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Values [rows, heads, end - begin, head_dim]: a view where the slots are a slice and the type is stored."""
        return self._codec.decode([part[slots, :, begin:end] for part in self._parts], dtype)

    def parts(self, slot: int, length: int) -> list[Tensor]:
        """What is stored of a slot's first positions, each [heads, length, ...]."""
        return [part[slot, :, :length] for part in self._parts]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """No NaN where nothing was written: attention multiplies that by 0. On a CPU untouched pages take no memory."""
    if like.device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.zeros(math.prod(shape) * like.itemsize, np.uint8)).view(like.dtype).view(shape)


def _blocks(values: Tensor) -> Tensor:
    size = values.shape[-1]
    return values.unflatten(-1, (-1, BLOCK if size % BLOCK == 0 else size))
