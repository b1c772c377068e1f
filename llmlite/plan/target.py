"""FORMAT:TYPE, as in ``--to compressed-tensors:w4a16g64``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from llmlite.errors import InputError
from llmlite.plan.presets import PRESETS, preset_name
from llmlite.quantize.types import Grid, ScaleRule

BNB_TYPES = ("nf4", "int8")
FORMATS = {
    "gguf": f"one of {', '.join(PRESETS)}, as llama-quantize has them, or one with -pure: every matrix in one type",
    "gptq": "w4g128 or alike: 2, 3, 4 or 8 bits, a group size (none: one scale per output channel), "
    "-asym for zero points",
    "compressed-tensors": "w4a16g128 or alike: 4 or 8 bits, a group size (none: one scale per output channel), "
    "-asym for zero points; or w8a8: the inputs of the layers in 8 bits too",
    "bnb": "nf4 or int8",
}
_WEIGHT_ONLY = {
    "gptq": re.compile(r"w(?P<bits>[2348])(g(?P<group>\d+))?(?P<asym>-asym)?"),
    "compressed-tensors": re.compile(r"w(?P<bits>[48](?=a16)|8(?=a8$))a(16(g(?P<group>\d+))?(?P<asym>-asym)?|8)"),
}


@dataclass(frozen=True)
class Target:
    """What to write: the format and its type; ``bits`` and ``group`` where the type has an integer grid."""

    format: str
    type: str
    bits: int | None = None
    group: int | None = None
    symmetric: bool = True

    def __str__(self) -> str:
        return f"{self.format}:{self.type}"

    def grid(self, scale_dtype: torch.dtype) -> Grid:
        """The grid of a gptq or compressed-tensors target, scales kept in ``scale_dtype``.

        Readers multiply by the scale, so it may be negative: the longer side of the codes, -2**(bits - 1), can then lie
        on the side of a group that reaches farther. With 256 levels that is worth nothing.
        """
        assert self.bits is not None
        rule: ScaleRule = "signed" if self.symmetric and self.bits < 8 else "half"
        return Grid(self.bits, self.group, "symmetric" if self.symmetric else "integer", scale_dtype, rule)


def parse_target(text: str) -> Target:
    """The target, or `InputError` that lists what would be right."""
    format_name, colon, type_name = text.partition(":")
    if format_name not in FORMATS or not colon:
        near = get_close_matches(format_name, FORMATS, 1)
        hint = f"; did you mean {near[0]}:...?" if near and near[0] != format_name else ""
        raise InputError(f"--to {text}: FORMAT:TYPE with FORMAT one of {', '.join(FORMATS)} is right{hint}")
    lowered = type_name.lower()
    preset = preset_name(lowered) if format_name == "gguf" else None
    if preset is not None:
        return Target(format_name, preset)
    if format_name == "bnb" and lowered in BNB_TYPES:
        return Target(format_name, lowered)
    match = _WEIGHT_ONLY[format_name].fullmatch(lowered) if format_name in _WEIGHT_ONLY else None
    if match is None or (match["group"] and int(match["group"]) == 0):
        near = get_close_matches(lowered, PRESETS, 1) if format_name == "gguf" else []
        hint = f"; did you mean gguf:{near[0]}?" if near else ""
        raise InputError(f"--to {text}: the types of {format_name} are {FORMATS[format_name]}{hint}")
    group = int(match["group"]) if match["group"] else None
    return Target(format_name, lowered, int(match["bits"]), group, match["asym"] is None)
