"""A GGUF file as a Hugging Face checkpoint directory, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmlite
from llmlite.checkpoint import gguf_names
from llmlite.checkpoint.artifact import (
    atomic_directory,
    origin_sha256,
    refuse_existing,
    refuse_full_disk,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import expected_shapes
from llmlite.checkpoint.families import Family, family_of_gguf
from llmlite.checkpoint.gguf_config import import_config
from llmlite.checkpoint.gguf_header import GgufFile, GgufTensor, read_gguf
from llmlite.checkpoint.gguf_tokenizer import ImportedTokenizer, import_tokenizer
from llmlite.checkpoint.reorder import Order, random_order
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.extras import need

PROBE = "Don't  stop 12345\n\n\tif x == 1_000:  # we'LL see\r\n 语言模型 🚀 naïve «x» \u2028 ...!?"
NOT_WEIGHTS = (gguf_names.ROPE_FREQS,)  # config.json says the same


def import_gguf(file: Path, out: Path, dtype: torch.dtype = torch.float32, reorder_seed: int | None = None) -> None:
    """Write the model in ``file`` to the new directory ``out``, its weights dequantized and stored as ``dtype``.

    With ``reorder_seed`` the channels are reordered at random, exactly (see `reorder`). Needs memory for a few
    copies of the largest tensor in float32. config.json comes last, so that what a killed run leaves behind opens
    nowhere. Raises `InputError` in one sentence for a file that is truncated, is of an unknown architecture, lacks a
    tensor, has a value that ``dtype`` can't hold, or a tokenizer or a setting that the checkpoint could not state.
    """
    refuse_existing(out)
    source = read_gguf(file)
    architecture = source.metadata.get("general.architecture")
    family = family_of_gguf(str(architecture), str(file))
    _refuse_unreadable(source)
    config = import_config(source, family)
    members = _members(source, family, config)
    tokenizer = import_tokenizer(source.metadata, str(file))
    rows = len(source.metadata["tokenizer.ggml.tokens"])
    if rows != config["vocab_size"]:
        raise InputError(f"{file}: lists {rows} tokens and the embedding has {config['vocab_size']} rows")
    config |= {"dtype": str(dtype).removeprefix("torch."), **_token_ids(tokenizer)}
    order = None if reorder_seed is None else random_order(family, config, reorder_seed)
    layout = {name: TensorSpec(dtype, tensor.shape) for name, tensor in members.items()}
    refuse_full_disk(out, sum(spec.nbytes for spec in layout.values()))
    with atomic_directory(out) as directory:
        _write_json(directory / "generation_config.json", _generation(tokenizer))
        tokenizer.save(directory)
        _refuse_other_reading(directory, config, file)
        with SafetensorsWriter(directory, layout) as writer:
            for name, tensor in members.items():
                weight = _weight(name, tensor, family, config, order)
                writer.write(name, _cast(weight, dtype, f"{file}: tensor {tensor.name!r}"))
        _write_json(directory / "config.json", config)
        write_manifest(directory, _manifest(source, directory, reorder_seed))


def _members(source: GgufFile, family: Family, config: dict[str, Any]) -> dict[str, GgufTensor]:
    """Hugging Face name -> tensor, in transformers' order, every one that the config implies and nothing else."""
    by_name = {gguf_names.hf_name(family, name): tensor for name, tensor in source.tensors.items()}
    for name in source.tensors:
        if gguf_names.hf_name(family, name) is None and name not in NOT_WEIGHTS:
            raise InputError(f"{source.file}: tensor {name!r} is not part of a {family.name} model")
    members = {}
    for name, shape in expected_shapes(config, family, str(source.file)).items():
        if name not in by_name:
            lacking = gguf_names.gguf_name(family, name)
            raise InputError(f"{source.file}: tensor {lacking!r} is missing, which a {family.name} model needs")
        tensor = by_name.pop(name)
        if tensor.shape != shape:
            found, wanted = list(tensor.shape), list(shape)
            raise InputError(f"{source.file}: tensor {tensor.name!r} has shape {found}; the header implies {wanted}")
        members[name] = tensor
    by_name.pop(None, None)
    for tensor in by_name.values():
        raise InputError(f"{source.file}: tensor {tensor.name!r} is more than the header's {family.name} model has")
    return members


def _refuse_unreadable(source: GgufFile) -> None:
    gguf = need("gguf", "gguf")
    for name in {tensor.type for tensor in source.tensors.values()} - {"f32", "f16"}:
        kind = gguf.GGMLQuantizationType[name.upper()]
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            raise InputError(f"{source.file}: has tensors of type {name}, which can't be turned into floats") from None


def _refuse_other_reading(directory: Path, config: dict[str, Any], file: Path) -> None:
    """`InputError` where transformers reads the tokenizer by rules of the model type and not by tokenizer.json."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    written = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model_type = directory / "config.json"  # where AutoTokenizer looks for it; gone again while the weights are written
    _write_json(model_type, config)
    read = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    model_type.unlink()
    if written.pre_tokenizer is None:
        same = written.encode(PROBE).ids == read.encode(PROBE).ids
    else:
        cuts = written.pre_tokenizer.pre_tokenize_str(PROBE)
        same = read.pre_tokenizer is not None and read.pre_tokenizer.pre_tokenize_str(PROBE) == cuts
    if not same:
        raise InputError(
            f"{file}: transformers reads the tokenizer of this model type by other rules than the file's, so that "
            "the checkpoint would give other token ids"
        )


def _weight(name: str, tensor: GgufTensor, family: Family, config: dict[str, Any], order: Order | None) -> torch.Tensor:
    weight = tensor.read()
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = gguf_names.gguf_rows(family, name, heads, kv_heads, config["head_dim"])
    if rows is not None:
        weight = weight[rows.argsort()]
    shift = gguf_names.norm_shift(family, name)
    if shift:
        weight = weight - shift
    return weight if order is None else order.apply(name, weight)


def _cast(weight: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    stored = weight.to(dtype)
    infinite = stored.isinf()
    if infinite.any() and weight[infinite].isfinite().any():
        largest = weight[weight.isfinite()].abs().max()
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        short = str(dtype).removeprefix("torch.")
        raise InputError(f"{where} holds a weight of magnitude {largest:.3g}, too large for {short}; use {wider}")
    return stored


def _token_ids(tokenizer: ImportedTokenizer) -> dict[str, Any]:
    ids = tokenizer.ids
    return {"bos_token_id": ids.get("bos"), "eos_token_id": ids.get("eos"), "pad_token_id": ids.get("padding")}


def _generation(tokenizer: ImportedTokenizer) -> dict[str, Any]:
    ids = {key: value for key, value in _token_ids(tokenizer).items() if value is not None}
    if tokenizer.ends:
        ids["eos_token_id"] = tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.ends[0]
    return ids


def _manifest(source: GgufFile, directory: Path, reorder_seed: int | None) -> dict[str, Any]:
    return {
        "llmlite": llmlite.__version__,
        "kind": "import",
        "base": {
            "source": source.file.name,
            "name": source.metadata.get("general.name"),
            "bytes": source.file.stat().st_size,
            "config_sha256": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
            "origin_config_sha256": origin_sha256(source.file.parent),
        },
        "reordered_seed": reorder_seed,
        "source_types": dict(Counter(tensor.type for tensor in source.tensors.values()).most_common()),
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
