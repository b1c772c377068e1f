"""GPTQ safetensors: what AutoGPTQ began and transformers reads through optimum and GPTQModel.

Per linear layer: ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales``
float16 [groups, out], ``g_idx`` int32 [in], with w = scales[g] * (code - zero), g = g_idx[channel].

Zero points: ``checkpoint_format`` "gptq" keeps zero - 1 in each field, and so has no room for a zero point of 0;
"gptq_v2" keeps it as it is. Symmetric grids (zero always 2**(bits - 1)) are written as "gptq", which every reader
knows. Asymmetric ones are written as "gptq_v2": a zero point of 0 is one they need, and GPTQModel's own loader
refuses asymmetric "gptq" files of other tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.formats.packing import pack_int32, unpack_int32, words
from llmlite.quantize.types import Grid, Ranges, Rounded

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # SUPPORTS_GROUP_SIZE of GPTQModel 7.7's portable kernel, beside -1


@dataclass(frozen=True)
class Gptq:
    """The format for a model whose other tensors are stored in ``dtype``.

    ``act_order``: groups are chosen by activation order and named by g_idx (desc_act); else channel // group.
    """

    dtype: torch.dtype = torch.float16
    act_order: bool = False
    name: str = "gptq"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16

    def refusal(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a weight of ``shape`` (out, in) on ``grid`` can't be held; None when it can."""
        out, width = shape
        if grid.bits not in BITS:
            return f"GPTQ files hold 2, 3, 4 or 8 bits, not {grid.bits}"
        if grid.zero == "minimum":
            return "GPTQ files keep whole zero points, not real minimums"
        if grid.scale_dtype != self.scale_dtype:
            return f"GPTQ files keep scales in float16, not {grid.scale_dtype}"
        if grid.group is not None and grid.group not in GROUPS:
            return f"GPTQModel reads groups of {', '.join(map(str, GROUPS))} or whole channels, not of {grid.group}"
        if grid.group is not None and width % grid.group:
            return f"a width of {width} does not divide into groups of {grid.group}"
        if width % 32 or out % 32:
            # Three-bit codes fill words in blocks of 32, and GPTQModel's CPU and Marlin kernels want 32 outputs.
            return f"GPTQ kernels read blocks of 32 channels, and {out} x {width} does not divide into them"
        return None

    def layout(self, module: str, grid: Grid, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors of one linear layer."""
        out, width = shape
        groups = grid.groups(width)
        return {
            f"{module}.qweight": TensorSpec(torch.int32, (words(width, grid.bits), out)),
            f"{module}.qzeros": TensorSpec(torch.int32, (groups, words(out, grid.bits))),
            f"{module}.scales": TensorSpec(torch.float16, (groups, out)),
            f"{module}.g_idx": TensorSpec(torch.int32, (width,)),
        }

    def pack(self, module: str, rounded: Rounded) -> dict[str, torch.Tensor]:
        """The tensors of ``layout``; ValueError for scales float16 can't keep, or an order that wasn't asked for."""
        grid = rounded.grid
        width = rounded.codes.shape[1]
        if rounded.group_index is not None and not self.act_order:
            raise ValueError(f"{module} has groups in activation order and the file would not say so")
        scales = rounded.scales.to(torch.float16)
        if not torch.equal(scales.float(), rounded.scales):
            raise ValueError(f"{module}: the scales were not rounded to float16 before the codes were chosen")
        zeros = rounded.offsets
        if zeros is None:
            zeros = torch.full_like(rounded.scales, grid.levels // 2)
        index = rounded.group_index
        if index is None:
            index = torch.arange(width) // (grid.group or width)
        return {
            f"{module}.qweight": pack_int32(rounded.codes, grid.bits).T.contiguous(),
            f"{module}.qzeros": pack_int32(zeros.T.to(torch.int32) - _zero_shift(grid), grid.bits),
            f"{module}.scales": scales.T.contiguous(),
            f"{module}.g_idx": index.to(torch.int32),
        }

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
        """The weight a reader computes with, float32 [out, in].

        GPTQModel 7.7 multiplies in float16 whatever dtype the model is loaded in, then casts to it.
        """
        scales = tensors[f"{module}.scales"]
        index = tensors[f"{module}.g_idx"].long()
        out = scales.shape[1]
        codes = unpack_int32(tensors[f"{module}.qweight"].T, grid.bits, len(index))
        zeros = unpack_int32(tensors[f"{module}.qzeros"], grid.bits, out) + _zero_shift(grid)
        steps = codes.T.to(torch.int16) - zeros[index].to(torch.int16)
        weight = (scales[index] * steps).to(self.dtype)
        return weight.T.float().contiguous()

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> Rounded:
        """The codes and ranges that the tensors of ``layout`` hold; `pack` of them is the same tensors."""
        scales = tensors[f"{module}.scales"].T.float().contiguous()
        index = tensors[f"{module}.g_idx"].long()
        codes = unpack_int32(tensors[f"{module}.qweight"].T, grid.bits, len(index))
        offsets = None
        if grid.zero == "integer":
            offsets = unpack_int32(tensors[f"{module}.qzeros"], grid.bits, len(scales)).T.float().contiguous()
        return Rounded(grid, codes, Ranges(scales, offsets), index if self.act_order else None)

    def config(self, grid: Grid, ignored: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, object]:
        """The ``quantization_config`` of config.json.

        ``ignored``: linear modules left in 16 bits. GPTQ readers skip lm_head by themselves; where a layer's own
        module is among them they need the ``quantized`` ones by name (ValueError without them).
        """
        config: dict[str, object] = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": -1 if grid.group is None else grid.group,
            "desc_act": self.act_order,
            "sym": grid.zero == "symmetric",
            "checkpoint_format": "gptq" if grid.zero == "symmetric" else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
        }
        if grid.bits == 4 and grid.group in (None, 16):
            # Left to itself GPTQModel 7.7 takes, on CPUs, a kernel that refuses these groups or, where the width is
            # 32, 64, 128 or 256, ignores their zero points (logits off by 118%). The portable one reads all.
            config["backend"] = "torch"
        if any(module != "lm_head" for module in ignored):
            if not quantized:
                raise ValueError("modules inside the layers stay in 16 bits, so the quantized ones must be named")
            # Readers match by the end (optimum) or any part (vLLM) of the name: whole names are safe in both.
            config["modules_in_block_to_quantize"] = [list(quantized)]
        return config


def _zero_shift(grid: Grid) -> int:
    """What "gptq" files subtract from a zero point and "gptq_v2" files do not."""
    return 1 if grid.zero == "symmetric" else 0
