"""A checkpoint with a LoRA adapter merged into its weights, tensor by tensor as they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.computed import computed
from llmlite.checkpoint.families import HEAD
from llmlite.checkpoint.safetensors_index import TensorEntry
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.formats.peft import Adapter, Pair
from llmlite.progress import track


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint whose weights have the adapter in them, float32 when read (see `Pair.applied`).

    Nothing is computed before it is read. `InputError` for an adapter of other shapes, and of a head that is tied.
    """
    adapter.check({name: entry.shape for name, entry in checkpoint.tensors.items()}, checkpoint.source)
    head = HEAD.removesuffix(".weight")
    if checkpoint.tied and head in adapter.pairs:
        raise InputError(
            f"{adapter.directory}: changes {head}, which is the embedding in {checkpoint.source} too; an "
            "adapter of the layers can be merged"
        )
    entries = dict(checkpoint.tensors)
    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        entry = entries[name]
        make = partial(_merged, f"{checkpoint.source} with {adapter.directory}", name, entry, pair)
        entries[name] = computed(name, entry.dtype, entry.shape, [adapter.weights, *entry.files], make)
    return replace(checkpoint, source=f"{checkpoint.source} with {adapter.directory}", tensors=entries)


def _merged(where: str, name: str, entry: TensorEntry, pair: Pair) -> torch.Tensor:
    weight = pair.applied(entry.read())
    if not torch.isfinite(weight).all():
        raise InputError(f"{where}: tensor {name!r} holds NaN or infinite values")
    return weight


def stored_layout(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """What `write_checkpoint` puts into its files: every tensor in its own dtype, or all in ``dtype``."""
    names = [name for name in checkpoint.tensors if not name.endswith("inv_freq")]
    entries = {name: checkpoint.tensors[name] for name in names}
    return {name: TensorSpec(dtype or entry.dtype, entry.shape) for name, entry in entries.items()}


def write_checkpoint(checkpoint: Checkpoint, layout: dict[str, TensorSpec], directory: Path) -> None:
    """Write a plain checkpoint that transformers loads: weights, tokenizer files, config.json last.

    `InputError` for a value that the dtype can't hold.
    """
    with SafetensorsWriter(directory, layout) as writer:
        for name, spec in track(layout.items(), "merging"):
            kept = checkpoint.read(name).to(spec.dtype)
            if not torch.isfinite(kept).all():
                raise InputError(f"{checkpoint.source}: {name} has values beyond the range of {spec.dtype}")
            writer.write(name, kept)
    for file in checkpoint.side_files():
        copy = directory / file.relative_to(checkpoint.directory)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    config["dtype"] = str(next(iter(layout.values())).dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
