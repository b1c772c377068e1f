"""The weights of a written artifact: read as they lie there, and written again with other values in the same bytes.

Codes and scales are `Rounded`, everything else is a tensor, both in the checkpoint's own order of rows and by its
names: what a file format shifts or orders differently is undone here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.artifact import GGUF_FILE, flush_directory
from llmlite.checkpoint.checkpoint import Checkpoint, expected_shapes
from llmlite.checkpoint.gguf_header import GgufTensor, read_gguf
from llmlite.checkpoint.safetensors_index import NAMES, TensorEntry, read_index
from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.errors import InputError
from llmlite.formats.bitsandbytes import BitsAndBytes
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.metadata import full_config, head_dim
from llmlite.formats.int_quantized import IntQuantized
from llmlite.plan.types import GgufTypes, SafetensorsTypes
from llmlite.quantize.types import Rounded

Value = torch.Tensor | Rounded
Values = Mapping[str, Value]


class Stored(Protocol):
    """An artifact's weights. ``files`` hold them; `names` are the checkpoint's."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    def names(self) -> Iterator[str]: ...
    def read(self, name: str) -> Value:
        """A tensor, in the dtype that is stored, or a rounded weight."""

    def rewrite(self, values: Values) -> Stored:
        """The same in new files beside the old ones, `rewritten` of them, flushed, with ``values`` in their places.

        A tensor is rounded to the dtype that is stored, a rounded weight must have the old grid. All other bytes are
        the same.
        """


def rewritten(file: Path) -> Path:
    """Where `Stored.rewrite` puts what belongs in ``file``."""
    return file.with_name(f".{file.name}.rewritten")


def put_in_place(stored: Stored) -> None:
    """Replace each file of ``stored`` by what `Stored.rewrite` made of it, in one step that is on the disk after it."""
    for file in stored.files:
        os.replace(rewritten(file), file)
        flush_directory(file.parent)


@dataclass(frozen=True)
class GgufStored:
    """A GGUF file of ``checkpoint``."""

    checkpoint: Checkpoint
    file: Path
    tensors: Mapping[str, GgufTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def names(self) -> Iterator[str]:
        return iter(self.tensors)

    def read(self, name: str) -> Value:
        tensor, rows = self.tensors[name], self._rows(name)
        back = slice(None) if rows is None else rows.argsort()
        if gguf.TYPES[tensor.type].grid is not None:
            return gguf.read(raw_bytes(tensor), tensor.type, tensor.shape).map(lambda part: part[back])
        value = gguf.unpack(raw_bytes(tensor), tensor.type, tensor.shape)[back]
        return (value - self._shift(name)).to(gguf.TYPES[tensor.type].dtype)

    def rewrite(self, values: Values) -> GgufStored:
        new = rewritten(self.file)
        shutil.copyfile(self.file, new)
        with open(new, "r+b") as sink:
            for name, value in values.items():
                tensor, rows = self.tensors[name], self._rows(name)
                order = slice(None) if rows is None else rows
                if isinstance(value, Rounded):
                    data = gguf.pack(value.map(lambda part, order=order: part[order]), tensor.type)  # type: ignore[misc]
                else:
                    data = gguf.encode((value + self._shift(name))[order], tensor.type)
                sink.seek(tensor.start)
                sink.write(data.tobytes())
            sink.flush()
            os.fsync(sink.fileno())
        return GgufStored(self.checkpoint, new, members(self.checkpoint, new))

    def _rows(self, name: str) -> torch.Tensor | None:
        """gguf = hf[rows]."""
        config = full_config(self.checkpoint.config)
        heads = config["num_attention_heads"], config["num_key_value_heads"], head_dim(config)
        return gguf_names.gguf_rows(self.checkpoint.family, name, *heads)

    def _shift(self, name: str) -> float:
        return gguf_names.norm_shift(self.checkpoint.family, name)


@dataclass(frozen=True)
class SafetensorsStored:
    """A directory of safetensors made from ``checkpoint``, its linear layers rounded as ``types`` say."""

    checkpoint: Checkpoint
    types: SafetensorsTypes
    entries: Mapping[str, TensorEntry]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def names(self) -> Iterator[str]:
        return iter(self._kinds())

    def read(self, name: str) -> Value:
        if self._kinds()[name] != self.types.linear:
            return self.entries[name].read()
        module, shape = name.removesuffix(".weight"), self.checkpoint.tensors[name].shape
        parts = {part: self.entries[part].read() for part in self.types.layout(module, self.types.linear, shape)}
        form = self.types.format
        assert not isinstance(form, IntQuantized)
        if isinstance(form, BitsAndBytes):
            return form.read(module, parts, (shape[0], shape[1]))
        assert self.types.grid is not None
        return form.read(module, parts, self.types.grid)

    def rewrite(self, values: Values) -> SafetensorsStored:
        parts = {part: tensor for name, value in values.items() for part, tensor in self._packed(name, value).items()}
        for file in self.files:
            mine = [part for part in parts if self.entries[part].file == file]
            shutil.copyfile(file, rewritten(file))
            with open(rewritten(file), "r+b") as sink:
                for part in mine:
                    sink.seek(self.entries[part].start)
                    sink.write(parts[part].contiguous().reshape(-1).view(torch.uint8).numpy().data)
                sink.flush()
                os.fsync(sink.fileno())
        entries = {name: replace(entry, file=rewritten(entry.file)) for name, entry in self.entries.items()}
        return SafetensorsStored(self.checkpoint, self.types, entries)

    def _kinds(self) -> Mapping[str, str]:
        return self.types.assign(self.checkpoint).types

    def _packed(self, name: str, value: Value) -> dict[str, torch.Tensor]:
        """A weight as the file has it."""
        if not isinstance(value, Rounded):
            return {name: value.to(self.entries[name].dtype)}
        module, form = name.removesuffix(".weight"), self.types.format
        assert not isinstance(form, IntQuantized)
        if isinstance(form, BitsAndBytes):  # the scales of a tensor are rounded together
            stored = form.snap(module, value.scales)
            return form.pack(module, replace(value, ranges=stored.ranges), stored)
        return form.pack(module, value)


def open_stored(checkpoint: Checkpoint, directory: Path, types: GgufTypes | SafetensorsTypes) -> Stored:
    """The weights of an artifact's directory; `InputError` as `open_gguf` and `open_safetensors` raise it."""
    if isinstance(types, GgufTypes):
        return open_gguf(checkpoint, directory / GGUF_FILE)
    return open_safetensors(checkpoint, directory, types)


def open_gguf(checkpoint: Checkpoint, file: Path) -> GgufStored:
    """The GGUF file's weights; `InputError` where it is not one of this checkpoint."""
    return GgufStored(checkpoint, file, members(checkpoint, file))


def open_safetensors(checkpoint: Checkpoint, directory: Path, types: SafetensorsTypes) -> SafetensorsStored:
    """The directory's weights; `InputError` where they are not this checkpoint's in ``types``, or can't be written
    again with other scales.
    """
    reason = refusal(types)
    if reason is not None:
        raise InputError(f"{directory}: {reason}")
    entries = read_index(directory)
    for name, kind in types.assign(checkpoint).types.items():
        shape = checkpoint.tensors[name].shape
        layout = types.layout(name.removesuffix(".weight"), kind, shape) if kind == types.linear else None
        for part, (dtype, wanted) in (layout or {name: TensorSpec(types.dtype, shape)}).items():
            if part not in entries or (entries[part].dtype, entries[part].shape) != (dtype, tuple(wanted)):
                raise InputError(
                    f"{directory}: has no tensor {part!r} of {NAMES[dtype]} {list(wanted)}: not made from "
                    f"{checkpoint.source}"
                )
    return SafetensorsStored(checkpoint, types, entries)


def refusal(types: SafetensorsTypes) -> str | None:
    """Why weights of this type can't be trained in their file; None where they can."""
    if isinstance(types.format, IntQuantized):
        return "w8a8 rounds the inputs of its layers too, and training would not see that; w8a16 is right"
    if isinstance(types.format, BitsAndBytes) and types.format.grid is None:
        return "bnb:int8 has no scales that are finer than its codes, and rounds inputs too; bnb:nf4 is right"
    return None


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
