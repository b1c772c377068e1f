"""Round keys and values as a cache of a given type would store them, for caches that only store dense tensors.

The blocks are ggml's (ggml-quants.c, quantize_row_*_ref): 32 values along the head with a float16 scale, and for
the types that end in 1 a float16 minimum. llama.cpp also rotates keys and values before it rounds them where 64
divides the head's width; that is not done here, so the loss of a type is llama.cpp's only without its rotation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmlite.errors import InputError
from llmlite.evals.kv import KvTypes

BLOCK = 32
DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SIGNED = {"q8_0": 8, "q5_0": 5, "q4_0": 4}  # bits of a code; codes times a scale
WITH_MINIMUM = {"q5_1": 5, "q4_1": 4}  # codes times a scale, plus a minimum

Rounding = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rounding(kv: KvTypes) -> Rounding:
    """A function of keys and values [..., head_dim]; `InputError` for a type that can't be imitated."""
    for name in (kv.keys, kv.values):
        if name not in DENSE | SIGNED | WITH_MINIMUM:
            raise InputError(f"kv type {name}: only llama.cpp stores it; transformers can imitate q8_0 to q4_0")
    return lambda keys, values: (rounded(keys, kv.keys), rounded(values, kv.values))


def rounded(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """``tensor`` [..., width] as the type stores it, in its own dtype; the width must be a multiple of 32."""
    if kind in DENSE:
        return tensor.to(DENSE[kind]).to(tensor.dtype)
    if tensor.shape[-1] % BLOCK:
        raise InputError(f"kv type {kind}: has blocks of {BLOCK}, and this model's heads are {tensor.shape[-1]} wide")
    blocks = tensor.float().unflatten(-1, (-1, BLOCK))
    values = _signed(blocks, SIGNED[kind]) if kind in SIGNED else _with_minimum(blocks, WITH_MINIMUM[kind])
    return values.flatten(-2).to(tensor.dtype)


def _signed(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
        return (blocks * _inverse(scale)).round() * _half(scale)
    most = 1 << (bits - 1)
    # The value of largest magnitude becomes the code that only the negative side has.
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    scale = largest / -most
    return (blocks * _inverse(scale) + 0.5).floor().clamp(-most, most - 1) * _half(scale)


def _with_minimum(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    least = blocks.amin(dim=-1, keepdim=True)
    most = (1 << bits) - 1
    scale = (blocks.amax(dim=-1, keepdim=True) - least) / most
    codes = ((blocks - least) * _inverse(scale) + 0.5).floor().clamp(0, most)
    return codes * _half(scale) + _half(least)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float()
