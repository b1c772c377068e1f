"""Tensors of a checkpoint that no file holds as they are: rounded ones multiplied out, adapted ones merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmlite.checkpoint.safetensors_index import TensorEntry


@dataclass(frozen=True)
class ComputedEntry(TensorEntry):
    """A tensor that is made when it is read, float32; ``dtype`` is what it would be stored in.

    ``file`` and ``more``: the files that it is made from.
    """

    make: Callable[[], torch.Tensor] = field(kw_only=True, repr=False)
    more: tuple[Path, ...] = field(kw_only=True, default=())

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file, *self.more)

    def read(self) -> torch.Tensor:
        """The tensor, float32."""
        return self.make()


def computed(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], files: Iterable[Path], make: Callable[[], torch.Tensor]
) -> ComputedEntry:
    """The entry of a tensor that ``make`` gives."""
    first, *more = files
    return ComputedEntry(name, dtype, shape, first, 0, math.prod(shape) * dtype.itemsize, make=make, more=tuple(more))
