"""Linear layers on a grid that can be trained: their scales and minimums, and where asked their codes too.

Trained scales are relative changes of what the file holds, zero at first. Trained codes are real numbers in units of
the scale, rounded in the forward pass; their slope is that of the rounded number (the straight-through estimator,
Bengio et al. 2013). In these units one rate suits every weight, and a change of a scale changes no code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter

from llmlite.errors import OutsideError
from llmlite.quantize.grid import inverse, steps_of
from llmlite.quantize.types import Grid, Ranges, Rounded

EDGE = 0.48  # how far from a code's own value a latent may begin: at 0.5 it would be rounded to the next one


def factors_of(rounded: Rounded) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The real numbers that scales and minimums are multiples of, [out, groups] or [out, super-blocks]."""
    ranges = rounded.ranges
    if ranges.d is not None:
        return ranges.d, ranges.dmin
    return ranges.scales, None if rounded.grid.zero == "integer" else ranges.offsets


def stored_factor(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Factors as the file keeps them, float32; `OutsideError` where it can't."""
    dtype = torch.float16 if grid.super_block is not None else grid.scale_dtype
    kept = values.to(dtype).float()
    if not torch.isfinite(kept).all():
        raise OutsideError(
            f"trained scales are not finite in {dtype}, so training stopped and nothing was kept; a lower --rate may "
            "be right"
        )
    return kept


def with_factors(rounded: Rounded, scale: torch.Tensor, offset: torch.Tensor | None) -> Rounded:
    """The same codes with other factors (as `factors_of` gives them), rounded as the file keeps them."""
    scale = stored_factor(scale, rounded.grid)
    offset = None if offset is None else stored_factor(offset, rounded.grid)
    old = rounded.ranges
    if old.d is None:
        return replace(rounded, ranges=Ranges(scale, old.offsets if offset is None else offset))
    scales = _multiples(scale, old.scale_codes)
    offsets = None if offset is None else _multiples(-offset, old.offset_codes)
    return replace(rounded, ranges=replace(old, scales=scales, offsets=offsets, d=scale, dmin=offset))


def _multiples(factor: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
    """Factors [out, super-blocks] times the codes of their groups [out, groups]; the factors where there are none."""
    return factor if codes is None else factor.repeat_interleave(codes.shape[1] // factor.shape[1], dim=1) * codes


class RoundedLinear(torch.nn.Module):
    """A linear layer [out, in] with fixed codes, whose products are in ``dtype``; its factors are trained by relative
    changes.

    In memory lie the codes' steps [out, in], groups beside each other (whole numbers but for a codebook of others),
    and not the weight, which each pass makes anew.
    """

    steps: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    scale_codes: torch.Tensor | None
    offset_codes: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, rounded: Rounded, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        ranges, grid = rounded.ranges, rounded.grid
        self._rounded = rounded  # what the file holds beside what is trained
        order = None if rounded.group_index is None else rounded.group_index.argsort(stable=True)
        codes = rounded.codes if order is None else rounded.codes[:, order]
        self.register_buffer("order", order)  # of input channels, where neighbours in a group are not neighbours
        groups = codes.view(*ranges.scales.shape, -1)
        zeros = None if ranges.offsets is None else ranges.offsets.unsqueeze(-1)
        steps = steps_of(groups, zeros, grid).view(codes.shape)
        self.register_buffer("steps", steps.to(_step_dtype(grid)))
        self.register_buffer("scale_codes", ranges.scale_codes)
        self.register_buffer("offset_codes", ranges.offset_codes)
        scale, offset = factors_of(rounded)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.scale_change = Parameter(torch.zeros_like(scale))
        self.offset_change = None if offset is None else Parameter(torch.zeros_like(offset))
        self.register_parameter("bias", None)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The factors as they are now, float32, not rounded."""
        scale = self.scale * (1 + self.scale_change)
        if self.offset is None or self.offset_change is None:
            return scale, None
        return scale, self.offset * (1 + self.offset_change)

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the steps are multiplied with and what is added, float32 [out, groups]."""
        scale, offset = self.factors()
        if offset is not None:
            offset = _multiples(offset if self.offset_codes is None else -offset, self.offset_codes)
        return _multiples(scale, self.scale_codes), offset

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """The weight as the file should hold it now, in the processor's memory."""
        scale, offset = (None if part is None else part.detach().cpu() for part in self.factors())
        assert scale is not None
        return with_factors(self._rounded, scale, offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x float [..., in] -> [..., out] in ``dtype``."""
        y = self.product(self.ordered(x).to(self.dtype), *self.ranges())
        return y if self.bias is None else y + self.bias.to(self.dtype)

    def product(self, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """x [..., in], channels ordered, times the weight; ``scale`` and ``offset`` as `ranges` gives them."""
        y: torch.Tensor = _Product.apply(x, scale, offset, self.steps)
        return y

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """The input channels in the order of the steps."""
        return x if self.order is None else x[..., self.order]


class TrainedLinear(RoundedLinear):
    """A linear layer whose codes are trained too: ``latent`` float32 [out, in], the steps before they are rounded.

    `prepare` makes the weight of the passes that follow, once for all of them. ValueError for codes of a codebook.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, rounded: Rounded, weight: torch.Tensor, dtype: torch.dtype):
        """``weight`` [out, in]: what was rounded. The latent begins there, or as near as is rounded to the code that
        it got, so that a code is left the sooner the worse it fits.
        """
        super().__init__(rounded, dtype)
        if rounded.grid.codebook is not None:
            raise ValueError("the codes of a codebook are not evenly spaced")
        low, high = _limits(rounded)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self._weight = torch.empty(0)
        with torch.no_grad():
            scale, offset = self.ranges()
        groups = self.ordered(weight.float()).view(*scale.shape, -1)
        wanted = (groups if offset is None else groups - offset.unsqueeze(-1)) * inverse(scale).unsqueeze(-1)
        begin = self.steps.float()
        self.latent = Parameter(begin + (wanted.view_as(begin) - begin).clamp_(-EDGE, EDGE))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The factors as the file will keep them; their slopes are those of the numbers before they are rounded."""
        scale, offset = super().factors()
        grid = self._rounded.grid
        kept = scale + (stored_factor(scale, grid) - scale).detach()
        if offset is None:
            return kept, None
        return kept, offset + (stored_factor(offset, grid) - offset).detach()

    @torch.no_grad()
    def prepare(self) -> None:
        """Round what is trained; to be called after each change of it."""
        scale, offset = self.ranges()
        groups = self.latent.view(*scale.shape, -1)
        steps = torch.minimum(torch.maximum(groups.round(), self.low), self.high)
        self.steps = steps.view_as(self.steps).to(self.steps.dtype)
        self._weight = weight_of(self.steps, scale, offset).to(self.dtype)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        self.prepare()
        kept = super().rounded()
        steps, ranges = self.steps.cpu().float(), kept.ranges
        zeros: torch.Tensor | float = 0.0 if kept.grid.zero == "minimum" else float(kept.grid.levels // 2)
        if kept.grid.zero == "integer":
            assert ranges.offsets is not None
            zeros = ranges.offsets.repeat_interleave(steps.shape[1] // ranges.offsets.shape[1], dim=1)
        codes = (steps + zeros).to(torch.uint8)
        if self.order is None:
            return replace(kept, codes=codes)
        put = torch.empty_like(codes)
        put[:, self.order.cpu()] = codes
        return replace(kept, codes=put)

    def product(self, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = _ThroughRounding.apply(x, self.latent, scale, offset, self._weight, self.steps)
        return y


def _limits(rounded: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest step of each group, float32 that broadcasts against [out, groups, in / groups]."""
    grid, offsets = rounded.grid, rounded.ranges.offsets
    lowest = torch.full((1, 1, 1), 1.0 if grid.scale_rule == "narrow" else 0.0)
    highest = torch.full((1, 1, 1), float(grid.levels - 1))
    if grid.zero == "minimum":
        return lowest, highest
    zero = torch.full((1, 1, 1), float(grid.levels // 2)) if offsets is None else offsets.unsqueeze(-1)
    return lowest - zero, highest - zero


def _step_dtype(grid: Grid) -> torch.dtype:
    """The smallest dtype that holds every step of the grid."""
    if grid.codebook is not None and any(value != round(value) for value in grid.codebook):
        return torch.float32
    return torch.int16 if grid.zero == "integer" or (grid.zero == "minimum" and grid.bits == 8) else torch.int8


class _Product(torch.autograd.Function):
    """x times the weight steps * scale + offset of [out, groups] scales; the weight is made again for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, steps: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, offset, steps)
        return x @ weight_of(steps, scale, offset).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, offset, steps = ctx.saved_tensors
        (out,) = gradients
        to_x = out @ weight_of(steps, scale, offset).to(out.dtype) if ctx.needs_input_grad[0] else None
        slope = (out.flatten(0, -2).T @ x.flatten(0, -2)).float().view(*scale.shape, -1)
        to_offset = None if offset is None else slope.sum(-1)
        return to_x, slope.mul_(steps.view_as(slope)).sum(-1), to_offset, None


class _ThroughRounding(torch.autograd.Function):
    """x times ``weight``, which was made of the latent, the scales and the offsets; slopes go through the rounding.

    A latent beyond the outermost codes has none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, latent: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None,
        weight: torch.Tensor, steps: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, latent, scale, offset, weight, steps)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, latent, scale, offset, weight, steps = ctx.saved_tensors
        (out,) = gradients
        to_x = out @ weight if ctx.needs_input_grad[0] else None
        slope = (out.flatten(0, -2).T @ x.flatten(0, -2)).float().view(*scale.shape, -1)
        to_offset = None if offset is None else slope.sum(-1)
        to_scale = (slope * steps.view_as(slope)).sum(-1)
        inside = (latent - steps).abs_() <= 0.5
        to_latent = slope.mul_(scale.unsqueeze(-1)).view_as(latent).mul_(inside)
        return to_x, to_latent, to_scale, to_offset, None, None


def weight_of(steps: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """steps * scale + offset, float32 [out, in], of scales and offsets [out, groups]."""
    weight = steps.view(*scale.shape, -1) * scale.unsqueeze(-1)
    if offset is not None:
        weight += offset.unsqueeze(-1)
    return weight.view(steps.shape)
