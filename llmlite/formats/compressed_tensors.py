"""compressed-tensors ``pack-quantized``: 4 or 8 bits, which plain transformers and vLLM read.

Per linear layer: ``weight_packed`` int32 [out, in * bits / 32], ``weight_scale`` [out, groups] in the model's dtype,
``weight_shape`` int64 [2], and on an asymmetric grid ``weight_zero_point`` int32 [out * bits / 32, groups], packed
along the outputs. The values are signed in the library's words (code - 2**(bits - 1)); what lies in the file is the
unsigned code. Format: https://github.com/vllm-project/compressed-tensors (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.formats.packing import pack_int32, unpack_int32, words
from llmlite.quantize.types import Grid, Ranges, Rounded


@dataclass(frozen=True)
class PackQuantized:
    """The format for a model that is stored, and read, in ``dtype``: its scales are kept in it too."""

    dtype: torch.dtype
    name: str = "compressed-tensors"

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.dtype

    def refusal(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a weight of ``shape`` (out, in) on ``grid`` can't be held; None when it can."""
        _, width = shape
        if grid.bits not in (4, 8):
            return f"pack-quantized files are read with 4 or 8 bits (W4A16, W8A16), not {grid.bits}"
        if grid.zero == "minimum":
            return "compressed-tensors keeps whole zero points, not real minimums"
        if grid.scale_dtype != self.dtype:
            return f"scales are kept in the model's {self.dtype}, not in {grid.scale_dtype}"
        if grid.group is not None and width % grid.group:
            return f"a width of {width} does not divide into groups of {grid.group}"
        return None

    def layout(self, module: str, grid: Grid, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors of one linear layer."""
        out, width = shape
        groups = grid.groups(width)
        specs = {
            f"{module}.weight_packed": TensorSpec(torch.int32, (out, words(width, grid.bits))),
            f"{module}.weight_scale": TensorSpec(self.dtype, (out, groups)),
            f"{module}.weight_shape": TensorSpec(torch.int64, (2,)),
        }
        if grid.zero == "integer":
            specs[f"{module}.weight_zero_point"] = TensorSpec(torch.int32, (words(out, grid.bits), groups))
        return specs

    def pack(self, module: str, rounded: Rounded) -> dict[str, torch.Tensor]:
        """The tensors of ``layout``; ValueError for scales that the dtype can't keep or groups in activation order."""
        grid = rounded.grid
        if rounded.group_index is not None:
            raise ValueError(f"{module}: compressed-tensors 0.20 reads no g_idx, so groups must be neighbours")
        scales = rounded.scales.to(self.dtype)
        if not torch.equal(scales.float(), rounded.scales):
            raise ValueError(f"{module}: the scales were not rounded to {self.dtype} before the codes were chosen")
        tensors = {
            f"{module}.weight_packed": pack_int32(rounded.codes, grid.bits),
            f"{module}.weight_scale": scales,
            f"{module}.weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
        }
        if grid.zero == "integer":
            assert rounded.offsets is not None
            zeros = pack_int32(rounded.offsets.T.to(torch.int32), grid.bits)
            tensors[f"{module}.weight_zero_point"] = zeros.T.contiguous()
        return tensors

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
        """The weight a reader computes with, float32 [out, in]: the product is rounded to the model's dtype."""
        out, width = tensors[f"{module}.weight_shape"].tolist()
        scales = tensors[f"{module}.weight_scale"]
        groups = scales.shape[1]
        codes = unpack_int32(tensors[f"{module}.weight_packed"], grid.bits, width).view(out, groups, -1)
        if grid.zero == "integer":
            packed = tensors[f"{module}.weight_zero_point"].T
            zeros = unpack_int32(packed, grid.bits, out).T.to(torch.int16)
        else:
            zeros = torch.full((out, groups), grid.levels // 2, dtype=torch.int16)
        steps = (codes.to(torch.int16) - zeros[..., None]).to(self.dtype)
        return (steps * scales[..., None]).view(out, width).float()

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> Rounded:
        """The codes and ranges that the tensors of ``layout`` hold; `pack` of them is the same tensors."""
        out, width = tensors[f"{module}.weight_shape"].tolist()
        codes = unpack_int32(tensors[f"{module}.weight_packed"], grid.bits, width)
        offsets = None
        if grid.zero == "integer":
            packed = tensors[f"{module}.weight_zero_point"].T
            offsets = unpack_int32(packed, grid.bits, out).T.float().contiguous()
        return Rounded(grid, codes, Ranges(tensors[f"{module}.weight_scale"].float(), offsets))

    def config(self, grid: Grid, ignored: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, object]:
        """The ``quantization_config`` of config.json.

        ``ignored``: every linear module left in 16 bits, "lm_head" among them even where it is tied to the
        embedding and has no tensor of its own: a reader takes all others for packed.
        """
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.zero == "symmetric",
            "strategy": "channel" if grid.group is None else "group",
            "group_size": grid.group,
            "dynamic": False,
        }
        scheme = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        config: dict[str, object] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }
        if grid.zero == "integer":
            # Without it transformers 5.23 prepares unpacked zero points (compressed-tensors 0.20 forgets to pack them
            # on the meta device) and stops at the packed ones. It unpacks while loading instead of at the first use.
            config["dequantize"] = True
        return config
