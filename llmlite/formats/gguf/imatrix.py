"""llama.cpp's importance matrix: the mean squared input of each channel of each linear layer, read and written.

Layout: llama.cpp, tools/imatrix/imatrix.cpp (writes it) and common/imatrix-loader.cpp (reads it). Since 2025 it is a
GGUF file: general.type is "imatrix", imatrix.datasets names the text, imatrix.chunk_count and imatrix.chunk_size tell
how much of it was read, and a model's tensor NAME has two float32 tensors, NAME.in_sum2 [in], sums of squares over
tokens, and NAME.counts [1], the tokens. The legacy .dat file can be read too: int32 entries; for each an int32 length
and the name, int32 calls, int32 values, float32 values (mean square times calls); then, in all but the oldest files,
int32 chunks and an int32 length and the name of the text. Little endian throughout.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.checkpoint.artifact import DISK_FAILED
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER, Family
from llmlite.checkpoint.gguf_header import GgufFile, GgufTensor, read_gguf
from llmlite.checkpoint.gguf_names import gguf_name
from llmlite.errors import InputError, OutsideError
from llmlite.formats.gguf.writer import ALIGNMENT, MAGIC

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
UINT32, STRING, ARRAY = 4, 8, 9  # GGUF's value types
F32 = 0  # GGML's tensor type
LONGEST_NAME = 256  # bytes; llama.cpp's own names have at most 63


@dataclass(frozen=True)
class Imatrix:
    """Sums of squared inputs per GGUF tensor name; `InputError` on creation for values that can't be such sums.

    ``sums`` float32 [in] and ``counts``, whole and positive, by name: mean square = sums / counts. A count is of
    tokens, or of chunks where ``chunk_size``, the tokens of one chunk, is 0: the legacy file does not keep it.
    ``chunk_count``: chunks read in all, 0 where it is not known. ``source`` is what messages call it.
    """

    sums: dict[str, torch.Tensor]
    counts: dict[str, int]
    chunk_count: int
    chunk_size: int
    datasets: tuple[str, ...]
    source: str = "the importance matrix"

    def __post_init__(self) -> None:
        if not self.sums:
            raise InputError(f"{self.source}: holds no tensor's sums")
        if self.sums.keys() != self.counts.keys():
            alone = sorted(self.sums.keys() ^ self.counts.keys())
            raise InputError(f"{self.source}: sums and counts belong together, {alone[0]!r} has one of them only")
        for name, sums in self.sums.items():
            if not bool(torch.isfinite(sums).all()):
                raise InputError(f"{self.source}: {name} has sums that are not finite numbers")
            if bool((sums < 0).any()):
                raise InputError(f"{self.source}: {name} has negative sums of squares")
            if self.counts[name] < 1:
                raise InputError(f"{self.source}: {name} has a count of {self.counts[name]}: no token reached it")

    def check(self, checkpoint: Checkpoint) -> None:
        """`InputError` unless every linear layer of the checkpoint has sums of its width, and no other layer has."""
        family, missing, known = checkpoint.family, [], set()
        for layer in range(checkpoint.num_layers):
            for module in family.linears:
                hf_name = f"{LAYER}{layer}.{module}.weight"
                name = gguf_name(family, hf_name)
                known.add(name)
                width = checkpoint.tensors[hf_name].shape[1]
                if name not in self.sums:
                    missing.append(name)
                elif len(self.sums[name]) != width:
                    raise InputError(
                        f"{self.source}: {name} has {len(self.sums[name])} channels, "
                        f"{checkpoint.source} has {width}; it is another model's"
                    )
        if missing:
            raise InputError(f"{self.source}: lacks {_some(missing)} of {checkpoint.source}")
        strange = [name for name in self.sums if name.startswith("blk.") and name not in known]
        if strange:
            raise InputError(
                f"{self.source}: has {_some(strange)}, which {checkpoint.source} lacks; it is another model's"
            )


def diagonal(imatrix: Imatrix, family: Family, hf_name: str) -> torch.Tensor:
    """Mean square of each input channel of a Hugging Face tensor, float32 [in]; `InputError` where it has none.

    llama.cpp permutes output rows only (`gguf_names.gguf_rows`): input channels have the same order in both.
    """
    name = gguf_name(family, hf_name)
    if name not in imatrix.sums:
        raise InputError(f"{imatrix.source}: lacks {name}, the sums for {hf_name}")
    return imatrix.sums[name] / imatrix.counts[name]


def read_imatrix(path: Path) -> Imatrix:
    """A GGUF or a legacy file; `InputError` for one that is neither, is truncated, or has impossible values.

    Tensors of a GGUF file other than sums and counts are statistics of later versions, and are not read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        gguf = file.read(len(MAGIC)) == MAGIC
    return _from_gguf(read_gguf(path)) if gguf else _Legacy(path).read()


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write it as GGUF, byte for byte as llama.cpp does; ``path`` comes into being whole, or not at all.

    `InputError` for counts in chunks of unknown size, `OutsideError` where the disk fails.
    """
    if imatrix.chunk_size < 1:
        raise InputError(
            f"{imatrix.source}: the size of its chunks is not known, as in every legacy file, and GGUF counts tokens"
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(bytes(len(MAGIC)))  # the magic comes last: a killed run's file opens nowhere
            for part in _parts(imatrix):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.write(MAGIC)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in DISK_FAILED:
            raise OutsideError(f"{path}: can't be written ({error.strerror}); nothing of it was kept") from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _parts(imatrix: Imatrix) -> Iterable[bytes]:
    """The file in pieces, all but its magic: header, tensor infos, data."""
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(imatrix.sums, key=str.encode):
        tensors[name + SUMS] = imatrix.sums[name].contiguous().cpu().numpy().astype("<f4", copy=False)
        tensors[name + COUNTS] = np.array([imatrix.counts[name]], dtype="<f4")
    texts = b"".join(_string(name) for name in imatrix.datasets)
    head = [
        struct.pack("<IQQ", 3, len(tensors), 4),
        _string("general.type") + struct.pack("<I", STRING) + _string("imatrix"),
        _string(DATASETS) + struct.pack("<IIQ", ARRAY, STRING, len(imatrix.datasets)) + texts,
        _string(CHUNK_COUNT) + struct.pack("<II", UINT32, imatrix.chunk_count),
        _string(CHUNK_SIZE) + struct.pack("<II", UINT32, imatrix.chunk_size),
    ]
    offset = 0
    for name, values in tensors.items():
        head.append(_string(name) + struct.pack("<IQIQ", 1, values.size, F32, offset))
        offset += values.nbytes + -values.nbytes % ALIGNMENT
    length = len(MAGIC) + sum(map(len, head))
    yield from head
    yield bytes(-length % ALIGNMENT)
    for values in tensors.values():
        yield values.tobytes()
        yield bytes(-values.nbytes % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _from_gguf(file: GgufFile) -> Imatrix:
    where, keys = file.file, file.metadata
    if keys.get("general.type") != "imatrix":
        kind = keys.get("general.type", "model")
        raise InputError(f"{where}: is a GGUF file of type {kind!r}, not an importance matrix")
    datasets = keys.get(DATASETS)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise InputError(f"{where}: {DATASETS} is {datasets!r}; a list of names is right")
    sums, counts = {}, {}
    for tensor in file.tensors.values():
        if tensor.name.endswith(SUMS):
            sums[tensor.name.removesuffix(SUMS)] = _values(tensor).reshape(-1)
        elif tensor.name.endswith(COUNTS):
            counts[tensor.name.removesuffix(COUNTS)] = _count(tensor)
    return Imatrix(sums, counts, _whole(file, CHUNK_COUNT), _whole(file, CHUNK_SIZE), tuple(datasets), str(where))


def _values(tensor: GgufTensor) -> torch.Tensor:
    if tensor.type != "f32":
        raise InputError(f"{tensor.file}: {tensor.name} has type {tensor.type}; f32 is right")
    return tensor.read()


def _count(tensor: GgufTensor) -> int:
    values = _values(tensor).reshape(-1)
    if len(values) != 1:
        raise InputError(
            f"{tensor.file}: {tensor.name} has {len(values)} counts, as for a mixture of experts; one is right"
        )
    count = float(values)
    if not count.is_integer():  # False for NaN and infinity too
        raise InputError(f"{tensor.file}: {tensor.name} is {count}; a whole number is right")
    return int(count)


def _whole(file: GgufFile, key: str) -> int:
    value: Any = file.metadata.get(key)
    if type(value) is not int or not 0 <= value < 2**32:
        raise InputError(f"{file.file}: {key} is {value!r}; a whole number is right")
    return value


class _Legacy:
    """Takes a legacy file's values in turn; every length is checked against what is left of the file."""

    def __init__(self, path: Path):
        self.path, self.left = path, path.stat().st_size

    def read(self) -> Imatrix:
        sums, counts = {}, {}
        with open(self.path, "rb") as self.file:
            entries = self._number("the number of tensors")
            for _ in range(entries):
                name = self._name()
                if name in sums:
                    raise InputError(f"{self.path}: tensor {name!r} stands twice")
                counts[name] = self._signed()
                raw = self._take(4 * self._number(f"the width of {name}"))
                sums[name] = torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32))
            chunks = max(self._signed(), 0) if self.left else 0
            text = self._text() if self.left else ""
        if self.left:
            raise InputError(f"{self.path}: has {self.left:,} bytes after its end: not an importance matrix")
        return Imatrix(sums, counts, chunks, 0, (text,) if text else (), str(self.path))

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise InputError(f"{self.path}: ends inside its data: truncated, or not an importance matrix")
        self.left -= count
        return self.file.read(count)

    def _signed(self) -> int:
        return struct.unpack("<i", self._take(4))[0]

    def _number(self, what: str) -> int:
        number = self._signed()
        if number < 1:
            raise InputError(f"{self.path}: {what} is {number}: not an importance matrix")
        return number

    def _name(self) -> str:
        length = self._number("the length of a name")
        if length > LONGEST_NAME:
            raise InputError(f"{self.path}: a name of {length:,} bytes: not an importance matrix")
        return self._decoded(length)

    def _text(self) -> str:
        length = self._signed()
        if length < 0:
            raise InputError(f"{self.path}: the length of a name is {length}: not an importance matrix")
        return self._decoded(length)

    def _decoded(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: a name is not UTF-8: not an importance matrix") from None
