"""Linear layers that stay packed in memory, as their file has them, and pass a gradient to their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Unpack = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class PackedLinear(torch.nn.Linear):
    """A linear layer with a fixed weight [out, in] that each pass unpacks anew, forward and backward, and a fixed bias.

    ``tensors``: what the file has for it; ``unpack`` makes the weight of them. peft takes it for a linear layer.
    """

    def __init__(self, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor], unpack: Unpack, dtype: torch.dtype):
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self._unpack, self._dtype = unpack, dtype
        self._names = {f"packed_{number}": name for number, name in enumerate(tensors)}
        for place, name in self._names.items():
            self.register_buffer(place, tensors[name], persistent=False)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight [out, in] in the model's dtype, made anew."""
        buffers = dict(self.named_buffers(recurse=False))
        return self._unpack({name: buffers[place] for place, name in self._names.items()}).to(self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Move with the model, but leave the packed tensors' dtypes as the file has them."""
        device = fn(torch.empty(0)).device
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = buffer.to(device)
        if self.bias is not None:
            self.bias = torch.nn.Parameter(self.bias.detach().to(device), requires_grad=False)
        return self


class _Product(torch.autograd.Function):
    """x W^T, with W unpacked in both directions and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.dtypes = layer, (x.dtype, dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), layer.weight.to(dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        given, dtype = ctx.dtypes
        return (gradient.to(dtype) @ ctx.layer.weight.to(dtype)).to(given), None
