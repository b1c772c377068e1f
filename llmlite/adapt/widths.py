"""Which FFN channels and key/value heads of a layer stay: those whose part in the layer's output weighs most.

An FFN channel weighs its mean squared activation times the squared length of its column of the down projection; a
key/value head the mean squared length of what the output projection makes of the queries that share it. What is left
out is made good by the rest as far as it is a linear function of it (least squares over the calibration text), where
there is text enough and held-out rows say that the output came nearer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from llmlite.quantize.types import Moments

ENOUGH = 16  # calibration tokens for each channel of a matrix, below which least squares fits noise
RIDGE = 0.01  # added to the moments' diagonal, as a share of its mean
DOWN, OUTPUT = "mlp.down_proj.weight", "self_attn.o_proj.weight"

Ordering = Literal["activation", "magnitude", "random"]


@dataclass(frozen=True)
class Kept:
    """The FFN channels and key/value heads of one layer that stay, int64, rising.

    ``ffn_importance``: their share of all channels' importance; ``weights``: output projections that were made good,
    by their names in a layer, in the teacher's width; ``errors``: the held-out squared error of each with that, as a
    share of the error without.
    """

    ffn: torch.Tensor
    kv_heads: torch.Tensor
    ffn_importance: float = 1.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """An output projection [out, in] of a layer and the moments of its inputs."""

    weight: torch.Tensor
    moments: Moments


def ffn_importance(down: Part) -> torch.Tensor:
    """float32 [channels]."""
    return down.moments.xxt.diagonal() * down.weight.square().sum(0)


def head_importance(output: Part, kv_heads: int) -> torch.Tensor:
    """float32 [kv_heads]."""
    width = output.weight.shape[1] // kv_heads
    found = []
    for start in range(0, output.weight.shape[1], width):
        part = slice(start, start + width)
        weight = output.weight[:, part]
        found.append(((weight @ output.moments.xxt[part, part]) * weight).sum())
    return torch.stack(found)


def best(importance: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the ``count`` largest, rising."""
    return importance.topk(count).indices.sort().values


def channels_of(heads: torch.Tensor, width: int) -> torch.Tensor:
    """The channels of these heads, ``width`` to each."""
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()


def least_squares(xxt: torch.Tensor, xyt: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """W [in, out] for which x W comes nearest to y, from sums of x xT [in, in] and x yT [in, out]; None without one.

    ``ridge``: what is added to the diagonal, as a share of its mean.
    """
    damped = xxt.clone()
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else torch.cholesky_solve(xyt, factor)


def made_good(part: Part, kept: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """The weight [out, in] whose columns ``kept`` stand in for the others, and its error's share; None where the text
    is too short or no output channel gains on held-out tokens.
    """
    moments, weight = part.moments, part.weight
    if moments.count < ENOUGH * len(moments.xxt) or moments.held is None:
        return None
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    found = least_squares(moments.xxt[kept][:, kept], moments.xxt[kept][:, gone] @ weight[:, gone].T, RIDGE)
    if found is None:
        return None
    stand_in = found.T
    plain, repaired = torch.zeros_like(weight), torch.zeros_like(weight)
    plain[:, gone] = repaired[:, gone] = -weight[:, gone]
    repaired[:, kept] = stand_in
    before, after = (((change @ moments.held.xxt) * change).sum(1) for change in (plain, repaired))
    gains = after < before
    if not gains.any():
        return None
    new = weight.clone()
    new[:, kept] += torch.where(gains[:, None], stand_in, 0)
    return new, float(torch.where(gains, after, before).sum() / before.sum())


def choose(down: Part, output: Part, ffn: int, kv_heads: tuple[int, int], scores: dict[str, torch.Tensor]) -> Kept:
    """What one layer keeps: ``ffn`` channels, and ``kv_heads`` (of, all).

    ``scores`` stands in for the importance under "ffn", as other orderings do; nothing is made good then.
    """
    some, all_heads = kv_heads
    importance = scores["ffn"].to(down.weight.device) if scores else ffn_importance(down)
    channels = best(importance, ffn)
    heads = best(head_importance(output, all_heads), some)
    share = float(importance[channels].sum() / importance.sum())
    weights, errors = {}, {}
    width = output.weight.shape[1] // all_heads
    wanted = [(DOWN, down, channels, ffn), (OUTPUT, output, channels_of(heads, width), some * width)]
    for name, part, kept, count in wanted:
        found = made_good(part, kept) if count < part.weight.shape[1] and not scores else None
        if found is not None:
            weights[name], errors[name] = found[0].cpu(), found[1]
    return Kept(channels.cpu(), heads.cpu(), share, weights, errors)
