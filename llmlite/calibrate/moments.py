"""Second moments of the inputs of a decoder layer's linear layers, summed in float32 while the layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmlite.checkpoint.families import Family
from llmlite.quantize.types import Moments


@contextmanager
def collect_moments(module: torch.nn.Module, family: Family) -> Iterator[dict[str, Moments]]:
    """While the block runs, sum x xT over every token that reaches the first linear layer of each stage.

    The dictionary is filled when the block ends: linear layers that share an input share one `Moments`.
    """
    sums: dict[str, _Sum] = {}
    handles = []
    for stage in family.stages:
        linear = module.get_submodule(stage[0])
        assert isinstance(linear, torch.nn.Linear)
        sums[stage[0]] = total = _Sum(linear.in_features, linear.weight.device)
        handles.append(linear.register_forward_pre_hook(total.add))
    out: dict[str, Moments] = {}
    try:
        yield out
    finally:
        for handle in handles:
            handle.remove()
    for stage in family.stages:
        total = sums[stage[0]]
        shared = Moments(total.xxt, total.absmax, total.count)
        out.update(dict.fromkeys(stage, shared))


class _Sum:
    def __init__(self, width: int, device: torch.device):
        self.xxt = torch.zeros(width, width, device=device)
        self.absmax = torch.zeros(width, device=device)
        self.count = 0

    def add(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        self.xxt.addmm_(x.T, x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.count += len(x)
