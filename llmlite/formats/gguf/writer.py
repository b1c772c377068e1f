"""Write a GGUF file one tensor at a time, in bounded memory: declare every tensor first, then fill in any order.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmlite.checkpoint.safetensors_writer import reopened
from llmlite.extras import need
from llmlite.formats.gguf.types import TYPES, nbytes, refusal

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h: the layout of the blocks in types.py
ALIGNMENT = 32  # the format's default
MAGIC = b"GGUF"


class GgufWriter:
    """One GGUF file with ``metadata`` and the tensors of ``layout``: {gguf name: (type, shape)}, in its order.

    Shapes are in torch's order (out, in). Whole numbers in the metadata are stored as uint32, real ones as
    float32. ``close`` raises ValueError if a declared tensor was never written. The file begins with its magic bytes
    from ``close`` on only, so that what a killed run leaves behind opens nowhere. With ``reopen`` the file is the one
    that an earlier writer of the same metadata and layout left, and `keep` names the tensors that it has written;
    `InputError` if it is not.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        reopen: bool = False,
    ):
        for name, (kind, shape) in layout.items():
            reason = refusal(kind, shape)
            if reason is not None:
                raise ValueError(f"tensor {name!r}: {reason}")
        self.layout = dict(layout)
        self._left = set(self.layout)
        declared = {**_file_type(layout), **metadata}
        if reopen:
            head = path.with_name(f".{path.name}.head")
            position = _write_head(head, declared, self.layout)
            raw = bytes(len(MAGIC)) + head.read_bytes()[len(MAGIC) :]
            head.unlink()
        else:
            position = _write_head(path, declared, self.layout)
        self._place: dict[str, int] = {}
        for name, (kind, shape) in self.layout.items():
            self._place[name] = position
            position += _padded(nbytes(kind, shape))
        if reopen:
            _unname(path)
            self._file = reopened(path, raw, position)
            return
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed in close()
        try:
            self._put(0, bytes(len(MAGIC)))
            os.posix_fallocate(self._file.fileno(), 0, position)  # a disk that is too small says so now
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, data: np.ndarray) -> None:
        """Put the bytes of one declared tensor in their place; ValueError if they are not what was declared."""
        if name not in self.layout:
            raise ValueError(f"tensor {name!r} was not declared")
        if name not in self._left:
            raise ValueError(f"tensor {name!r} is written twice")
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        wanted = nbytes(*self.layout[name])
        if len(raw) != wanted:
            raise ValueError(f"tensor {name!r} has {len(raw)} bytes, declared were {wanted}")
        self._put(self._place[name], raw)
        self._left.remove(name)

    def _put(self, position: int, raw: bytes | memoryview) -> None:
        self._file.seek(position)
        done = 0
        while done < len(raw):
            done += self._file.write(raw[done:])

    def keep(self, name: str) -> None:
        """Leave a declared tensor as the earlier writer of the reopened file wrote it."""
        self._left.remove(name)

    def flush(self) -> None:
        """What is written so far is on the disk when this returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush the data to the disk, and then make it a GGUF file."""
        if self._left:
            raise ValueError(f"never written: {', '.join(sorted(self._left)[:5])} ({len(self._left)} in all)")
        self.flush()
        self._put(0, MAGIC)
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _unname(path: Path) -> None:
    """Take the magic bytes of a file that was closed: it is being written again."""
    if path.is_file():
        with open(path, "r+b", buffering=0) as file:
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                file.write(bytes(len(MAGIC)))


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _file_type(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Value]:
    """general.file_type for a file whose metadata has none: what most weights of its matrices are stored as."""
    weights: Counter[str] = Counter()
    for kind, shape in layout.values():
        if len(shape) == 2:
            weights[kind] += shape[0] * shape[1]
    head: dict[str, Value] = {"general.file_type": TYPES[max(weights, key=lambda kind: weights[kind])].ftype}
    if any(TYPES[kind].grid is not None for kind in weights):
        head["general.quantization_version"] = QUANTIZATION_VERSION
    return head


def head_bytes(metadata: Mapping[str, Value], layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes before the first tensor's data; the tensors' types make no difference to it."""
    with TemporaryDirectory() as folder:
        return _write_head(Path(folder) / "head", {**_file_type(layout), **metadata}, layout)


def _write_head(path: Path, metadata: Mapping[str, Value], layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Everything before the data, through the package gguf; the position where the data starts."""
    gguf = need("gguf", "gguf")
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has put it in first
            writer.add_key_value(key, value, _value_type(kinds, value))
    for name, (kind, shape) in layout.items():
        number = gguf.GGMLQuantizationType(TYPES[kind].number)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes(kind, shape), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = path.stat().st_size
    return _padded(size)


def _value_type(kinds, value: Value):
    for python_type, kind in (
        (bool, kinds.BOOL), (int, kinds.UINT32), (float, kinds.FLOAT32), (str, kinds.STRING), (list, kinds.ARRAY),
    ):  # fmt: skip
        if isinstance(value, python_type):
            return kind
    raise TypeError(f"no GGUF value type for {type(value).__name__}")
