"""The model that an artifact holds, with everything trainable that is a real number in it, and its codes where asked.

Trained are relative changes, zero at first: of the real scales and minimums of linear layers (d and dmin of super-
blocks), of the norms' gains, and of biases in units of their root mean square. The embedding and the head stay, and
whole-number scales and zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint as recomputed

from llmlite.adapt.linears import RoundedLinear, TrainedLinear
from llmlite.adapt.stored import Stored, Value
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD
from llmlite.checkpoint.gguf_names import norm_shift
from llmlite.quantize.types import Rounded


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


class Student:
    """The transformers decoder of ``checkpoint`` with the weights of an artifact of it, float32, on ``device``.

    ``dtype``: of the products of rounded layers; ``codes``: whether their codes are trained too.
    ``recompute``: each decoder layer's activations are made again in the backward pass, and not kept. ``head`` is
    [vocabulary, hidden].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: Stored,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        codes: bool = False,
        recompute: bool = True,
    ):
        self.checkpoint, self.device, self.dtype, self._codes = checkpoint, device, dtype, codes
        self.linears: dict[str, RoundedLinear] = {}
        self._vectors: dict[str, _Vector] = {}
        self._decoder = _skeleton(checkpoint)
        for name in stored.names():
            value = stored.read(name)
            if name in (EMBEDDING, HEAD):
                outer = value.dequantize() if isinstance(value, Rounded) else value.float()
                if name == EMBEDDING:
                    self._decoder.embed_tokens.weight = Parameter(outer, requires_grad=False)
                if name == HEAD or checkpoint.tied:
                    self.head = outer.to(device)
            elif isinstance(value, Rounded):
                self._linear(name, value)
            else:
                self._dense(name, value.float())
        self._decoder.to(device)
        if recompute:
            for layer in self._decoder.layers:
                layer.forward = _recomputed(layer.forward)

    def _linear(self, name: str, rounded: Rounded) -> None:
        linear = RoundedLinear(rounded, self.dtype)
        if self._codes:
            linear = TrainedLinear(rounded, self.checkpoint.read(name), self.dtype)
        self.linears[name] = linear
        self._decoder.set_submodule(name.removeprefix("model.").removesuffix(".weight"), linear)

    def _dense(self, name: str, value: torch.Tensor) -> None:
        """Put a tensor in its module; a vector is trained."""
        where, _, part = name.removeprefix("model.").rpartition(".")
        module = self._decoder.get_submodule(where)
        setattr(module, part, Parameter(value, requires_grad=False))
        if value.dim() == 1:
            shift = norm_shift(self.checkpoint.family, name)
            base = value + shift
            size = base if part == "weight" else base.square().mean().sqrt()
            module.get_parameter(part).requires_grad_()
            register_parametrization(module, part, _Relative(base, size, shift))
            self._vectors[name] = _Vector(module, part)

    def vector_changes(self) -> dict[str, Parameter]:
        """The trained changes of norms and biases, by the names of what they change."""
        return {name: v.module.parametrizations[v.part].original for name, v in self._vectors.items()}

    def factor_changes(self) -> dict[str, Parameter]:
        """The trained changes of scales and minimums."""
        found = {f"{name}.scale": linear.scale_change for name, linear in self.linears.items()}
        offsets = {f"{name}.offset": linear.offset_change for name, linear in self.linears.items()}
        return found | {name: change for name, change in offsets.items() if change is not None}

    def latents(self) -> dict[str, Parameter]:
        """The trained codes before they are rounded; none where codes stay."""
        return {f"{name}.latent": part.latent for name, part in self.linears.items() if isinstance(part, TrainedLinear)}

    def prepare(self) -> None:
        """Round trained codes; to be called after each change of what is trained."""
        for linear in self.linears.values():
            if isinstance(linear, TrainedLinear):
                linear.prepare()

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states after the last norm, [rows, length, hidden], of token ids [rows, length]."""
        return self._decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def values(self) -> dict[str, Value]:
        """What the file should hold now: vectors, float32, and rounded weights with scales as the file keeps them."""
        found: dict[str, Value] = {}
        for name, vector in self._vectors.items():
            found[name] = getattr(vector.module, vector.part).detach().cpu().clone()
        return found | {name: linear.rounded() for name, linear in self.linears.items()}


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
