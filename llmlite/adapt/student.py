"""The model that a GGUF file holds, with everything trainable that is a real number in it and no code.

Trained are relative changes, zero at first: of the float16 scales and minimums of linear layers (d and dmin of super-
blocks), of the norms' gains, and of biases in units of their root mean square. Codes and whole-number scales stay, as
do the embedding and the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint as recomputed

from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.checkpoint import Checkpoint, expected_shapes
from llmlite.checkpoint.families import EMBEDDING, HEAD
from llmlite.checkpoint.gguf_header import GgufTensor, read_gguf
from llmlite.errors import InputError
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.metadata import full_config, head_dim
from llmlite.quantize.types import Ranges, Rounded, values_of

Values = dict[str, tuple[torch.Tensor | None, ...]]


def factors_of(rounded: Rounded) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float16 values that scales and minimums are multiples of, [out, groups] or [out, super-blocks]."""
    ranges = rounded.ranges
    return (ranges.scales, ranges.offsets) if ranges.d is None else (ranges.d, ranges.dmin)


def with_factors(rounded: Rounded, scale: torch.Tensor, offset: torch.Tensor | None) -> Rounded:
    """The same codes with other factors (as `factors_of` gives them), rounded to float16."""
    scale = scale.half().float()
    offset = None if offset is None else offset.half().float()
    old = rounded.ranges
    if old.d is None:
        return replace(rounded, ranges=Ranges(scale, offset))
    scales = _multiples(scale, old.scale_codes)
    offsets = None if offset is None else _multiples(-offset, old.offset_codes)
    return replace(rounded, ranges=replace(old, scales=scales, offsets=offsets, d=scale, dmin=offset))


def _multiples(factor: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
    """Factors [out, super-blocks] times the codes of their groups [out, groups]; the factors where there are none."""
    return factor if codes is None else factor.repeat_interleave(codes.shape[1] // factor.shape[1], dim=1) * codes


class RoundedLinear(torch.nn.Module):
    """A linear layer [out, in] with fixed codes; its float16 factors are trained by relative changes.

    In memory lie the codes' steps (int8 [out, in]) and not the weight, which each pass makes anew.
    """

    steps: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    scale_codes: torch.Tensor | None
    offset_codes: torch.Tensor | None

    def __init__(self, rounded: Rounded):
        super().__init__()
        no_offset = torch.zeros(()) if rounded.grid.zero == "minimum" else None
        steps = values_of(rounded.codes, torch.ones(()), no_offset, rounded.grid)
        self.register_buffer("steps", steps.to(torch.int8))
        self.register_buffer("scale_codes", rounded.ranges.scale_codes)
        self.register_buffer("offset_codes", rounded.ranges.offset_codes)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [..., in] -> [..., out]."""
        scale, offset = self.factors()
        if offset is not None:
            offset = _multiples(offset if self.offset_codes is None else -offset, self.offset_codes)
        y = _Product.apply(x, _multiples(scale, self.scale_codes), offset, self.steps)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x times the weight steps * scale + offset of [out, groups] scales; the weight is made again for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, steps: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, offset, steps)
        return x @ _weight(steps, scale, offset).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, offset, steps = ctx.saved_tensors
        (out,) = gradients
        to_x = out @ _weight(steps, scale, offset) if ctx.needs_input_grad[0] else None
        slope = (out.flatten(0, -2).T @ x.flatten(0, -2)).view(*scale.shape, -1)
        to_offset = None if offset is None else slope.sum(-1)
        return to_x, slope.mul_(steps.view_as(slope)).sum(-1), to_offset, None


def _weight(steps: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    weight = steps.view(*scale.shape, -1) * scale.unsqueeze(-1)
    if offset is not None:
        weight += offset.unsqueeze(-1)
    return weight.view(steps.shape)


class _Relative(torch.nn.Module):
    """A vector ``base`` + ``size`` * change; its reader subtracts ``shift`` from what the file holds."""

    base: torch.Tensor
    size: torch.Tensor

    def __init__(self, base: torch.Tensor, size: torch.Tensor, shift: float):
        super().__init__()
        self.register_buffer("base", base)
        self.register_buffer("size", size)
        self.shift = shift

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        return self.base + self.size * change - self.shift

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True)
class _Vector:
    """Where a norm's gain or a bias stands in the model."""

    module: Any
    part: str
    shift: float


class Student:
    """The transformers decoder of ``checkpoint`` with the weights of a GGUF file of it, float32, on ``device``.

    Each decoder layer's activations are made again in the backward pass. ``head`` is [vocabulary, hidden].
    `InputError` for a file that is not of this checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, file: Path, device: str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        self._linears: dict[str, RoundedLinear] = {}
        self._vectors: dict[str, _Vector] = {}
        self._order: dict[str, torch.Tensor] = {}  # gguf = hf[order], by the tensor's name in the file
        self._decoder = _skeleton(checkpoint)
        config = full_config(checkpoint.config)
        self._heads = (config["num_attention_heads"], config["num_key_value_heads"], head_dim(config))
        for name, tensor in members(checkpoint, file).items():
            if name == EMBEDDING:
                embedding = gguf.unpack(raw_bytes(tensor), tensor.type, tensor.shape)
                self._decoder.embed_tokens.weight = Parameter(embedding, requires_grad=False)
                self.head = embedding.to(device)
            elif name == HEAD:
                self.head = gguf.unpack(raw_bytes(tensor), tensor.type, tensor.shape).to(device)
            else:
                self._fill(name, tensor)
        self._decoder.to(device)
        for layer in self._decoder.layers:
            layer.forward = _recomputed(layer.forward)

    def _fill(self, name: str, tensor: GgufTensor) -> None:
        """Put one tensor of the file in its module, to be trained where it can be."""
        rows = gguf_names.gguf_rows(self.checkpoint.family, name, *self._heads)
        if rows is not None:
            self._order[tensor.name] = rows
        back = slice(None) if rows is None else rows.argsort()
        where, _, part = name.removeprefix("model.").rpartition(".")
        if gguf.TYPES[tensor.type].grid is not None:
            rounded = gguf.read(raw_bytes(tensor), tensor.type, tensor.shape).map(lambda t: t[back])
            self._linears[tensor.name] = RoundedLinear(rounded)
            self._decoder.set_submodule(where, self._linears[tensor.name])
            return
        value = gguf.unpack(raw_bytes(tensor), tensor.type, tensor.shape)[back]
        module = self._decoder.get_submodule(where)
        shift = gguf_names.norm_shift(self.checkpoint.family, name)
        setattr(module, part, Parameter(value - shift, requires_grad=False))
        if tensor.type == "f32" and value.dim() == 1:
            size = value if part == "weight" else value.square().mean().sqrt()
            module.get_parameter(part).requires_grad_()
            register_parametrization(module, part, _Relative(value, size, shift))
            self._vectors[tensor.name] = _Vector(module, part, shift)

    def vector_changes(self) -> list[Parameter]:
        """The trained changes of norms and biases."""
        return [vector.module.parametrizations[vector.part].original for vector in self._vectors.values()]

    def factor_changes(self) -> list[Parameter]:
        """The trained changes of scales and minimums."""
        linears = self._linears.values()
        return [change for m in linears for change in (m.scale_change, m.offset_change) if change is not None]

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states after the last norm, [rows, length, hidden], of token ids [rows, length]."""
        return self._decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def values(self) -> Values:
        """What the file should hold, by its names and in its order of rows, float32 and not rounded: a vector, or the
        factors of scales and of minimums (None where there are none).
        """
        found: Values = {}
        for name, vector in self._vectors.items():
            found[name] = (getattr(vector.module, vector.part) + vector.shift,)
        for name, linear in self._linears.items():
            found[name] = linear.factors()
        for name, rows in self._order.items():
            if name in found:
                found[name] = tuple(None if part is None else part[rows.to(part.device)] for part in found[name])
        return {
            name: tuple(None if p is None else p.detach().cpu().clone() for p in parts) for name, parts in found.items()
        }


def members(checkpoint: Checkpoint, file: Path) -> dict[str, GgufTensor]:
    """Hugging Face name -> tensor of the file, every one that the checkpoint has; `InputError` for a wrong one."""
    tensors = read_gguf(file).tensors
    found = {}
    for name, shape in expected_shapes(checkpoint.config, checkpoint.family, checkpoint.source).items():
        tensor = tensors.get(gguf_names.gguf_name(checkpoint.family, name))
        if tensor is None or tensor.shape != shape or tensor.type not in gguf.TYPES:
            raise InputError(
                f"{file}: has no tensor {name!r} of shape {list(shape)}: not made from {checkpoint.source}"
            )
        found[name] = tensor
    return found


def raw_bytes(tensor: GgufTensor) -> np.ndarray:
    """The tensor's bytes as the file has them, uint8 [nbytes]."""
    return np.fromfile(tensor.file, dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)


def _skeleton(checkpoint: Checkpoint) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**checkpoint.config)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):  # buffers are small, and hold rotary frequencies and scales
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().model


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return recomputed(forward, *args, use_reentrant=False, **kwargs)

    return run
