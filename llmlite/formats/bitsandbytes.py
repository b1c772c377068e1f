"""bitsandbytes in safetensors: nf4 (QLoRA) and LLM.int8.

`BitsAndBytes.encode` rounds as the library does. For nf4 the codes can also come from a solver: `BitsAndBytes.grid`
is its grid, `BitsAndBytes.snap` gives the scales that a file can hold, `BitsAndBytes.pack` writes codes and scales.

nf4, per linear layer of n = out * in weights in blocks of 64: ``weight`` uint8 [n / 2, 1], ``weight.absmax`` (uint8
with double quantization, else float32) [n / 64], ``weight.quant_map`` float32 [16], with double quantization also
``weight.nested_absmax`` float32 [n / 64 / 256] and ``weight.nested_quant_map`` float32 [256], and
``weight.quant_state.bitsandbytes__nf4``: the rest as JSON in uint8. Two codes share a byte, the first in its high
half. Double quantization: absmax = nested_quant_map[code] * nested_absmax + offset, with the offset in the JSON.
Papers: 2305.14314, 2110.02861.

LLM.int8: ``weight`` int8 [out, in], ``SCB`` float32 [out] (largest magnitude of a row, w = code * SCB / 127),
``weight_format`` uint8, 0 for row-major. Its readers also round the inputs to 8 bits. Paper: 2208.07339.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.errors import InputError
from llmlite.extras import need
from llmlite.quantize.types import Grid, Ranges, Rounded

BLOCK = 64
NESTED_BLOCK = 256
STATE = "weight.quant_state.bitsandbytes__nf4"
OFFSET_CHARACTERS = 24  # the longest repr of a double: -1.7976931348623157e+308

# What the codes 0 to 15 stand for: quantiles of a normal distribution (2305.14314, appendix E), float32 values.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class StoredScales:
    """The scales of an nf4 weight as its file holds them.

    ``ranges``: scales float32 [out, in / 64], what a reader multiplies with, bit for bit. Double quantization can
    make a small one zero or negative. ``absmax``: what lies in the file for them, flat: float32, or uint8 codes with
    ``nested_map`` float32 [256], ``nested_absmax`` float32 [blocks / 256] and ``offset``, a float32 value.
    """

    ranges: Ranges
    absmax: torch.Tensor
    nested_map: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class BitsAndBytes:
    """The format for a model that is stored, and read, in ``dtype``; ``double_quantization`` is nf4's."""

    kind: Literal["nf4", "int8"]
    dtype: torch.dtype
    double_quantization: bool = True

    @property
    def name(self) -> str:
        return f"bnb:{self.kind}"

    @property
    def grid(self) -> Grid | None:
        """The grid of nf4's codes; None for LLM.int8, which only `encode` rounds."""
        return Grid(4, BLOCK, scale_dtype=torch.float32, codebook=NF4) if self.kind == "nf4" else None

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of ``shape`` (out, in) can't be held; None when it can."""
        out, width = shape
        if self.kind == "nf4" and width % BLOCK:
            # Measured with 0.50.2: its CPU kernel starts a block at each row, its quantizer lets blocks run on.
            return f"nf4 blocks of {BLOCK} would run over the end of a row of {width}, which CPU readers get wrong"
        if self.kind == "nf4" and out % 32:
            return f"nf4 readers on CPUs with AVX-512 BF16 take 32 outputs at a time, and {out} do not divide"
        return None

    def layout(self, module: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors of one linear layer."""
        out, width = shape
        if self.kind == "int8":
            return {
                f"{module}.weight": TensorSpec(torch.int8, shape),
                f"{module}.SCB": TensorSpec(torch.float32, (out,)),
                f"{module}.weight_format": TensorSpec(torch.uint8, ()),
            }
        blocks = out * width // BLOCK
        specs = {
            "weight": TensorSpec(torch.uint8, (out * width // 2, 1)),
            "weight.absmax": TensorSpec(torch.uint8 if self.double_quantization else torch.float32, (blocks,)),
            "weight.quant_map": TensorSpec(torch.float32, (16,)),
            STATE: TensorSpec(torch.uint8, (len(self._state(shape, 0.0)),)),
        }
        if self.double_quantization:
            nested = math.ceil(blocks / NESTED_BLOCK)
            specs["weight.nested_absmax"] = TensorSpec(torch.float32, (nested,))
            specs["weight.nested_quant_map"] = TensorSpec(torch.float32, (256,))
        return {f"{module}.{name}": spec for name, spec in specs.items()}

    def encode(self, module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Round ``weight`` [out, in]: the tensors of ``layout``, and the weight a reader sees, float32 [out, in].

        InputError where the weight has values that the format can't keep (NaN, infinite, out of float16's range).
        """
        if self.kind == "int8":
            return self._encode_int8(module, weight)
        return self._encode_nf4(module, weight)

    def snap(self, module: str, scales: torch.Tensor) -> StoredScales:
        """The nearest scales that a file can hold, all of a weight at once: scales float [out, in / 64], nf4 only.

        With double quantization the library rounds them, less their mean, to 8 bits in blocks of 256. Rounding its
        result once more would change it, so what is stored is kept, and `pack` writes it as it is. InputError where
        a scale, and with it a weight, is not finite in the model's dtype.
        """
        exact = scales.detach().float().cpu().contiguous()
        stored = self._nested(exact) if self.double_quantization else StoredScales(Ranges(exact), exact.flatten())
        if not torch.isfinite(stored.ranges.scales.to(self.dtype)).all():
            raise InputError(
                f"{module}.weight has groups whose scale is not finite in {_name(self.dtype)}, which its readers use"
            )
        return replace(stored, ranges=Ranges(stored.ranges.scales.to(scales.device)))

    def pack(self, module: str, rounded: Rounded, stored: StoredScales) -> dict[str, torch.Tensor]:
        """The tensors of ``layout`` for an nf4 weight whose codes were chosen for the scales ``stored.ranges``.

        ValueError where the codes are on another grid, in groups that are not neighbours, or for other scales.
        """
        if rounded.grid != self.grid or rounded.group_index is not None:
            raise ValueError(f"{module}: nf4 holds codes of {self.grid} in neighbouring groups, not of {rounded.grid}")
        if not torch.equal(rounded.scales.cpu(), stored.ranges.scales.cpu()):
            raise ValueError(f"{module}: the codes were chosen for other scales than those that are stored")
        codes = rounded.codes.cpu()
        if codes.numel() and int(codes.max()) >= len(NF4):
            raise ValueError(f"{module}: code {int(codes.max())} does not fit into 4 bits")
        pairs = codes.reshape(-1, 2)
        shape = (codes.shape[0], codes.shape[1])
        return self._nf4_tensors(module, shape, (pairs[:, :1] << 4) | pairs[:, 1:], stored)

    def read(self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Rounded:
        """The codes and scales that an nf4 weight of ``shape`` (out, in) has in the tensors of ``layout``."""
        assert self.grid is not None
        packed = tensors[f"{module}.weight"].view(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(shape)
        scales = tensors[f"{module}.weight.absmax"]
        if self.double_quantization:
            nested = tensors[f"{module}.weight.nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(scales)]
            offset = json.loads(bytes(tensors[f"{module}.{STATE}"].tolist()))["nested_offset"]
            scales = tensors[f"{module}.weight.nested_quant_map"][scales.long()] * nested + offset
        return Rounded(self.grid, codes, Ranges(scales.view(shape[0], -1)))

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight a reader computes with, float32 [out, in]: multiplied out by the library, in the model's dtype."""
        stored = tensors[f"{module}.weight"]
        if self.kind == "int8":
            return stored.float() * tensors[f"{module}.SCB"].float()[:, None] / 127
        functional = need("bnb", "bitsandbytes.functional")
        whole = f"{module}.weight."
        parts = {name.removeprefix(whole): tensor for name, tensor in tensors.items() if name.startswith(whole)}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        return functional.dequantize_4bit(stored, state).float()

    def config(self, ignored: Sequence[str]) -> dict[str, object]:
        """The ``quantization_config`` of config.json.

        ``ignored``: every linear module left in 16 bits, "lm_head" among them even where it is tied to the
        embedding: a reader takes all others for rounded.
        """
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.kind == "nf4",
            "load_in_8bit": self.kind == "int8",
            "llm_int8_skip_modules": list(ignored),
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.kind == "nf4" and self.double_quantization,
            "bnb_4bit_compute_dtype": _name(self.dtype),
            "bnb_4bit_quant_storage": "uint8",
        }

    def _encode_nf4(self, module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        functional = need("bnb", "bitsandbytes.functional")
        shape = (weight.shape[0], weight.shape[1])
        if not torch.isfinite(weight.to(self.dtype)).all():
            raise InputError(f"{module}.weight has values that are not finite in {_name(self.dtype)}: nothing to round")
        packed, state = functional.quantize_4bit(
            weight.float(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        stored = self.snap(module, state.absmax.view(shape[0], -1))
        state.absmax = stored.ranges.scales.flatten()
        state.dtype = self.dtype  # what readers multiply out in; the rounding itself was done in float32
        dequantized = functional.dequantize_4bit(packed, state).float()
        return self._nf4_tensors(module, shape, packed, stored), dequantized

    def _nested(self, scales: torch.Tensor) -> StoredScales:
        functional = need("bnb", "bitsandbytes.functional")
        flat = scales.flatten()
        offset = flat.mean()
        codes, state = functional.quantize_blockwise(flat - offset, blocksize=NESTED_BLOCK)
        seen = functional.dequantize_blockwise(codes, state) + offset
        return StoredScales(Ranges(seen.view_as(scales)), codes, state.code, state.absmax, offset.item())

    def _nf4_tensors(
        self, module: str, shape: tuple[int, int], packed: torch.Tensor, stored: StoredScales
    ) -> dict[str, torch.Tensor]:
        tensors = {
            "weight": packed,
            "weight.absmax": stored.absmax,
            "weight.quant_map": torch.tensor(NF4),
            STATE: torch.frombuffer(bytearray(self._state(shape, stored.offset)), dtype=torch.uint8),
        }
        if stored.nested_map is not None and stored.nested_absmax is not None:
            tensors["weight.nested_absmax"] = stored.nested_absmax
            tensors["weight.nested_quant_map"] = stored.nested_map
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    def _encode_int8(self, module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        functional = need("bnb", "bitsandbytes.functional")
        half = weight.to(torch.float16)  # as the library's own Int8Params does
        if not torch.isfinite(half).all():
            raise InputError(f"{module}.weight has values that are not finite in float16, which LLM.int8 rounds from")
        codes, largest, _ = functional.int8_vectorwise_quant(half)
        codes[largest == 0] = 0  # a row of zeros is 0 * inf in the library
        tensors = {
            f"{module}.weight": codes,
            f"{module}.SCB": largest,
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, codes.float() * largest[:, None] / 127

    def _state(self, shape: tuple[int, int], offset: float) -> bytes:
        """What bitsandbytes keeps as JSON, padded with blanks so that its length follows from the shape alone."""
        state: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": _name(self.dtype),
            "shape": list(shape),
        }
        if not self.double_quantization:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return (json.dumps(state) + " " * (OFFSET_CHARACTERS - len(repr(offset)))).encode()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
