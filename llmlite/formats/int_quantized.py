"""compressed-tensors ``int-quantized``: weights and the inputs of the layers in 8 bits (W8A8).

Per linear layer: ``weight`` int8 [out, in] and ``weight_scale`` [out, 1] in the model's dtype, w = code * scale.

The inputs have no tensor: config.json tells readers to round them while they run, each token on a scale of its own.
transformers 5.23 with compressed-tensors 0.20 does so in the model's dtype and multiplies in it (scale = largest
magnitude / 127.5, codes from -128), so it shows what the rounding costs, and saves memory only until the first
forward, when it multiplies the weights out. vLLM multiplies in int8 (scale = largest magnitude / 127).
Format: https://github.com/vllm-project/compressed-tensors (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.quantize.types import Grid, Rounded

ZERO = 128  # the code of a symmetric 8-bit grid that stands for 0


@dataclass(frozen=True)
class IntQuantized:
    """The format for a model that is stored, and read, in ``dtype``: its scales are kept in it too."""

    dtype: torch.dtype
    name: str = "compressed-tensors"

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.dtype

    def refusal(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a weight of ``shape`` (out, in) on ``grid`` can't be held; None when it can: every shape can."""
        if grid.bits != 8 or grid.zero != "symmetric" or grid.codebook is not None:
            return f"W8A8 weights are symmetric integers of 8 bits, not of {grid.bits} bits on a grid with {grid.zero}"
        if grid.group is not None:
            return f"W8A8 readers take one scale per output channel, not groups of {grid.group}"
        if grid.scale_dtype != self.dtype:
            return f"scales are kept in the model's {self.dtype}, not in {grid.scale_dtype}"
        return None

    def layout(self, module: str, grid: Grid, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors of one linear layer."""
        return {
            f"{module}.weight": TensorSpec(torch.int8, shape),
            f"{module}.weight_scale": TensorSpec(self.dtype, (shape[0], 1)),
        }

    def pack(self, module: str, rounded: Rounded) -> dict[str, torch.Tensor]:
        """The tensors of ``layout``; ValueError for a grid that `refusal` names or scales that the dtype can't keep."""
        reason = self.refusal(rounded.grid, (rounded.codes.shape[0], rounded.codes.shape[1]))
        if reason:
            raise ValueError(f"{module}: {reason}")
        scales = rounded.scales.to(self.dtype)
        if not torch.equal(scales.float(), rounded.scales):
            raise ValueError(f"{module}: the scales were not rounded to {self.dtype} before the codes were chosen")
        codes = (rounded.codes ^ ZERO).view(torch.int8)  # code - 128: the highest bit changes its meaning
        return {f"{module}.weight": codes, f"{module}.weight_scale": scales}

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
        """The weight transformers computes with, float32 [out, in]: the product is rounded to the model's dtype."""
        return (tensors[f"{module}.weight"].to(self.dtype) * tensors[f"{module}.weight_scale"]).float()

    def config(self, grid: Grid, ignored: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, object]:
        """The ``quantization_config`` of config.json.

        ``ignored``: every linear module left in 16 bits, "lm_head" among them even where it is tied to the
        embedding and has no tensor of its own: a reader takes all others for rounded.
        """
        integers = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        scheme = {
            "targets": ["Linear"],
            "weights": integers | {"strategy": "channel", "dynamic": False},
            "input_activations": integers | {"strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": "int-quantized",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }
