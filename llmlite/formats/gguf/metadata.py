"""config.json as GGUF metadata: what llama.cpp needs to compute the same logits, and a refusal of what it can't.

Source: llama.cpp, src/llama-model.cpp load_hparams, src/models/{llama,qwen2,qwen3,gemma3}.cpp, docs of the format.
"""

from __future__ import annotations

from typing import Any

import torch

from llmlite.checkpoint.families import Family
from llmlite.checkpoint.gguf_config import GEMMA3_27B_LAYERS, llama3_factors
from llmlite.errors import InputError
from llmlite.formats.gguf.writer import Value

ACTIVATIONS = {"llama": "silu", "qwen2": "silu", "qwen3": "silu", "gemma3": "gelu_pytorch_tanh"}


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json in transformers' present form: every default filled in, rope settings under rope_parameters."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config).to_dict()


def head_dim(config: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def model_metadata(family: Family, config: dict[str, Any], where: str) -> dict[str, Value]:
    """The architecture's keys; ``config`` from `full_config`. `InputError` for what llama.cpp does not compute."""
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation != ACTIVATIONS[family.gguf]:
        raise InputError(
            f"{where}: hidden_act {activation!r}; GGUF's {family.gguf} has {ACTIVATIONS[family.gguf]} only"
        )
    width = head_dim(config)
    values: dict[str, Value] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": width,
    }
    values |= _rope(rope_parameters(config), where)
    if family.gguf == "gemma3":
        values |= _gemma3(config, where)
    elif "sliding_attention" in (config.get("layer_types") or ()):
        raise InputError(f"{where}: has sliding-window layers, which GGUF's {family.gguf} does not compute")
    return {"general.architecture": family.gguf, **{f"{family.gguf}.{key}": value for key, value in values.items()}}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rope settings of the layers that attend to everything."""
    rope = config["rope_parameters"]
    return rope.get("full_attention", rope)


def _rope(rope: dict[str, Any], where: str) -> dict[str, Value]:
    kind = rope["rope_type"]
    out: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} has no place in its GGUF")
    if kind in ("default", "llama3"):  # llama3's frequencies travel as a tensor
        return out
    if kind == "linear":
        return {**out, "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "yarn":
        raise InputError(f"{where}: rope type {kind!r} can't be exported; known are default, linear, llama3 and yarn")
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise InputError(f"{where}: yarn with {key} can't be exported; remove it or use another format")
    if not rope.get("truncate", True):
        raise InputError(f"{where}: yarn with truncate = false can't be exported; use another format")
    betas = {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
    return {
        **out,
        **betas,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }


def _gemma3(config: dict[str, Any], where: str) -> dict[str, Value]:
    heads = config["num_attention_heads"]
    scalar = head_dim(config) if config["num_hidden_layers"] != GEMMA3_27B_LAYERS else config["hidden_size"] // heads
    if config["query_pre_attn_scalar"] != scalar:
        raise InputError(
            f"{where}: query_pre_attn_scalar {config['query_pre_attn_scalar']}; GGUF's gemma3 has {scalar}"
        )
    if config.get("attn_logit_softcapping") or config.get("use_bidirectional_attention"):
        raise InputError(f"{where}: attn_logit_softcapping and bidirectional attention have no place in GGUF's gemma3")
    out: dict[str, Value] = {}
    if config.get("final_logit_softcapping"):
        out["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    if not any(sliding):
        return out
    local = config["rope_parameters"].get("sliding_attention", config["rope_parameters"])
    if local["rope_type"] != "default":
        raise InputError(f"{where}: rope type {local['rope_type']!r} in sliding-window layers has no place in GGUF")
    out |= {"attention.sliding_window": config["sliding_window"], "rope.freq_base_swa": float(local["rope_theta"])}
    if sliding != [layer % 6 != 5 for layer in range(len(sliding))]:  # else it is the architecture's own pattern
        out["attention.sliding_window_pattern"] = [*sliding]
    return out


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by under rope type llama3: float32 [head_dim / 2], else None."""
    rope = rope_parameters(config)
    return llama3_factors(rope, head_dim(config)) if rope["rope_type"] == "llama3" else None


def imatrix_metadata(file: str, dataset: str, entries: int, chunks: int) -> dict[str, Value]:
    """The keys that llama-quantize adds where it is given an importance matrix (tools/quantize/quantize.cpp).

    ``file``: where the matrix lies, ``dataset``: the text it was made from, either cut after 127 bytes as there;
    ``entries``: tensors that it has sums for; ``chunks``: pieces of text, left out where it is 0: not known.
    """
    out: dict[str, Value] = {"quantize.imatrix.file": _cut(file)}
    if dataset:
        out["quantize.imatrix.dataset"] = _cut(dataset)
    out["quantize.imatrix.entries_count"] = entries
    if chunks > 0:
        out["quantize.imatrix.chunks_count"] = chunks
    return out


def _cut(text: str) -> str:
    return text.encode()[:127].decode("utf-8", "ignore")  # a whole character less where the cut falls inside it
