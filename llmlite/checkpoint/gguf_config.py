"""A GGUF file's metadata as config.json: every key of the architecture is used or refused, none is dropped.

Source: llama.cpp, src/llama-model.cpp load_hparams and src/models/{llama,qwen2,qwen3,gemma3}.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmlite.checkpoint.families import Family
from llmlite.checkpoint.gguf_header import GgufFile
from llmlite.checkpoint.gguf_names import ROPE_FREQS
from llmlite.errors import InputError

CLASSES = {
    "llama": ("LlamaForCausalLM", "hidden_act", "silu"),
    "qwen2": ("Qwen2ForCausalLM", "hidden_act", "silu"),
    "qwen3": ("Qwen3ForCausalLM", "hidden_act", "silu"),
    "gemma3": ("Gemma3ForCausalLM", "hidden_activation", "gelu_pytorch_tanh"),
}
COMMON = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}  # fmt: skip
GEMMA3 = {
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.freq_base_swa",
    "final_logit_softcapping",
}
GEMMA3_27B_LAYERS = 62  # llama.cpp knows the largest Gemma 3 by its depth, and scales its queries another way
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LLAMA3_ROPE = (1.0, 4.0, 8192)  # low and high frequency factor and original context of every Llama 3.1 to 3.3


class _Keys:
    """The keys of one architecture, with `InputError` for those that are missing."""

    def __init__(self, source: GgufFile, family: Family):
        self.where = str(source.file)
        self.prefix = f"{family.gguf}."
        self.metadata = source.metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; required where there is no default."""
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise InputError(f"{self.where}: {self.prefix}{key} is {value!r}; a positive whole number is right")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number, the shortest decimal of its float32; required where there is no default."""
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
            raise InputError(f"{self.where}: {self.prefix}{key} is {value!r}; a positive number (float32) is right")
        return _shortest(value)

    def has(self, key: str) -> bool:
        """The key is there and not zero, which llama.cpp takes for unset."""
        return self.metadata.get(self.prefix + key, 0) not in (0, False)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def import_config(source: GgufFile, family: Family) -> dict[str, Any]:
    """config.json without token ids; `InputError` for a key that has no place in it."""
    keys = _Keys(source, family)
    known = COMMON | (GEMMA3 if family.gguf == "gemma3" else set())
    for key, value in source.metadata.items():
        if key.startswith(keys.prefix) and key.removeprefix(keys.prefix) not in known and value not in (0, False):
            raise InputError(f"{source.file}: key {key} = {value!r} has no place in a {family.name} config")
    if "token_embd.weight" not in source.tensors:
        raise InputError(f"{source.file}: tensor 'token_embd.weight' is missing, so this is not a whole model")
    architecture, activation_key, activation = CLASSES[family.gguf]
    layers = {name.split(".")[1] for name in source.tensors if name.startswith("blk.")}
    said = keys.count("block_count")
    if said != len(layers):
        raise InputError(f"{source.file}: the header says {said} layers and the file has tensors of {len(layers)}")
    heads = keys.count("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family.model_types[0],
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": keys.count("attention.key_length", keys.count("embedding_length") // heads),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        activation_key: activation,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    width = config["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, width) != width:
            raise InputError(f"{source.file}: {keys.prefix}{key} is {keys.count(key)} and a head has {width} channels")
    if width % 2 or heads % config["num_key_value_heads"]:
        raise InputError(
            f"{source.file}: {heads} query heads, {config['num_key_value_heads']} key heads and {width} channels in "
            "each; an even number of channels, and query heads that divide evenly among key heads, are right"
        )
    rope = _rope(keys, source, config)
    if family.gguf == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in source.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in source.tensors
    elif family.gguf != "qwen2":  # qwen2 always has its three biases
        config["attention_bias"] = "blk.0.attn_q.bias" in source.tensors
    if family.gguf == "gemma3":
        return config | _gemma3(keys, config, rope)
    return {**config, "rope_parameters": rope}


def _rope(keys: _Keys, source: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": keys.real("rope.freq_base", 10000.0), "rope_type": "default"}
    named = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"  # the older name
    factor = keys.real(named) if keys.has(named) else 1.0
    kind = source.metadata.get(keys.prefix + "rope.scaling.type", "linear")
    if ROPE_FREQS in source.tensors:
        if factor != 1.0:
            raise InputError(f"{source.file}: has rope_freqs.weight and a rope scaling factor; one of them is right")
        return {**rope, **_llama3(source, rope["rope_theta"], config["head_dim"])}
    if kind == "yarn" and factor != 1.0:
        betas = [name for name in ("beta_fast", "beta_slow") if keys.has(f"rope.scaling.yarn_{name}")]
        return {
            **rope,
            **{name: keys.real(f"rope.scaling.yarn_{name}") for name in betas},  # else 32 and 1 on both sides
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        }
    if kind not in ("linear", "none", "yarn"):
        raise InputError(f"{source.file}: rope scaling type {kind!r} is not known; known are linear, yarn and none")
    if kind == "linear" and factor != 1.0:
        return {**rope, "rope_type": "linear", "factor": factor}
    return rope


def llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What each rotary frequency is divided by under rope type llama3: float32 [head_dim / 2].

    Source: transformers' _compute_llama3_parameters (modeling_rope_utils.py), Llama 3.1's own scheme.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = rope["original_max_position_embeddings"] / (2 * torch.pi * rope["rope_theta"] ** exponents)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # turns: how often a channel goes round in that context
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _llama3(source: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters behind rope_freqs.weight, which holds only their result: Llama 3's own, or those that fit.

    Between its two ends the inverse factor is linear in a channel's turns per context token, so two channels give
    it; a common factor of the two thresholds and the context has no effect, and the low one is taken as 1.
    """
    stored = source.tensors[ROPE_FREQS].read()
    if stored.shape != (head_dim // 2,):
        raise InputError(f"{source.file}: rope_freqs.weight has shape {list(stored.shape)}; {[head_dim // 2]} is right")
    factor = _shortest(stored.max().item())
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor}
    low, high, context = LLAMA3_ROPE
    candidates = [{"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}]
    middle = ((stored > 1.0001) & (stored < factor * 0.9999)).nonzero().flatten()
    if len(middle) >= 2:
        ends = middle[[0, -1]]
        turns = 1 / (2 * torch.pi * theta ** (2 * ends.double() / head_dim))  # per context token
        smooth = (1 / stored[ends].double() - 1 / factor) / (1 - 1 / factor)
        slope = ((smooth[0] - smooth[1]) / (turns[0] - turns[1])).item()
        offset = slope * turns[0].item() - smooth[0].item()
        if offset > 0 and 0 < slope / offset < 2**31:  # a context length
            candidates.append(
                {
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1 + 1 / offset,
                    "original_max_position_embeddings": round(slope / offset),
                }
            )
    for found in candidates:
        if torch.allclose(llama3_factors(rope | found, head_dim), stored, rtol=1e-4):
            return rope | found
    raise InputError(f"{source.file}: rope_freqs.weight does not follow Llama 3's rule, so config.json can't state it")


def _gemma3(keys: _Keys, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else 0
    pattern = keys.metadata.get(keys.prefix + "attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):  # each layer but every n-th looks at a window; 0: all do
        pattern = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]
    if not window:
        pattern = [False] * layers
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise InputError(f"{keys.where}: {keys.prefix}attention.sliding_window_pattern does not have {layers} entries")
    width = config["head_dim"]
    cap = "final_logit_softcapping"
    return {
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if layers == GEMMA3_27B_LAYERS else width
        ),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
        "sliding_window": window or 4096,
        cap: keys.real(cap) if keys.has(cap) else None,
        "attn_logit_softcapping": None,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_theta": keys.real("rope.freq_base_swa", 10000.0), "rope_type": "default"},
        },
    }
