"""What the solvers take and give: the grid, the moments of a layer's inputs, and the rounded weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

ZeroPoint = Literal["symmetric", "integer", "minimum"]
ScaleRule = Literal["half", "signed", "narrow"]


@dataclass(frozen=True)
class IntegerGrid:
    """Evenly spaced values for each group of neighbouring input channels.

    Codes q are unsigned, 0 to 2**bits - 1, whatever the file format stores:

    - ``symmetric``: w = scale * (q - 2**(bits - 1))
    - ``integer``:   w = scale * (q - zero), zero an integer code
    - ``minimum``:   w = scale * q + minimum, a real number (llama.cpp's Q4_1)

    ``group`` counts input channels that share a scale; None means one scale per output channel.
    ``scale_rule`` says how a symmetric scale follows from the largest magnitude m of a group:
    ``half`` m / (2**bits - 1) * 2 (GPTQ, compressed-tensors), ``signed`` the extreme value, sign kept,
    lands on code 0 (llama.cpp's Q4_0; the scale may be negative), ``narrow`` m / (2**(bits - 1) - 1)
    (llama.cpp's Q8_0).
    ``scale_dtype`` is what the file keeps: scales and minimums are rounded to it before any code is chosen.
    """

    bits: int
    group: int | None
    zero: ZeroPoint = "symmetric"
    scale_dtype: torch.dtype = torch.float16
    scale_rule: ScaleRule = "half"

    @property
    def levels(self) -> int:
        return 2**self.bits

    def groups(self, width: int) -> int:
        """How many groups a row of ``width`` input channels has; the width must divide."""
        if self.group is None:
            return 1
        if width % self.group:
            raise ValueError(f"a width of {width} does not divide into groups of {self.group}")
        return width // self.group


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear layer's inputs over the calibration tokens.

    ``xxt``: sum over tokens of x xT, float32 [in, in]; ``absmax``: largest magnitude per channel,
    float32 [in]; ``count``: tokens summed.
    """

    xxt: torch.Tensor
    absmax: torch.Tensor
    count: int


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid.

    ``codes`` uint8 [out, in], in the original channel order; ``scales`` float32 [out, groups];
    ``offsets`` float32 [out, groups]: zero points (whole numbers) or minimums, None on a symmetric grid;
    ``group_index`` int64 [in]: the group of each channel, None when it is channel // group;
    ``error``: tr(E M ET) / tr(W M WT), with M = xxt, or the identity without moments.
    """

    grid: IntegerGrid
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group_index: torch.Tensor | None
    error: float

    def cpu(self) -> Rounded:
        """The same in the processor's memory."""
        offsets = None if self.offsets is None else self.offsets.cpu()
        index = None if self.group_index is None else self.group_index.cpu()
        return Rounded(self.grid, self.codes.cpu(), self.scales.cpu(), offsets, index, self.error)

    def dequantize(self) -> torch.Tensor:
        """The weight that a reader of the file will see, float32 [out, in]."""
        width = self.codes.shape[1]
        index = self.group_index
        if index is None:
            index = torch.arange(width, device=self.codes.device) // (self.grid.group or width)
        scales = self.scales[:, index]
        codes = self.codes.float()
        if self.grid.zero == "minimum":
            assert self.offsets is not None
            return codes * scales + self.offsets[:, index]
        if self.grid.zero == "integer":
            assert self.offsets is not None
            return (codes - self.offsets[:, index]) * scales
        return (codes - self.grid.levels // 2) * scales
