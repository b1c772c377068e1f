"""Grids, weights and moments that the tests of the solvers share."""

from __future__ import annotations

import torch

from llmlite.formats.bitsandbytes import NF4
from llmlite.formats.gguf.types import TYPES
from llmlite.quantize.types import Grid, Moments, SuperBlock

GGUF: dict[str, Grid] = {name: kind.grid for name, kind in TYPES.items() if kind.grid is not None}
SUPERS = [name for name, grid in GGUF.items() if grid.super_block is not None]
OTHER = {
    "gptq-4": Grid(4, 128, scale_rule="signed"),
    "gptq-3-asymmetric": Grid(3, 32, "integer"),
    "gptq-8-row": Grid(8, None),
    "gptq-2-row-asymmetric": Grid(2, None, "integer"),
    "compressed-4-bfloat16": Grid(4, 64, scale_dtype=torch.bfloat16, scale_rule="signed"),
    "nf4": Grid(4, 64, scale_dtype=torch.float32, codebook=NF4),
}
GRIDS: dict[str, Grid] = {**GGUF, **OTHER}
# Super-blocks small enough for a slow oracle; one of each kind.
SMALL = {
    "symmetric": Grid(4, 32, scale_rule="signed"),
    "narrow": Grid(4, 32, scale_rule="narrow"),
    "minimum": Grid(4, 32, "minimum"),
    "integer": Grid(3, 32, "integer"),
    "codebook": GGUF["iq4_nl"],
    "super-minimum": Grid(3, 16, "minimum", super_block=SuperBlock(4, 6, offset_bits=6)),
    "super-signed": Grid(3, 16, super_block=SuperBlock(4, 6, signed=True)),
    "super-codebook": Grid(4, 16, codebook=NF4, super_block=SuperBlock(4, 6, signed=True)),
}


def weights(kind: str, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random weights float32 [rows, width]: normal, student (t with 4 degrees of freedom) or positive."""
    chance = torch.Generator().manual_seed(seed)
    normal = 0.05 * torch.randn(rows, width, generator=chance)
    if kind == "student":
        return normal / (torch.randn(4, rows, width, generator=chance).square().mean(0)).sqrt()
    return normal.abs() if kind == "positive" else normal


def inputs(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs float32 [tokens, width] whose channels differ much in size."""
    chance = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, width, generator=chance) / width**0.5
    sizes = torch.logspace(-1, 0.5, width)[torch.randperm(width, generator=chance)]
    common = torch.randn(tokens, 3, generator=chance) @ torch.randn(3, width, generator=chance)
    return (torch.randn(tokens, width, generator=chance) @ (torch.eye(width) + 0.7 * basis) + 0.5 * common) * sizes


def moments_of(x: torch.Tensor, y: torch.Tensor | None = None, held: torch.Tensor | None = None) -> Moments:
    """The moments of inputs [tokens, width], of the unquantized network's ``y`` beside them, and of tokens held out."""
    cross = None if y is None else y.T @ x
    judge = None if held is None else moments_of(held)
    return Moments(x.T @ x, len(x), cross, held=judge)


def matrix_of(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Damped moments float32 [width, width]."""
    xxt = moments_of(inputs(width, tokens, seed)).xxt
    return xxt + 0.01 * xxt.diagonal().mean() * torch.eye(width)


def row_losses(target: torch.Tensor, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """e M eT of each row in float64."""
    rest = values.double() - target.double()
    return ((rest @ matrix.double()) * rest).sum(-1)
