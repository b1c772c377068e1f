"""Tiny random models, rounded and written by the formats, and read back where llmlite can't be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.quantize.types import Grid, Ranges, Rounded

IDS = [[(7 * i * i + 3 * i + 1) % 256 for i in range(48)]]

# Loads each directory named on the command line and leaves logits.npy, or error.txt, in it; of bitsandbytes also
# dequantized.npy: the logits of the plain layers that transformers' own dequantize() makes of them.
READER = f"""
import importlib.abc, json, sys, traceback

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llmlite":
            raise ImportError("llmlite is not here")

sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from transformers import AutoModelForCausalLM


def load(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    strays = {{key: sorted(map(str, value)) for key, value in info.items() if value}}
    assert not strays, strays
    return model.eval()

def save_logits(model, file):
    with torch.no_grad():
        np.save(file, model(torch.tensor({IDS})).logits.float().numpy())

for directory in sys.argv[1:]:
    try:
        model = load(directory)
        save_logits(model, directory + "/logits.npy")
        config = json.load(open(directory + "/config.json"))
        if config["quantization_config"]["quant_method"] == "bitsandbytes":
            save_logits(load(directory).dequantize(model.dtype), directory + "/dequantized.npy")
    except Exception:
        with open(directory + "/error.txt", "w") as file:
            file.write(traceback.format_exc())
"""


def tiny_model(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random model of 2 layers, its weights spread like those of a trained one."""
    config = AutoConfig.for_model(
        model_type,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=model_type == "llama",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # never .to(dtype): rotary stays float32
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.08)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.05)  # norms near 1, biases near 0
    return model


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers inside the decoder layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def round_to_nearest(weight: torch.Tensor, grid: Grid, group_index: torch.Tensor | None = None) -> Rounded:
    """Plain rounding on a symmetric ("half" or "signed") or integer grid, groups where ``group_index`` says."""
    out, width = weight.shape
    index = group_index
    if index is None:
        index = torch.arange(width) // (grid.group or width)
    groups = grid.groups(width)
    scales, zeros = torch.empty(out, groups), torch.empty(out, groups)
    for g in range(groups):
        members = weight[:, index == g].float()
        if grid.zero == "symmetric":
            if grid.scale_rule == "signed":
                extreme = members.gather(1, members.abs().argmax(1, keepdim=True))[:, 0]
                scales[:, g] = extreme / -(grid.levels // 2)
            else:
                scales[:, g] = members.abs().amax(1) * 2 / (grid.levels - 1)
            zeros[:, g] = grid.levels // 2
        else:
            low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / (grid.levels - 1)
            zeros[:, g] = (-low / scales[:, g]).round().clamp(0, grid.levels - 1)
    scales = scales.to(grid.scale_dtype).float()
    codes = (weight.float() / scales[:, index] + zeros[:, index]).round().clamp(0, grid.levels - 1).to(torch.uint8)
    offsets = None if grid.zero == "symmetric" else zeros
    return Rounded(grid, codes, Ranges(scales, offsets), group_index)


def write_artifact(
    directory: Path,
    model: PreTrainedModel,
    layout: Mapping[str, TensorSpec],
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, object],
) -> None:
    """config.json and model.safetensors: the packed linear layers, and the model's other tensors as they are."""
    packed = {f"{name}.weight" for name in linears(model) if any(packed.startswith(f"{name}.") for packed in layout)}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    if model.config.tie_word_embeddings:
        del rest["lm_head.weight"]
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in rest.items()}
    directory.mkdir(parents=True)
    with SafetensorsWriter(directory, specs | dict(layout)) as writer:
        for name, tensor in (rest | dict(tensors)).items():
            writer.write(name, tensor)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    config["quantization_config"] = dict(quantization_config)
    (directory / "config.json").write_text(json.dumps(config))


def reference_logits(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model with ``weights`` (float32) put in place of its linear layers'."""
    with torch.no_grad():
        for name, module in linears(model).items():
            module.weight.copy_(weights[name])
        return model(torch.tensor(IDS)).logits.float()


def read_elsewhere(directories: Sequence[Path]) -> None:
    """Run READER on all directories in one process of its own."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, *map(str, directories)],
        cwd=directories[0],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def relative_difference(directory: Path, expected: torch.Tensor, file: str = "logits.npy") -> float:
    """How far the logits that READER left in a directory lie from ours, relative to the largest of ours."""
    error = directory / "error.txt"
    assert not error.exists(), error.read_text()
    logits = torch.from_numpy(np.load(directory / file))
    return ((logits - expected).abs().max() / expected.abs().max()).item()
