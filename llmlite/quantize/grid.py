"""Fit a grid to a weight, and put values on it."""

from __future__ import annotations

import torch

from llmlite.quantize.types import Grid, Ranges, values_of

# Shares of the full range that are tried of 16 levels or fewer. Finer grids try those between too, all closer to 1.
SHRINK = (1.0, 1.1, 1.05, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.63, 0.58, 0.52)
BETWEEN = (1.075, 1.03, 0.98, 0.94, 0.9, 0.86, 0.82)
# Where a range with a minimum stays as it shrinks: its middle, its low end, its high end. On a symmetric grid whose
# codes reach farther on one side the first puts the extreme weight there, and the last on the shorter side.
ANCHORS = (0.5, 0.0, 1.0)
REFINEMENTS = 2  # rounds in which a super-block's whole-number scales and its own scales are chosen again

Pair = tuple[torch.Tensor, torch.Tensor | None]  # scales and offsets


def fit(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Ranges:
    """The ranges for a weight float32 [out, in], rounded as the file keeps them.

    Without importance each group's extremes are its range. With importance (float32 [in], at least zero) the scales
    minimize the weighted squared rounding error: several shares of the full range are tried, for each the scale (and
    minimum) that fits its codes best in closed form, and the best is kept, group by group. A super-block's scales are
    always searched for, with equal importance where none is given.
    """
    rows, width = weight.shape
    groups = weight.reshape(rows, grid.groups(width), -1)
    if importance is None and grid.super_block is None:
        low, high = groups.amin(-1), groups.amax(-1)
        return Ranges(*_from_range(low, high, 1.0, grid))
    if importance is None:
        importance = weight.new_ones(width)
    share = (importance / importance.mean().clamp(min=1e-30)).reshape(groups.shape[1], -1)
    scales, offsets = _search(groups, share, grid)
    if grid.super_block is None:
        return Ranges(scales, offsets)
    return _refined(groups, share, _super_block_ranges(scales, offsets, grid), grid)


def _search(groups: torch.Tensor, share: torch.Tensor, grid: Grid) -> Pair:
    """The best scale and offset of each group [out, groups]; not rounded to whole numbers where super-blocks will."""
    low, high = groups.amin(-1), groups.amax(-1)
    kept = _from_range(low, high, 1.0, grid)
    best = _weighted_error(groups, codes_of(groups, kept[0][..., None], _column(kept[1]), grid), *kept, share, grid)
    shares = SHRINK if grid.levels <= 16 else SHRINK + BETWEEN
    for anchor in _anchors(grid):
        for share_of_16 in shares if anchor == ANCHORS[0] else shares[3::2]:
            shrink = 1 - (1 - share_of_16) * min(1, (16 / grid.levels) ** 0.5)
            start = _from_range(low, high, shrink, grid, anchor)
            codes = codes_of(groups, start[0][..., None], _column(start[1]), grid)
            scale, offset = least_squares(groups, codes, share, start, grid)
            scale, offset = stored(scale, grid), _stored_offset(offset, grid)
            error = _weighted_error(groups, codes, scale, offset, share, grid)
            better = error < best
            best = torch.where(better, error, best)
            kept = _choose(better, (scale, offset), kept)
    return kept


def _anchors(grid: Grid) -> tuple[float, ...]:
    """Those of `ANCHORS` that differ on this grid."""
    if grid.zero == "minimum":
        return ANCHORS
    if grid.codebook is not None:
        lopsided = grid.codebook[0] != -grid.codebook[-1]
    else:
        lopsided = grid.zero == "symmetric" and _signed(grid)
    return (ANCHORS[0], ANCHORS[-1]) if lopsided else ANCHORS[:1]


def _signed(grid: Grid) -> bool:
    """Scales may be negative, so that either end of the codes can be the extreme weight's."""
    return grid.scale_rule == "signed" or (grid.super_block is not None and grid.super_block.signed)


def _from_range(low: torch.Tensor, high: torch.Tensor, shrink: float, grid: Grid, anchor: float = 0.5) -> Pair:
    """Scale and offset for ``shrink`` times the range, which keeps the place ``anchor`` of it (0 its low end)."""
    steps = grid.levels - 1
    if grid.zero == "minimum":
        if grid.super_block is not None:  # minimums there are not above zero
            low = low.clamp(max=0)
        width = high - low
        return stored(width * shrink / steps, grid), _stored_offset(low + width * (1 - shrink) * anchor, grid)
    if grid.zero == "integer":  # the range must hold zero, so that a zero weight stays zero
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = stored((high - low) / steps, grid)
        return scale, torch.clamp(torch.round(-low * inverse(scale)), 0, steps)
    extreme = torch.where(high.abs() > low.abs(), high, low)
    if grid.codebook is not None:
        first, last = grid.codebook[0], grid.codebook[-1]
        if first == -last:  # the same on both sides: scales are magnitudes
            return stored(extreme.abs() * shrink / last, grid), None
        return stored(extreme * shrink / (first if (-first > last) == (anchor < 1) else last), grid), None
    if _signed(grid):
        end = grid.levels // 2 - 1 if anchor == 1 else -(grid.levels // 2)
        return stored(extreme * shrink / end, grid), None
    divisor = steps / 2 if grid.scale_rule == "half" else grid.levels // 2 - 1
    return stored(extreme.abs() * shrink / divisor, grid), None


def stored(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scales as the file keeps them, float32; a super-block's are rounded later, together."""
    if grid.super_block is not None:
        return values
    top = torch.finfo(grid.scale_dtype).max
    return values.clamp(-top, top).to(grid.scale_dtype).float()


def _stored_offset(offset: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    if offset is None or grid.zero == "integer":
        return offset
    return offset.clamp(max=0) if grid.super_block is not None else stored(offset, grid)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0: a group of zeros, or one too small for the scale's dtype."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def steps_of(codes: torch.Tensor, offset: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """What each code counts before it is multiplied by the scale, float32; the minimum is not part of it."""
    if grid.zero == "minimum":
        return codes.float()
    return values_of(codes, torch.ones((), device=codes.device), offset, grid)


def least_squares(groups: torch.Tensor, codes: torch.Tensor, share: torch.Tensor, start: Pair, grid: Grid) -> Pair:
    """The scale (and minimum) [out, groups] that put the codes closest to the weights; ``start`` where nothing does."""
    scale, offset = start
    steps = steps_of(codes, _column(offset), grid)
    weighted = steps * share
    size, match = (weighted * steps).sum(-1), (weighted * groups).sum(-1)
    if grid.zero != "minimum":
        return torch.where(size > 0, match / size.clamp(min=1e-30), scale), offset
    assert offset is not None
    total, lean = share.sum(-1).expand_as(size), weighted.sum(-1)
    level = (groups * share).sum(-1)
    spread = total * size - lean * lean
    fits = spread > 1e-6 * total * size
    spread = torch.where(fits, spread, torch.ones_like(spread))
    slope = torch.where(fits, (total * match - lean * level) / spread, scale)
    minimum = torch.where(fits, (size * level - lean * match) / spread, offset)
    if grid.super_block is not None:  # no minimum above zero, no scale below
        over = minimum > 0
        slope = torch.where(over & (size > 0), match / size.clamp(min=1e-30), slope).clamp(min=0)
        minimum = minimum.clamp(max=0)
    return slope, minimum


def _super_block_ranges(scales: torch.Tensor, offsets: torch.Tensor | None, grid: Grid) -> Ranges:
    """Scales (and minimums) [out, groups] as whole numbers times a float16 scale of their super-block."""
    block = grid.super_block
    assert block is not None
    low, high = block.scale_range
    parts = scales.reshape(len(scales), -1, block.groups)
    if block.signed:
        extreme = torch.where(parts.amax(-1) > -parts.amin(-1), parts.amax(-1), parts.amin(-1))
        d = half(extreme / low)
    else:
        d = half(parts.amax(-1) / high)
    scale_codes = (parts * inverse(d)[..., None]).round().clamp(low, high)
    if offsets is None:
        return super_ranges(d, scale_codes, None, None)
    assert block.offset_bits is not None
    top = 2**block.offset_bits - 1
    lows = -offsets.reshape_as(parts)
    dmin = half(lows.amax(-1) / top)
    offset_codes = (lows * inverse(dmin)[..., None]).round().clamp(0, top)
    return super_ranges(d, scale_codes, dmin, offset_codes)


def super_ranges(
    d: torch.Tensor, scale_codes: torch.Tensor, dmin: torch.Tensor | None, offset_codes: torch.Tensor | None
) -> Ranges:
    """Ranges from the parts that a super-block keeps: d, dmin [out, supers], codes [out, supers, groups of one]."""
    rows = len(d)
    scales = (d[..., None] * scale_codes).reshape(rows, -1)
    codes = scale_codes.reshape(rows, -1).to(torch.int16)
    if dmin is None or offset_codes is None:
        return Ranges(scales, None, d, None, codes, None)
    offsets = (-dmin[..., None] * offset_codes).reshape(rows, -1)
    return Ranges(scales, offsets, d, dmin, codes, offset_codes.reshape(rows, -1).to(torch.int16))


def half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to what a float16 holds, float32."""
    return values.clamp(-65504, 65504).half().float()


def _refined(groups: torch.Tensor, share: torch.Tensor, ranges: Ranges, grid: Grid) -> Ranges:
    """Whole-number scales and the super-blocks' own scales, chosen again in turn; kept where the error falls."""
    best = _ranges_error(groups, share, ranges, grid)
    for _ in range(REFINEMENTS):
        for change in (_new_whole_numbers, _new_super_scales):
            tried = change(groups, share, ranges, grid)
            error = _ranges_error(groups, share, tried, grid)
            better = error < best
            best = torch.where(better, error, best)
            ranges = choose_super_blocks(better, tried, ranges, grid)
    return ranges


def _new_whole_numbers(groups: torch.Tensor, share: torch.Tensor, ranges: Ranges, grid: Grid) -> Ranges:
    block = grid.super_block
    assert block is not None and ranges.d is not None and ranges.scale_codes is not None
    codes = codes_of(groups, ranges.scales[..., None], _column(ranges.offsets), grid)
    scales, offsets = least_squares(groups, codes, share, (ranges.scales, ranges.offsets), grid)
    shape = (len(scales), -1, block.groups)
    low, high = block.scale_range
    scale_codes = (scales.reshape(shape) * inverse(ranges.d)[..., None]).round().clamp(low, high)
    if offsets is None:
        return super_ranges(ranges.d, scale_codes, None, None)
    assert ranges.dmin is not None and block.offset_bits is not None
    offset_codes = (
        (-offsets.reshape(shape) * inverse(ranges.dmin)[..., None]).round().clamp(0, 2**block.offset_bits - 1)
    )
    return super_ranges(ranges.d, scale_codes, ranges.dmin, offset_codes)


def _new_super_scales(groups: torch.Tensor, share: torch.Tensor, ranges: Ranges, grid: Grid) -> Ranges:
    block = grid.super_block
    assert block is not None and ranges.d is not None and ranges.scale_codes is not None
    rows = len(groups)
    codes = codes_of(groups, ranges.scales[..., None], _column(ranges.offsets), grid)
    whole = ranges.scale_codes.float()
    slopes = (steps_of(codes, None, grid) * whole[..., None]).reshape(rows, ranges.d.shape[1], -1)
    goal = groups.reshape_as(slopes)
    weights = share.reshape(ranges.d.shape[1], -1)
    size, match = (slopes * slopes * weights).sum(-1), (slopes * goal * weights).sum(-1)
    shape = (rows, -1, block.groups)
    if ranges.offset_codes is None or ranges.dmin is None:
        d = torch.where(size > 0, half(match / size.clamp(min=1e-30)), ranges.d)
        return super_ranges(d, whole.reshape(shape), None, None)
    lows = -ranges.offset_codes.float()[..., None].expand_as(groups).reshape_as(slopes)
    low_size, low_match = (lows * lows * weights).sum(-1), (lows * goal * weights).sum(-1)
    both = (lows * slopes * weights).sum(-1)
    spread = size * low_size - both * both
    fits = spread > 1e-6 * size * low_size
    spread = torch.where(fits, spread, torch.ones_like(spread))
    d = torch.where(fits, half((low_size * match - both * low_match) / spread), ranges.d).clamp(min=0)
    dmin = torch.where(fits, half((size * low_match - both * match) / spread), ranges.dmin).clamp(min=0)
    return super_ranges(d, whole.reshape(shape), dmin, ranges.offset_codes.float().reshape(shape))


def choose_super_blocks(first: torch.Tensor, one: Ranges, other: Ranges, grid: Grid) -> Ranges:
    """``one`` for the super-blocks where ``first`` bool [out, super-blocks] is true, else ``other``."""
    assert grid.super_block is not None
    groups = first.repeat_interleave(grid.super_block.groups, 1)
    picks = (groups, groups, first, first, groups, groups)
    pairs = zip(picks, one.tensors(), other.tensors(), strict=True)
    return Ranges(*(None if a is None or b is None else torch.where(p, a, b) for p, a, b in pairs))  # type: ignore[arg-type]


def _ranges_error(groups: torch.Tensor, share: torch.Tensor, ranges: Ranges, grid: Grid) -> torch.Tensor:
    """The weighted error of each super-block, float32 [out, super-blocks]."""
    codes = codes_of(groups, ranges.scales[..., None], _column(ranges.offsets), grid)
    error = _weighted_error(groups, codes, ranges.scales, ranges.offsets, share, grid)
    assert grid.super_block is not None
    return error.reshape(len(groups), -1, grid.super_block.groups).sum(-1)


def _weighted_error(
    groups: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    share: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    rest = values_of(codes, scale[..., None], _column(offset), grid).sub_(groups)
    return rest.square_().mul_(share).sum(-1)


def _choose(first: torch.Tensor, one: Pair, other: Pair) -> Pair:
    offset = None if one[1] is None or other[1] is None else torch.where(first, one[1], other[1])
    return torch.where(first, one[0], other[0]), offset


def _column(offset: torch.Tensor | None) -> torch.Tensor | None:
    return None if offset is None else offset[..., None]


def codes_of(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """The nearest code of each weight, as whole numbers in float32; scale and offset broadcast against it."""
    if grid.codebook is not None:
        table = torch.tensor(grid.codebook, device=weight.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize((weight * inverse(scale)).contiguous(), middles).float()
    if grid.zero == "minimum":
        assert offset is not None
        codes = (weight - offset) * inverse(scale)
    else:
        codes = weight * inverse(scale) + (grid.levels // 2 if offset is None else offset)
    low = 1 if grid.scale_rule == "narrow" else 0
    return codes.round_().clamp_(low, grid.levels - 1)
