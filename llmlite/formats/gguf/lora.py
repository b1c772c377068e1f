"""A peft LoRA adapter as a GGUF file that llama.cpp loads beside the model (--lora, llama_adapter_lora_init).

``general.type`` is "adapter", ``adapter.type`` "lora", and of each linear layer there are NAME.lora_a [rank, in] and
NAME.lora_b [out, rank], NAME as in the model's own file. llama.cpp computes W x + alpha / rank * lora_b (lora_a x)
with one alpha for the whole file, so what a layer's own scale has more is folded into its lora_b; its rows are in the
order of the file's weight. Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.checkpoint import expected_shapes
from llmlite.checkpoint.families import HEAD, LAYER, family_of
from llmlite.errors import InputError
from llmlite.formats.gguf.metadata import full_config, head_dim
from llmlite.formats.gguf.types import encode
from llmlite.formats.gguf.writer import GgufWriter, Value
from llmlite.formats.peft import Adapter

GGUF_LORA = "adapter.gguf"  # in an adapter's directory, beside peft's files


def write_gguf_lora(adapter: Adapter, config: dict[str, Any], file: Path, kind: str = "f16") -> None:
    """Write ``adapter`` to ``file``; ``config`` is the base's config.json, ``kind`` f16, bf16 or f32.

    `InputError`, before anything is written, for DoRA, for a layer that the base has not, or not in this shape, and
    for a head that is tied to the embedding.
    """
    where = str(adapter.directory)
    if adapter.dora:
        raise InputError(
            f"{where}: is DoRA, which scales each row of the sum of weight and adapter; llama.cpp only adds the "
            "adapter's product. Merge it with llmlite merge, or train without DoRA"
        )
    family = family_of(config, where)
    shapes = expected_shapes(config, family, where)
    adapter.check(shapes, f"the {family.name} model of its base's config.json")
    whole = full_config(config)
    heads = (whole["num_attention_heads"], whole["num_key_value_heads"], head_dim(whole))
    alpha = float(adapter.config["lora_alpha"]) or 1.0
    layout = {}
    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        if not name.startswith(LAYER) and name != HEAD:
            raise InputError(f"{where}: changes {module}; llama.cpp adapts the linear layers and an untied head")
        for part, entry in (("lora_a", pair.a), ("lora_b", pair.b)):
            layout[f"{gguf_names.gguf_name(family, name)}.{part}"] = (kind, entry.shape)
    metadata: dict[str, Value] = {
        "general.architecture": family.gguf,
        "general.type": "adapter",
        "general.name": adapter.directory.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    with GgufWriter(file, metadata, layout) as writer:
        for module, pair in adapter.pairs.items():
            name = f"{module}.weight"
            b = pair.b.read().float() * (pair.scale * pair.rank / alpha)
            rows = gguf_names.gguf_rows(family, name, *heads)
            target = gguf_names.gguf_name(family, name)
            writer.write(f"{target}.lora_a", encode(pair.a.read().float(), kind))
            writer.write(f"{target}.lora_b", encode(b if rows is None else b[rows], kind))
