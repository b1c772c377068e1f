"""Read safetensors headers without trusting them, and their tensors one at a time.

Format: https://github.com/huggingface/safetensors#format. Eight bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the data. Every offset, dtype and byte count is checked
before anything of the size that the header claims is allocated. Tensors are read with plain reads and not
through a memory map: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmlite.errors import InputError, first_line

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``stop`` are byte positions in ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (self.file,)

    def read(self) -> torch.Tensor:
        """The tensor in its stored dtype, in memory of its own."""
        out = torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes == 0:
            return out
        view = out.reshape(-1).view(torch.uint8).numpy().data
        with open(self.file, "rb", buffering=0) as source:
            source.seek(self.start)
            done = 0
            while done < self.nbytes:
                got = source.readinto(view[done:])
                if not got:
                    raise InputError(f"{self.file}: ends inside tensor {self.name!r}: the file is truncated")
                done += got
        return out


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The checked tensors of one file; `InputError` says what lies in the header."""
    size = file.stat().st_size
    if size < 8:
        raise InputError(f"{file}: {size} bytes is too short for a safetensors file: it is truncated")
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(
                f"{file}: the header claims {length:,} bytes and the file has {size:,}: truncated, or not safetensors"
            )
        raw = source.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_doubles)
    except _DoubledKey as error:
        raise InputError(f"{file}: tensor {error.args[0]!r} stands twice in the header") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long, brackets too deep
        raise InputError(f"{file}: the header is not JSON ({first_line(error)}): not a safetensors file") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: the header is not a JSON object: not a safetensors file")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, fields, 8 + length, size) for name, fields in header.items()}
    _refuse_overlap(file, entries, 8 + length, size)
    return entries


class _DoubledKey(ValueError):
    pass


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise _DoubledKey(key)
        out[key] = value
    return out


def _entry(file: Path, name: str, fields: object, base: int, size: int) -> TensorEntry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise InputError(f"{where} lacks dtype, shape or data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has dtype {dtype!r}: known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise InputError(f"{where} has shape {shape!r}: a list of whole numbers is right")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise InputError(f"{where} has data_offsets {offsets!r}: two whole numbers are right")
    start, stop = base + offsets[0], base + offsets[1]
    if not base <= start <= stop <= size:
        raise InputError(f"{where} claims bytes {start:,} to {stop:,} of {size:,}: truncated, or the header lies")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if need != stop - start:
        raise InputError(f"{where}: {dtype} {shape} needs {need:,} bytes and the header gives {stop - start:,}")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), file, start, stop)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_overlap(file: Path, entries: dict[str, TensorEntry], base: int, size: int) -> None:
    reached, before = base, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != reached:
            what = "overlap" if entry.start < reached else "leave a gap"
            raise InputError(f"{file}: tensor {entry.name!r} and {before} {what}: the header lies")
        reached, before = entry.stop, repr(entry.name)
    if reached != size:
        raise InputError(f"{file}: {size - reached:,} bytes lie behind the last tensor: the header lies")


def read_index(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory, through its shard index where it has one.

    Raises `InputError` for a shard that is not there, a tensor that the index names and no shard has, one that
    lies in another shard than the index says, and one that stands in two shards.
    """
    index_file = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.exists():  # transformers, too, looks for it first
        return read_header(single)
    if not index_file.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(_no_weights(directory))
        return _merge(files)
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index_file}: has no readable weight_map") from None
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard:
            raise InputError(f"{index_file}: {shard!r} is not the name of a file beside it")
        if not (directory / shard).is_file():
            raise InputError(f"{index_file}: names {shard}, which is not there: the checkpoint is incomplete")
    entries = _merge([directory / shard for shard in shards])
    for name, shard in weight_map.items():
        if name not in entries:
            raise InputError(f"{index_file}: names tensor {name!r}, which {shard} does not have")
        if entries[name].file.name != shard:
            raise InputError(
                f"{index_file}: says tensor {name!r} lies in {shard}; it lies in {entries[name].file.name}"
            )
    return entries


def _merge(files: list[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise InputError(f"tensor {name!r} stands in both {entries[name].file} and {file}")
            entries[name] = entry
    return entries


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(ending))
    if pickles:
        return (
            f"{directory}: only pickle weights ({', '.join(pickles[:3])}): unpickling runs code from the file, so they "
            "are refused; convert them to safetensors first"
        )
    return f"{directory}: no *.safetensors file, so this is not a checkpoint that can be read"
