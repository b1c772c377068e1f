"""Read a GGUF file's header without trusting it, and its tensors one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. Every count,
length and offset is checked against the file's size before anything of that size is allocated. Tensors are read
with plain reads and not through a memory map: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.extras import need

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies; ``shape`` in torch's order (out, in), ``type`` GGML's name in lower case."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor's values, float32."""
        gguf = need("gguf", "gguf")
        raw = bytearray(self.nbytes)
        with open(self.file, "rb") as source:
            source.seek(self.start)
            if source.readinto(raw) != self.nbytes:
                raise InputError(f"{self.file}: ends inside tensor {self.name!r}: the file is truncated")
        kind = gguf.GGMLQuantizationType[self.type.upper()]
        stored = np.frombuffer(raw, dtype=np.uint8)
        if kind == gguf.GGMLQuantizationType.F32:
            values = stored.view(np.float32)
        elif kind == gguf.GGMLQuantizationType.F16:
            values = stored.view(np.float16)
        else:
            values = gguf.quants.dequantize(stored.reshape(-1, self.nbytes // math.prod(self.shape[:-1])), kind)
        return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A checked header: ``metadata`` as Python values, ``tensors`` by name in the file's order."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: Path) -> GgufFile:
    """The checked header of one file; `InputError` in one sentence for whatever is wrong with it."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    size = file.stat().st_size
    if size < 24:
        raise InputError(f"{file}: {size} bytes is too short for a GGUF file: it is truncated, or something else")
    with open(file, "rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as view:
        cursor = _Cursor(file, view)
        if cursor.take(4) != b"GGUF":
            raise InputError(f"{file}: does not start with the letters GGUF: not a GGUF file")
        version = cursor.scalar(4)
        if version not in (2, 3):
            raise InputError(f"{file}: GGUF version {version}; versions 2 and 3, little endian, can be read")
        tensor_count, key_count = cursor.scalar(10), cursor.scalar(10)
        metadata: dict[str, Any] = {}
        for _ in range(cursor.counted(key_count, 13)):
            key = cursor.string()
            if key in metadata:
                raise InputError(f"{file}: key {key!r} stands twice in the header")
            metadata[key] = cursor.value(cursor.scalar(4))
        infos = [_info(cursor) for _ in range(cursor.counted(tensor_count, 24))]
        header_end = cursor.position
    parts = metadata.get("split.count", 0)
    if not isinstance(parts, int):
        raise InputError(f"{file}: split.count is {parts!r}; a whole number is right")
    if parts > 1:
        raise InputError(f"{file}: is one of {parts} parts; join them with llama-gguf-split --merge")
    return GgufFile(file, metadata, _place(file, size, infos, header_end, metadata.get("general.alignment", 32)))


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Takes values from the front of the file and never past its end."""

    def __init__(self, file: Path, view: mmap.mmap):
        self.file, self.view, self.position = file, view, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.view):
            raise InputError(f"{self.file}: ends inside its header: it is truncated, or the header lies")
        raw = self.view[self.position : end]
        self.position = end
        return raw

    def counted(self, count: int, least: int) -> int:
        """A count that the header claims, checked against the room left for things of at least ``least`` bytes."""
        if count * least > len(self.view) - self.position:
            raise InputError(f"{self.file}: the header claims {count:,} entries, more than the file has room for")
        return count

    def scalar(self, kind: int) -> Any:
        form = SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        raw = self.take(self.counted(self.scalar(10), 1))
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(kind)
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise InputError(f"{self.file}: the header has a value of unknown type {kind}")
        member, count = self.scalar(4), self.scalar(10)
        if member in SCALARS:
            form = SCALARS[member]
            raw = self.take(self.counted(count, struct.calcsize(form)) * struct.calcsize(form))
            return [*struct.unpack(f"<{count}{form[1]}", raw)]
        if member != STRING:
            raise InputError(f"{self.file}: the header has an array of unknown type {member}")
        return [self.string() for _ in range(self.counted(count, 8))]


def _info(cursor: _Cursor) -> _Info:
    name = cursor.string()
    dimensions = cursor.scalar(4)
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise InputError(f"{cursor.file}: tensor {name!r} claims {dimensions} dimensions; 1 to 4 are right")
    shape = tuple(cursor.scalar(10) for _ in range(dimensions))[::-1]
    return _Info(name, shape, cursor.scalar(4), cursor.scalar(10))


def _place(file: Path, size: int, infos: list[_Info], header_end: int, alignment: int) -> dict[str, GgufTensor]:
    gguf = need("gguf", "gguf")
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise InputError(f"{file}: general.alignment is {alignment!r}; a multiple of 8 is right")
    base = header_end + -header_end % alignment
    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        where = f"{file}: tensor {info.name!r}"
        if info.name in tensors:
            raise InputError(f"{where} stands twice in the header")
        if info.kind not in known:
            raise InputError(f"{where} has GGML type {info.kind}, which the package gguf does not know; update it")
        block, block_bytes = gguf.GGML_QUANT_SIZES[known[info.kind]]
        if 0 in info.shape or info.shape[-1] % block:
            raise InputError(f"{where} has shape {list(info.shape)}, which is not made of blocks of {block}")
        nbytes = math.prod(info.shape) // block * block_bytes
        start = base + info.offset
        if info.offset % alignment or start + nbytes > size:
            raise InputError(f"{where} claims bytes {start:,} to {start + nbytes:,} of {size:,}: the file is truncated")
        tensors[info.name] = GgufTensor(info.name, known[info.kind].name.lower(), info.shape, file, start, nbytes)
    reached, before = base, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < reached:
            raise InputError(f"{file}: tensor {tensor.name!r} and {before} overlap: the header lies")
        reached, before = tensor.start + tensor.nbytes, repr(tensor.name)
    return tensors
