"""Artifacts of rounded weights as checkpoints of real numbers: what their readers compute with, read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.artifact import GGUF_FILE
from llmlite.checkpoint.checkpoint import Checkpoint, expected_shapes, open_checkpoint, read_config
from llmlite.checkpoint.computed import computed
from llmlite.checkpoint.families import family_of
from llmlite.checkpoint.gguf_header import GgufTensor, read_gguf
from llmlite.checkpoint.safetensors_index import TensorEntry, read_index
from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.errors import InputError
from llmlite.formats.bitsandbytes import STATE, BitsAndBytes
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.metadata import full_config, head_dim
from llmlite.formats.reading import packed_format, unquantized

DENSE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Reader:
    """How one format lays out a linear layer of a shape, and multiplies it out."""

    layout: Callable[[str, tuple[int, int]], dict[str, TensorSpec]]
    unpack: Callable[[str, Mapping[str, torch.Tensor]], torch.Tensor]


def open_dequantized(directory: Path) -> Checkpoint:
    """A safetensors directory, its rounded weights multiplied out; a full-precision one as it is.

    `InputError` for a format that is not llmlite's, and for tensors that are not as its config says.
    """
    whole = read_config(directory)
    if not whole.get("quantization_config"):
        return open_checkpoint(directory)
    config = unquantized(whole)
    family = family_of(config, str(directory))
    index = read_index(directory)
    dense = [entry.dtype for entry in index.values() if len(entry.shape) == 1 and entry.dtype in DENSE]
    dtype = dense[0] if dense else torch.bfloat16
    reader = _reader(whole, dtype, directory)
    entries = {}
    for name, shape in expected_shapes(config, family, str(directory)).items():
        module = name.removesuffix(".weight")
        parts = {part: entry for part, entry in index.items() if part.startswith(f"{module}.")}
        if name in parts and parts[name].shape == shape and parts[name].dtype in DENSE:
            entries[name] = parts[name]
        elif not parts:
            raise InputError(f"{directory}: tensor {name!r} is missing from the safetensors files")
        else:
            make = partial(_multiplied, directory, module, (shape[0], shape[1]), parts, reader)
            entries[name] = computed(name, dtype, shape, [next(iter(parts.values())).file], make)
    return Checkpoint(str(directory), directory, config, entries, family)


def _multiplied(
    where: Path, module: str, shape: tuple[int, int], parts: Mapping[str, TensorEntry], reader: _Reader
) -> torch.Tensor:
    for name, spec in reader.layout(module, shape).items():
        found = None if name not in parts else TensorSpec(parts[name].dtype, parts[name].shape)
        if found != spec and (found is None or name != f"{module}.{STATE}"):  # its length follows from its numbers
            raise InputError(f"{where}: tensor {name!r} is {found or 'missing'}; its config implies {spec}")
    return reader.unpack(module, {name: entry.read() for name, entry in parts.items()})


def _reader(config: Mapping[str, Any], dtype: torch.dtype, where: Path) -> _Reader:
    """What reads the tensors of a linear layer, from config.json."""
    quantization = config["quantization_config"]
    method = quantization.get("quant_method")
    if method in ("gptq", "compressed-tensors"):
        packed = packed_format({**config, "dtype": str(dtype)}, str(where))
        return _Reader(lambda module, shape: packed.format.layout(module, packed.grid, shape), packed.weight)
    if method == "bitsandbytes" and quantization.get("load_in_8bit"):
        int8 = BitsAndBytes("int8", dtype)
        return _Reader(int8.layout, int8.unpack)
    if method == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") == "nf4":
        nf4 = BitsAndBytes("nf4", dtype, bool(quantization["bnb_4bit_use_double_quant"]))
        return _Reader(nf4.layout, nf4.unpack)
    raise InputError(
        f"{where}: its weights are rounded as {method!r} in a way that is not read here; artifacts that llmlite "
        "quantize writes (gptq, compressed-tensors, bnb, gguf) are right"
    )


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that lies in the artifact ``path``; None where it is neither."""
    if path.suffix == ".gguf":
        return path
    file = path / GGUF_FILE
    return file if file.is_file() else None


def dequantized_gguf(base: Checkpoint, file: Path) -> Checkpoint:
    """The weights of a GGUF file of ``base`` under its config; `InputError` for a file that is not of this base."""
    config = full_config(base.config)
    heads = (config["num_attention_heads"], config["num_key_value_heads"], head_dim(config))
    tensors = read_gguf(file).tensors
    entries: dict[str, TensorEntry] = {}
    for name, shape in expected_shapes(base.config, base.family, base.source).items():
        tensor = tensors.get(gguf_names.gguf_name(base.family, name))
        if tensor is None or tensor.shape != shape or tensor.type not in gguf.TYPES:
            raise InputError(f"{file}: has no tensor {name!r} of shape {list(shape)}: not made from {base.source}")
        make = partial(_from_gguf, base, name, tensor, heads)
        entries[name] = computed(name, base.dtype, shape, [file], make)
    return Checkpoint(str(file), base.directory, base.config, entries, base.family)


def _from_gguf(base: Checkpoint, name: str, tensor: GgufTensor, heads: tuple[int, int, int]) -> torch.Tensor:
    raw = np.fromfile(tensor.file, dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)
    weight = gguf.unpack(raw, tensor.type, tensor.shape)
    rows = gguf_names.gguf_rows(base.family, name, *heads)
    if rows is not None:
        weight = weight[rows.argsort()]
    return weight - gguf_names.norm_shift(base.family, name)
