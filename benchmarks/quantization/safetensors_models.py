"""Safetensors artifacts as models of float32: every rounded weight multiplied out, in the base's own architecture.

So what is judged are the weights that a file says, not the kernel that one machine happens to run them with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.quantization.prepare import Setup
from llmlite.evals.engines import TransformersEngine
from llmlite.formats.packing import unpack_int32

QUANT_STATE = ".weight.quant_state.bitsandbytes__nf4"


class Float32Engine(TransformersEngine):
    """The base in float32 on the CPU, with other weights where ``weights`` has them."""

    def __init__(self, base: Path, weights: Mapping[str, torch.Tensor]):
        super().__init__(base)
        self.model.float().cpu()
        own = self.model.state_dict()
        unknown = [name for name in weights if name not in own]
        if unknown:
            raise SystemExit(f"{len(unknown)} tensors are not of this model, {unknown[0]} for one")
        missing = [name for name in own if name not in weights and not (name == "lm_head.weight" and self._tied)]
        if weights and missing:
            raise SystemExit(f"{len(missing)} tensors of the model are missing, {missing[0]} for one")
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    @property
    def _tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)


def multiplied_out(setup: Setup, path: Path) -> TransformersEngine:
    """The model in ``path``: the base itself, a GPTQ directory (gptq, gptq_v2) or a bitsandbytes nf4 directory."""
    torch.set_num_threads(setup.threads)
    if path == setup.base:
        return Float32Engine(setup.base, {})
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    stored = _tensors(path)
    method = config["quant_method"]
    if method in ("gptq", "auto-round"):
        return Float32Engine(setup.base, _gptq(stored, config))
    if method == "bitsandbytes":
        return Float32Engine(setup.base, _nf4(stored))
    raise SystemExit(f"{path}: {method} is not known here; gptq and bitsandbytes are")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


def _gptq(stored: dict[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """w = scale[g] * (code - zero[g]) with g = g_idx[channel]; "gptq" files keep zero - 1, "gptq_v2" files zero."""
    bits, shift = int(config["bits"]), 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    out = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            scales = stored[f"{module}.scales"].float()
            width = value.shape[0] * 32 // bits
            group = math.ceil(width / len(scales))
            index = stored.get(f"{module}.g_idx", torch.arange(width) // group).long()
            codes = unpack_int32(value.T, bits, width).T.int()
            zeros = unpack_int32(stored[f"{module}.qzeros"], bits, scales.shape[1]).int() + shift
            out[f"{module}.weight"] = (scales[index] * (codes - zeros[index])).T
        elif part not in ("qzeros", "scales", "g_idx"):
            out[name] = value.float()
    return out


def _nf4(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiplied out by bitsandbytes itself, from its own description of each tensor."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    out = {}
    for name, value in stored.items():
        if ".weight." in name:
            continue
        described = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")}
        if f"{name.removesuffix('.weight')}{QUANT_STATE}" in stored:
            state = QuantState.from_dict(described, device=torch.device("cpu"))
            state.dtype = torch.float32
            value = dequantize_4bit(value, state)
        out[name] = value.float()
    return out
