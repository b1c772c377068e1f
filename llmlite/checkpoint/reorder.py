"""Reorder a network's channels at random without changing what it computes.

Weights that were published on a low-bit grid fit that grid again, so a measurement on them flatters rounding.
Reordering the channels consistently through the whole network leaves every weight as it is and the logits equal
to float rounding, but no group of neighbours shares a grid any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmlite.checkpoint.families import LAYER, Family


@dataclass(frozen=True)
class Order:
    """New place -> old place, int64, for every axis of the network.

    ``residual`` [hidden]; per layer ``values`` [kv heads x head_dim] and ``ffn`` [intermediate]; ``outputs``
    [heads x head_dim]: the values, repeated for the query heads that share a value head.
    """

    family: Family
    residual: torch.Tensor
    values: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    ffn: tuple[torch.Tensor, ...]

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One tensor of the checkpoint in the new order."""
        module, _, part = name.rpartition(".")
        layer, _, inner = module.removeprefix(LAYER).partition(".")
        inside = module.startswith(LAYER)
        axes = self.family.axes[inner if inside else module.removeprefix("model.")]
        if part == "bias":
            axes = axes[:1]
        for dimension, axis in enumerate(axes):
            if axis != "-":
                tensor = tensor.index_select(dimension, self._axis(axis, int(layer) if inside else 0))
        return tensor

    def _axis(self, axis: str, layer: int) -> torch.Tensor:
        if axis == "residual":
            return self.residual
        return {"value": self.values, "output": self.outputs, "ffn": self.ffn}[axis][layer]


def random_order(family: Family, config: dict, seed: int) -> Order:
    """An order drawn from ``seed``, equal on every machine: residual first, then each layer's value heads and ffn."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(config["hidden_size"], generator=generator)
    values, outputs, ffn = [], [], []
    for _ in range(config["num_hidden_layers"]):
        inside = [torch.randperm(head, generator=generator) for _ in range(kv_heads)]
        values.append(torch.cat([h * head + order for h, order in enumerate(inside)]))
        shared = [inside[query * kv_heads // heads] for query in range(heads)]
        outputs.append(torch.cat([query * head + order for query, order in enumerate(shared)]))
        ffn.append(torch.randperm(config["intermediate_size"], generator=generator))
    return Order(family, residual, tuple(values), tuple(outputs), tuple(ffn))
