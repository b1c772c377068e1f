"""Write safetensors one tensor at a time, in bounded memory: declare every tensor first, then fill.

The declared layout fixes each shard's header and every tensor's place, so the exact size is known before
work starts, a tensor goes to disk as soon as it exists, and a missing, doubled or misshapen one is caught.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch

from llmlite.checkpoint.safetensors_index import NAMES
from llmlite.errors import InputError


class TensorSpec(NamedTuple):
    """What a tensor will be: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Shards in ``directory`` for the tensors of ``layout``, in its order.

    One file is called model.safetensors; several get the usual numbers and an index file. ``close`` raises
    ValueError if a declared tensor was never written. With ``reopen`` the shards are those that an earlier writer of
    the same layout left, and `keep` names the tensors that it has written; `InputError` if they are not.
    """

    def __init__(
        self,
        directory: Path,
        layout: Mapping[str, TensorSpec],
        max_shard_bytes: int = 5_000_000_000,
        *,
        reopen: bool = False,
    ):
        self.directory = directory
        self.layout = dict(layout)
        self._left = set(self.layout)
        self._place: dict[str, tuple[int, int]] = {}  # name -> (shard number, byte position)
        self._files = []
        shards = _shards(self.layout, max_shard_bytes)
        names = _shard_names(len(shards))
        for number, (file_name, members) in enumerate(zip(names, shards, strict=True)):
            header, data_start = _header(members, self.layout)
            position = data_start
            for name in members:
                self._place[name] = (number, position)
                position += self.layout[name].nbytes
            if reopen:
                self._files.append(reopened(directory / file_name, header, position))
                continue
            file = open(directory / file_name, "wb", buffering=0)  # noqa: SIM115 - closed in close()
            self._files.append(file)
            file.write(header)
            os.posix_fallocate(file.fileno(), 0, position)  # a disk that is too small says so now
        if len(shards) > 1:
            weight_map = {name: names[self._place[name][0]] for name in self.layout}
            total = sum(spec.nbytes for spec in self.layout.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one declared tensor in its place; ValueError if it is not what was declared."""
        spec = self.layout.get(name)
        if spec is None:
            raise ValueError(f"tensor {name!r} was not declared")
        if (tensor.dtype, tuple(tensor.shape)) != tuple(spec):
            raise ValueError(f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, declared was {spec}")
        if name not in self._left:
            raise ValueError(f"tensor {name!r} is written twice")
        shard, position = self._place[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file = self._files[shard]
        file.seek(position)
        done = 0
        while done < len(data):
            done += file.write(data[done:])
        self._left.remove(name)

    def keep(self, name: str) -> None:
        """Leave a declared tensor as the earlier writer of the reopened file wrote it."""
        self._left.remove(name)

    def flush(self) -> None:
        """What is written so far is on the disk when this returns."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush every shard to the disk."""
        if self._left:
            raise ValueError(f"never written: {', '.join(sorted(self._left)[:5])} ({len(self._left)} in all)")
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files:
            file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def reopened(path: Path, head: bytes, size: int) -> FileIO:
    """A file that a writer laid out earlier, open for writing; `InputError` if it has another size or beginning."""
    if path.is_file() and path.stat().st_size == size:
        file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by the writer
        if file.read(len(head)) == head:
            return file
        file.close()
    raise InputError(f"{path}: is not what the unfinished run laid out; begin again without --resume")


def _shards(layout: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in layout.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _header(members: list[str], layout: Mapping[str, TensorSpec]) -> tuple[bytes, int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in members:
        dtype, shape = layout[name]
        end = position + layout[name].nbytes
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, 8 + len(raw)
