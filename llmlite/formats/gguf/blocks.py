"""How the parts of a block lie in its bytes, for every block type of ggml that llmlite writes.

Format: the structs of ggml-common.h, the order of their bits as dequantize_row_* of ggml-quants.c reads them.
A part holds the values of one kind that a block has: ``codes`` (uint8, one per weight), ``scale`` and ``offset``
(float32, one each), and ``ranges``, what a super-block keeps for each of its groups (uint8, scale codes counted
from the smallest; the groups' offset codes follow them where there are any).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Field(Protocol):
    """Neighbouring bytes of a block that hold all of a part's values, or some of their bits."""

    @property
    def part(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def put(self, values: torch.Tensor, room: torch.Tensor) -> None:
        """Fill ``room`` uint8 [rows, blocks, nbytes] from ``values`` [rows, blocks, count]."""

    def get(self, raw: torch.Tensor, values: torch.Tensor) -> None:
        """Put what ``raw`` holds into ``values``, which are zero but for the bits that other fields hold."""


@dataclass(frozen=True)
class Half:
    """One float16 value, little endian."""

    part: str
    count: ClassVar[int] = 1
    nbytes: ClassVar[int] = 2
    dtype: ClassVar[torch.dtype] = torch.float32

    def put(self, values: torch.Tensor, room: torch.Tensor) -> None:
        room.copy_(values.half().view(torch.uint8))

    def get(self, raw: torch.Tensor, values: torch.Tensor) -> None:
        values.copy_(raw.contiguous().view(torch.float16))


@dataclass(frozen=True)
class Bits:
    """``bits`` bits of each of ``count`` values, those from bit ``shift`` of a value on.

    ``run`` neighbouring values share n = run * bits / 8 bytes: value i of a run lies in byte i % n, from bit
    bits * (i // n) on. ``flip``: the bits of a byte that are stored inverted (128 makes a value 0 to 255 the
    two's complement of value - 128).
    """

    part: str
    count: int
    bits: int
    run: int
    shift: int = 0
    flip: int = 0
    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def nbytes(self) -> int:
        return self.count * self.bits // 8

    def _runs(self, tensor: torch.Tensor, of: int) -> torch.Tensor:
        """The last dimension cut into [runs, of, bytes of a run]; a view of a contiguous tensor."""
        return tensor.view(*tensor.shape[:-1], self.count // self.run, of, self.run * self.bits // 8)

    def put(self, values: torch.Tensor, room: torch.Tensor) -> None:
        each, mask = 8 // self.bits, 2**self.bits - 1
        runs = self._runs(values, each)
        packed = torch.zeros_like(runs[..., 0, :])
        for place in range(each):
            packed |= ((runs[..., place, :] >> self.shift) & mask) << (self.bits * place)
        room.copy_(packed.flatten(-2) ^ self.flip)

    def get(self, raw: torch.Tensor, values: torch.Tensor) -> None:
        each, mask = 8 // self.bits, 2**self.bits - 1
        runs = self._runs(values, each)
        packed = self._runs(raw ^ self.flip, 1)[..., 0, :]
        for place in range(each):
            runs[..., place, :] |= ((packed >> (self.bits * place)) & mask) << self.shift


@dataclass(frozen=True)
class SixBitPairs:
    """8 scale codes s and 8 offset codes m of 6 bits each in 12 bytes (get_scale_min_k4).

    Bytes 0 to 3: s0 to s3, and in the two high bits the high bits of s4 to s7; bytes 4 to 7 the same of m; bytes 8
    to 11: the four low bits of s4 to s7, and above them those of m4 to m7.
    """

    part: str
    count: ClassVar[int] = 16
    nbytes: ClassVar[int] = 12
    dtype: ClassVar[torch.dtype] = torch.uint8

    def put(self, values: torch.Tensor, room: torch.Tensor) -> None:
        scales, scales_above, offsets, offsets_above = values.split(4, dim=-1)
        room[..., 0:4] = scales | (scales_above >> 4) << 6
        room[..., 4:8] = offsets | (offsets_above >> 4) << 6
        room[..., 8:12] = (scales_above & 15) | (offsets_above & 15) << 4

    def get(self, raw: torch.Tensor, values: torch.Tensor) -> None:
        scales, offsets, low = raw.split(4, dim=-1)
        values[..., 0:4] = scales & 63
        values[..., 4:8] = (low & 15) | (scales >> 6) << 4
        values[..., 8:12] = offsets & 63
        values[..., 12:16] = low >> 4 | (offsets >> 6) << 4


_SCALE, _OFFSET = Half("scale"), Half("offset")
_NIBBLES = Bits("codes", 32, 4, 32)
_FIFTH_BITS = Bits("codes", 32, 1, 8, shift=4)

BLOCKS: Mapping[str, tuple[Field, ...]] = {
    "q4_0": (_SCALE, _NIBBLES),
    "q4_1": (_SCALE, _OFFSET, _NIBBLES),
    "q5_0": (_SCALE, _FIFTH_BITS, _NIBBLES),
    "q5_1": (_SCALE, _OFFSET, _FIFTH_BITS, _NIBBLES),
    "q8_0": (_SCALE, Bits("codes", 32, 8, 1, flip=128)),
    "iq4_nl": (_SCALE, _NIBBLES),
    "iq4_xs": (
        _SCALE, Bits("ranges", 8, 2, 4, shift=4), Bits("ranges", 8, 4, 2), Bits("codes", 256, 4, 32),
    ),
    "q2_k": (Bits("ranges", 32, 4, 32), Bits("codes", 256, 2, 128), _SCALE, _OFFSET),
    "q3_k": (
        Bits("codes", 256, 1, 256, shift=2), Bits("codes", 256, 2, 128),
        Bits("ranges", 16, 4, 16), Bits("ranges", 16, 2, 16, shift=4), _SCALE,
    ),
    "q4_k": (_SCALE, _OFFSET, SixBitPairs("ranges"), Bits("codes", 256, 4, 64)),
    "q5_k": (
        _SCALE, _OFFSET, SixBitPairs("ranges"), Bits("codes", 256, 1, 256, shift=4), Bits("codes", 256, 4, 64),
    ),
    "q6_k": (
        Bits("codes", 256, 4, 128), Bits("codes", 256, 2, 128, shift=4), Bits("ranges", 16, 8, 1, flip=128), _SCALE,
    ),
}  # fmt: skip


def write_blocks(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The bytes of blocks of this type, uint8 [rows, blocks, bytes of a block], from its parts [rows, blocks, count].

    The values must fit in their bits.
    """
    fields = BLOCKS[name]
    rows, blocks = parts["codes"].shape[:2]
    raw = torch.empty(rows, blocks, sum(field.nbytes for field in fields), dtype=torch.uint8)
    for field, room in zip(fields, raw.split([field.nbytes for field in fields], dim=-1), strict=True):
        field.put(parts[field.part], room)
    return raw


def read_blocks(name: str, raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of blocks of this type, [rows, blocks, count] each; ``raw`` as `write_blocks` returns it."""
    fields = BLOCKS[name]
    parts: dict[str, torch.Tensor] = {}
    for field, room in zip(fields, raw.split([field.nbytes for field in fields], dim=-1), strict=True):
        if field.part not in parts:
            parts[field.part] = torch.zeros(*raw.shape[:2], field.count, dtype=field.dtype)
        field.get(room, parts[field.part])
    return parts
