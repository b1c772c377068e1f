"""For each format, what a tensor can become: its types, their sizes and why one does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.safetensors_index import NAMES
from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.errors import InputError
from llmlite.formats.bitsandbytes import BitsAndBytes
from llmlite.formats.compressed_tensors import PackQuantized
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.writer import QUANTIZATION_VERSION, Value
from llmlite.formats.gptq import Gptq
from llmlite.formats.int_quantized import IntQuantized
from llmlite.plan.order import working_order
from llmlite.plan.presets import asked_and_given, find_preset
from llmlite.plan.rules import TypeRule, apply_rules, parse_rules
from llmlite.plan.target import Target
from llmlite.quantize.types import Grid


class TypeTable(Protocol):
    """What the tensors of one target become."""

    @property
    def rounded(self) -> frozenset[str]: ...

    def assign(self, checkpoint: Checkpoint) -> Assigned: ...
    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None: ...
    def nbytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int: ...


@dataclass(frozen=True)
class Assigned:
    """The type of every tensor by its Hugging Face name; ``notes``: a sentence for each departure from the target."""

    types: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufTypes:
    """GGUF: what llama-quantize makes of each tensor under ``preset``, and over it what the ``rules`` say."""

    preset: str
    rules: tuple[TypeRule, ...] = ()
    rounded = frozenset(name for name, kind in gguf.TYPES.items() if kind.grid is not None)

    @property
    def metadata(self) -> dict[str, Value]:
        """What llama-quantize notes in the file about its types."""
        return {
            "general.file_type": find_preset(self.preset).ftype,
            "general.quantization_version": QUANTIZATION_VERSION,
        }

    def assign(self, checkpoint: Checkpoint) -> Assigned:
        """`InputError` for a rule that matches nothing, or a tensor that GGUF has no place for."""
        table = asked_and_given(checkpoint, self.preset)
        shapes = {name: checkpoint.tensors[name].shape for name in table}
        chosen = apply_rules(self.rules, shapes, checkpoint.source)
        moved = Counter(pair for name, pair in table.items() if pair[0] != pair[1] and name not in chosen)
        notes = tuple(
            f"{given} in place of {asked} for {count} of {len(table)} tensors: blocks of {gguf.TYPES[asked].block} do "
            "not divide their width (as in llama-quantize)"
            for (asked, given), count in moved.items()
        )
        return Assigned({name: given for name, (_, given) in table.items()} | chosen, notes)

    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None:
        return gguf.refusal(kind, shape)

    def nbytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        return gguf.nbytes(kind, shape)


@dataclass(frozen=True)
class SafetensorsTypes:
    """Linear layers in the format's type, everything else in ``dtype``."""

    linear: str
    format: PackQuantized | IntQuantized | Gptq | BitsAndBytes
    dtype: torch.dtype
    grid: Grid | None

    @property
    def rounded(self) -> frozenset[str]:
        return frozenset({self.linear})

    def assign(self, checkpoint: Checkpoint) -> Assigned:
        kept = NAMES[self.dtype].lower()
        linears = {f"{name}.weight" for name in checkpoint.family.linears}
        names = working_order(checkpoint)
        is_linear = {name: name.startswith(LAYER) and name.split(".", 3)[3] in linears for name in names}
        return Assigned({name: self.linear if linear else kept for name, linear in is_linear.items()})

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


def type_table(
    target: Target, dtype: torch.dtype, desc_act: bool, rules: Iterable[str] = ()
) -> GgufTypes | SafetensorsTypes:
    """The types of a target; ``dtype`` is that of a safetensors artifact's other tensors.

    ``rules``: PATTERN=TYPE, the pattern a regular expression on the Hugging Face tensor name, the last match wins;
    `InputError` for a malformed one, and for any with a target that is not GGUF's.
    """
    parsed = parse_rules(rules)
    if target.format == "gguf":
        return GgufTypes(target.type, parsed)
    if parsed:
        raise InputError(f"types {parsed[0].pattern}={parsed[0].type}: {target} has one type for all; gguf has many")
    if target.format == "bnb":
        return SafetensorsTypes(
            target.type, BitsAndBytes("nf4" if target.type == "nf4" else "int8", dtype), dtype, None
        )
    packed: PackQuantized | IntQuantized | Gptq
    if target.format == "gptq":
        packed = Gptq(dtype, desc_act)
    else:
        packed = IntQuantized(dtype) if target.type == "w8a8" else PackQuantized(dtype)
    return SafetensorsTypes(target.type, packed, dtype, target.grid(packed.scale_dtype))
