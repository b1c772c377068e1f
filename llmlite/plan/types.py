"""For each format, what a tensor can become: its types, their sizes and why one does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmlite.checkpoint.safetensors_index import NAMES
from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.formats.bitsandbytes import BitsAndBytes
from llmlite.formats.compressed_tensors import PackQuantized
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gptq import Gptq
from llmlite.plan.target import Target
from llmlite.quantize.types import Grid


class TypeTable(Protocol):
    """The types of one target: of the linear layers, the head (or an embedding tied to it), the embedding, the rest."""

    @property
    def linear(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def embedding(self) -> str: ...
    @property
    def rounded(self) -> frozenset[str]: ...
    @property
    def bits(self) -> int | None: ...

    def other(self, shape: tuple[int, ...]) -> str: ...
    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None: ...
    def nbytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int: ...


@dataclass(frozen=True)
class GgufTypes:
    """GGUF: one-dimensional tensors are f32; with a 4-bit type the head stays at q8_0.

    (llama-quantize keeps it at q6_K, and at q8_0 where 256 does not divide the width.)
    """

    linear: str
    rounded = frozenset(name for name, kind in gguf.TYPES.items() if kind.grid is not None)

    @property
    def head(self) -> str:
        return "q8_0" if self.linear in ("q4_0", "q4_1") else self.linear

    @property
    def embedding(self) -> str:
        return self.linear

    @property
    def bits(self) -> int | None:
        return gguf.grid_of(self.linear).bits if self.linear in self.rounded else None

    def other(self, shape: tuple[int, ...]) -> str:
        return "f32" if len(shape) == 1 else self.linear

    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None:
        return gguf.refusal(kind, shape)

    def nbytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        return gguf.nbytes(kind, shape)


@dataclass(frozen=True)
class SafetensorsTypes:
    """Linear layers in the format's type, everything else in ``dtype``."""

    linear: str
    format: PackQuantized | Gptq | BitsAndBytes
    dtype: torch.dtype
    grid: Grid | None

    @property
    def head(self) -> str:
        return NAMES[self.dtype].lower()

    @property
    def embedding(self) -> str:
        return self.head

    @property
    def rounded(self) -> frozenset[str]:
        return frozenset({self.linear})

    @property
    def bits(self) -> int | None:
        return None if self.grid is None else self.grid.bits

    def other(self, shape: tuple[int, ...]) -> str:
        return self.head

    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None:
        if kind != self.linear:
            return None
        rows, width = shape
        if isinstance(self.format, BitsAndBytes):
            return self.format.refusal((rows, width))
        assert self.grid is not None
        return self.format.refusal(self.grid, (rows, width))

    def layout(self, module: str, kind: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that hold one weight."""
        if kind != self.linear:
            return {f"{module}.weight": TensorSpec(self.dtype, shape)}
        rows, width = shape
        if isinstance(self.format, BitsAndBytes):
            return self.format.layout(module, (rows, width))
        assert self.grid is not None
        return self.format.layout(module, self.grid, (rows, width))

    def nbytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        return sum(spec.nbytes for spec in self.layout(name.removesuffix(".weight"), kind, shape).values())


def type_table(target: Target, dtype: torch.dtype, act_order: str) -> GgufTypes | SafetensorsTypes:
    """The types of a target; ``dtype`` is that of a safetensors artifact's other tensors."""
    if target.format == "gguf":
        return GgufTypes(target.type)
    if target.format == "bnb":
        return SafetensorsTypes(
            target.type, BitsAndBytes("nf4" if target.type == "nf4" else "int8", dtype), dtype, None
        )
    packed: PackQuantized | Gptq
    packed = Gptq(dtype, act_order == "group") if target.format == "gptq" else PackQuantized(dtype)
    return SafetensorsTypes(target.type, packed, dtype, target.grid(packed.scale_dtype))
