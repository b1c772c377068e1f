"""A checkpoint as GGUF sees it: metadata, tensor names, row order. The weights themselves are never read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import Family
from llmlite.formats.gguf.metadata import full_config, head_dim, model_metadata, rope_factors
from llmlite.formats.gguf.tokenizer import describe_tokenizer
from llmlite.formats.gguf.writer import Value


@dataclass(frozen=True)
class GgufModel:
    """What `describe` found. ``notes``: one sentence for each known difference of the GGUF from the checkpoint."""

    family: Family
    metadata: dict[str, Value]
    heads: int
    kv_heads: int
    head_dim: int
    rope_factors: torch.Tensor | None
    notes: tuple[str, ...]

    def gguf_name(self, hf_name: str) -> str:
        """The tensor's name in the file; `InputError` for one that the architecture has no place for."""
        return gguf_names.gguf_name(self.family, hf_name)

    def rows(self, hf_name: str) -> torch.Tensor | None:
        """The order of the output rows, gguf = hf[rows], int64 [out]; None when it is the same."""
        return gguf_names.gguf_rows(self.family, hf_name, self.heads, self.kv_heads, self.head_dim)

    def to_gguf(self, hf_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the file has it: rows in order, Gemma's norms shifted by 1 (float32), else unchanged."""
        rows = self.rows(hf_name)
        if rows is not None:
            return tensor[rows.to(tensor.device)]
        shift = gguf_names.norm_shift(self.family, hf_name)
        return tensor.float() + shift if shift else tensor

    def extra(self) -> dict[str, torch.Tensor]:
        """Tensors without a Hugging Face counterpart: gguf name -> float32."""
        return {} if self.rope_factors is None else {gguf_names.ROPE_FREQS: self.rope_factors}


def describe(checkpoint: Checkpoint) -> GgufModel:
    """Everything but the weights, checked: `InputError` for what llama.cpp could not compute in the same way."""
    family = checkpoint.family
    config = full_config(checkpoint.config)
    where = checkpoint.source
    tokenizer = describe_tokenizer(checkpoint.directory, config)
    model = GgufModel(
        family=family,
        metadata={
            **model_metadata(family, config, where),
            "general.type": "model",
            "general.name": Path(where).resolve().name.removesuffix(".gguf"),
            **tokenizer.metadata,
        },
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim(config),
        rope_factors=rope_factors(config),
        notes=tokenizer.notes,
    )
    for name in checkpoint.tensors:
        if not name.endswith("rotary_emb.inv_freq"):
            model.gguf_name(name)
    return model
