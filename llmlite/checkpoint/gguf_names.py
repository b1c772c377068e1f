"""How a Hugging Face decoder and its GGUF file name and order the same tensors, for reading and for writing.

Source: llama.cpp, src/llama-arch.cpp (names) and the converters under conversion/ (row order, norm shift).
"""

from __future__ import annotations

import torch

from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, LAYER, Family
from llmlite.errors import InputError

OUTER = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
ROPE_FREQS = "rope_freqs.weight"  # has no Hugging Face counterpart: made from the config's rope parameters
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
PRE_NORM = {"post_attention_layernorm": "ffn_norm"}  # that norm feeds the feed-forward block
SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Biases that llama.cpp's graph of an architecture adds; it refuses or ignores any other.
BIASES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": ("attn_q", "attn_k", "attn_v"),
    "gemma3": ("attn_q", "attn_k", "attn_v"),
}


def layer_modules(family: Family) -> dict[str, str]:
    """Hugging Face module inside a decoder layer -> the same in GGUF, for one family."""
    norms = SANDWICH_NORMS if "pre_feedforward_layernorm" in family.norms else PRE_NORM
    every = {**MODULES, **norms}
    return {name: every[name] for name in (*family.norms, *family.linears)}


def gguf_name(family: Family, hf_name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight; `InputError` for what GGUF has no place for."""
    if hf_name in OUTER:
        return OUTER[hf_name]
    layer, _, rest = hf_name.removeprefix(LAYER).partition(".")
    module, _, part = rest.rpartition(".")
    name = layer_modules(family).get(module)
    if name is None or part not in ("weight", "bias") or (part == "bias" and name not in BIASES[family.gguf]):
        raise InputError(f"tensor {hf_name!r}: GGUF's architecture {family.gguf} has no place for it")
    return f"blk.{layer}.{name}.{part}"


def hf_name(family: Family, name: str) -> str | None:
    """The inverse of `gguf_name`, None for a tensor without a Hugging Face counterpart."""
    for hf, outer in OUTER.items():
        if name == outer:
            return hf
    inverse = {short: module for module, short in layer_modules(family).items()}
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or parts[2] not in inverse:
        return None
    if parts[3] not in ("weight", "bias"):
        return None
    return f"{LAYER}{parts[1]}.{inverse[parts[2]]}.{parts[3]}"


def gguf_rows(family: Family, hf_name: str, heads: int, kv_heads: int, head_dim: int) -> torch.Tensor | None:
    """Where GGUF's rows come from: gguf = hf[rows], int64 [out]; None when the order is the same.

    llama.cpp rotates neighbouring channels in the architecture llama, transformers rotates channel i with
    i + head_dim / 2; the other families rotate as transformers does.
    """
    if family.gguf != "llama" or not hf_name.startswith(LAYER):
        return None
    module = hf_name.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        count = heads
    elif module.endswith("self_attn.k_proj"):
        count = kv_heads
    else:
        return None
    return torch.arange(count * head_dim).reshape(count, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def norm_shift(family: Family, hf_name: str) -> float:
    """What GGUF's norm weights have on top of the checkpoint's: Gemma multiplies by 1 + weight."""
    return 1.0 if family.gguf == "gemma3" and hf_name.endswith("norm.weight") else 0.0
