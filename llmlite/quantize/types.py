"""What the solvers take and give: the grid, the moments of a layer's inputs, and the rounded weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

ZeroPoint = Literal["symmetric", "integer", "minimum"]
ScaleRule = Literal["half", "signed", "narrow"]


@dataclass(frozen=True)
class SuperBlock:
    """How a k-quant keeps the scales of neighbouring groups: whole numbers times one float16 scale for them all.

    ``groups`` share the float16 scale d: scale = d * code, code a whole number of ``scale_bits`` bits, signed from
    -2**(scale_bits - 1) or unsigned. With ``offset_bits`` the minimums too: offset = -dmin * code, code unsigned.
    """

    groups: int
    scale_bits: int
    signed: bool = False
    offset_bits: int | None = None

    @property
    def scale_range(self) -> tuple[int, int]:
        """The smallest and the largest scale code."""
        half = 2 ** (self.scale_bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)


@dataclass(frozen=True)
class Grid:
    """The values that each group of neighbouring input channels may take.

    Codes q are unsigned, 0 to 2**bits - 1, whatever the file format stores:

    - ``symmetric``: w = scale * (q - 2**(bits - 1)), or scale * codebook[q]
    - ``integer``:   w = scale * (q - zero), zero an integer code
    - ``minimum``:   w = scale * q + minimum, a real number (llama.cpp's Q4_1)

    ``group`` counts input channels that share a scale; None means one scale per output channel.
    ``scale_rule`` says how a symmetric scale follows from the largest magnitude m of a group:
    ``half`` m / (2**bits - 1) * 2, ``signed`` the extreme value, sign kept, lands on code 0 (llama.cpp's
    Q4_0; the scale may be negative), ``narrow`` m / (2**(bits - 1) - 1)
    (llama.cpp's Q8_0).
    ``scale_dtype`` is what the file keeps: scales and minimums are rounded to it before any code is chosen.
    ``codebook``: what the codes of a symmetric grid stand for where they are not evenly spaced, rising.
    ``super_block``: the scales (and minimums) are kept as whole numbers, not in ``scale_dtype``.
    """

    bits: int
    group: int | None
    zero: ZeroPoint = "symmetric"
    scale_dtype: torch.dtype = torch.float16
    scale_rule: ScaleRule = "half"
    codebook: tuple[float, ...] | None = None
    super_block: SuperBlock | None = None

    @property
    def levels(self) -> int:
        return 2**self.bits

    def groups(self, width: int) -> int:
        """How many groups a row of ``width`` input channels has; the width must divide."""
        if self.group is None:
            return 1
        block = self.block(width)
        if width % block:
            raise ValueError(f"a width of {width} does not divide into groups of {block}")
        return width // self.group

    def block(self, width: int) -> int:
        """Channels whose scales are chosen together: a super-block, a group, or the whole row of ``width``."""
        if self.group is None:
            return width
        return self.group * (self.super_block.groups if self.super_block else 1)


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear layer's inputs over the calibration tokens.

    ``xxt``: sum over tokens of x xT, float32 [in, in], each as weighty as an error of its output is; ``count``: tokens
    summed.
    ``cross``: sum of y xT, float32 [in, in], where y is the input that the unquantized network has in x's place; None
    where the inputs are the unquantized network's own.
    ``residual``: sum of r xT, float32 [out, in], where r is what the unquantized network's residual stream has more at
    the place where the layer's output is added to it; None for a layer that does not write there.
    ``held``: moments of other tokens of the same inputs, which no solver fits to: what is kept is judged on them.
    """

    xxt: torch.Tensor
    count: int
    cross: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    held: Moments | None = None


@dataclass(frozen=True)
class Ranges:
    """The scale of every group, and its offset: all that a reader knows of a weight beside its codes.

    ``scales`` float32 [out, groups] and ``offsets`` float32 [out, groups] (zero points, whole numbers, or minimums;
    None on a symmetric grid) are what a reader multiplies with. On a grid with super-blocks they are products:
    scales = d * scale_codes and offsets = -dmin * offset_codes, with ``d`` and ``dmin`` float32 [out, super-blocks],
    float16 values, and the codes int16 [out, groups].
    """

    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    d: torch.Tensor | None = None
    dmin: torch.Tensor | None = None
    scale_codes: torch.Tensor | None = None
    offset_codes: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Ranges:
        """The same with every tensor changed alike; all have the output channels as their first dimension."""
        return Ranges(*(None if t is None else change(t) for t in self.tensors()))  # type: ignore[arg-type]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields in order."""
        return (self.scales, self.offsets, self.d, self.dmin, self.scale_codes, self.offset_codes)


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid.

    ``codes`` uint8 [out, in], in the original channel order; ``ranges``: the scales of its groups;
    ``group_index`` int64 [in]: the group of each channel, None when it is channel // group;
    ``error``: tr(E M ET) / tr(W M WT), with M = xxt, or the identity without moments.
    """

    grid: Grid
    codes: torch.Tensor
    ranges: Ranges
    group_index: torch.Tensor | None = None
    error: float = 0.0

    @property
    def scales(self) -> torch.Tensor:
        return self.ranges.scales

    @property
    def offsets(self) -> torch.Tensor | None:
        return self.ranges.offsets

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rounded:
        """The same with the codes and ranges changed alike: moved to a device, or their rows chosen."""
        return replace(self, codes=change(self.codes), ranges=self.ranges.map(change))

    def cpu(self) -> Rounded:
        """The same in the processor's memory."""
        index = None if self.group_index is None else self.group_index.cpu()
        return replace(self.map(torch.Tensor.cpu), group_index=index)

    def dequantize(self) -> torch.Tensor:
        """The weight that a reader of the file will see, float32 [out, in]."""
        width = self.codes.shape[1]
        index = self.group_index
        if index is None:
            index = torch.arange(width, device=self.codes.device) // (self.grid.group or width)
        offsets = None if self.offsets is None else self.offsets[:, index]
        return values_of(self.codes, self.scales[:, index], offsets, self.grid)


def values_of(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """What the codes (any dtype) stand for, float32; scale and offset broadcast against them."""
    if grid.codebook is not None:
        table = torch.tensor(grid.codebook, dtype=torch.float32, device=codes.device)
        return table[codes.long()] * scale
    if grid.zero == "minimum":
        assert offset is not None
        return codes * scale + offset
    return (codes - (float(grid.levels // 2) if offset is None else offset)) * scale
