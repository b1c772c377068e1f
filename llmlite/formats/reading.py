"""From a config.json's ``quantization_config`` to the format of the files, to read their weights with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmlite.errors import InputError
from llmlite.formats.compressed_tensors import PackQuantized
from llmlite.formats.gptq import Gptq
from llmlite.formats.int_quantized import IntQuantized
from llmlite.quantize.types import Grid


@dataclass(frozen=True)
class PackedFormat:
    """A format whose linear layers lie as codes and scales; ``name`` as in "gptq, 4 bits"."""

    format: Gptq | PackQuantized | IntQuantized
    grid: Grid
    name: str

    def modules(self, names: set[str]) -> dict[str, tuple[str, ...]]:
        """The packed linear layers among the tensors of a model: what each module's tensors are called."""
        mark = {Gptq: "qweight", PackQuantized: "weight_packed", IntQuantized: "weight_scale"}[type(self.format)]
        found = [name.removesuffix(f".{mark}") for name in names if name.endswith(f".{mark}")]
        return {module: tuple(sorted(n for n in names if n.rpartition(".")[0] == module)) for module in found}

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a reader multiplies with, float32 [out, in]."""
        return self.format.unpack(module, tensors, self.grid)


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model with its weights as real numbers."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def packed_format(config: Mapping[str, Any], where: str) -> PackedFormat:
    """The format of a gptq or compressed-tensors checkpoint; `InputError` for what isn't read."""
    quantization = config["quantization_config"]
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))
    try:
        if quantization["quant_method"] == "gptq":
            return _gptq(quantization, dtype)
        return _compressed_tensors(quantization, dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: its quantization_config is of a kind that is not read here ({error!r})") from None


def _gptq(quantization: Mapping[str, Any], dtype: torch.dtype) -> PackedFormat:
    bits, group = int(quantization["bits"]), int(quantization["group_size"])
    if quantization.get("pack_dtype", "int32") != "int32" or bits not in (2, 3, 4, 8):
        raise ValueError("2, 3, 4 or 8 bits packed in int32 are read")
    # Zero points lie in every file. All that the reader needs from the grid is how: "gptq" files keep them less 1.
    zero = "integer" if quantization.get("checkpoint_format", "gptq") == "gptq_v2" else "symmetric"
    grid = Grid(bits, None if group < 0 else group, zero)  # type: ignore[arg-type]
    return PackedFormat(Gptq(dtype, bool(quantization.get("desc_act"))), grid, f"gptq, {bits} bits")


def _compressed_tensors(quantization: Mapping[str, Any], dtype: torch.dtype) -> PackedFormat:
    (scheme,) = quantization["config_groups"].values()
    weights, kind = scheme["weights"], quantization["format"]
    group = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["type"] != "int" or weights["strategy"] not in ("group", "channel") or weights.get("actorder"):
        raise ValueError("whole numbers in groups or channels are read")
    grid = Grid(weights["num_bits"], group, "symmetric" if weights["symmetric"] else "integer", dtype)
    name = f"compressed-tensors, {grid.bits} bits"
    if kind == "pack-quantized":
        return PackedFormat(PackQuantized(dtype), grid, name)
    if kind == "int-quantized" and weights["symmetric"]:
        return PackedFormat(IntQuantized(dtype), grid, name)
    raise ValueError(f"{kind}: pack-quantized and symmetric int-quantized are read")
