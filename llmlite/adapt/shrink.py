"""A student from its teacher: whole layers, FFN channels and key/value heads left out, the rest wired up exactly.

The student is a plain checkpoint of the same architecture with the same widths in every layer, so that whatever loads
the teacher loads it. Each layer keeps its own choice of channels and heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.adapt.shape import Shape, axes_of, cut_shape, shape_of, student_config
from llmlite.adapt.teacher import BATCH_TOKENS
from llmlite.adapt.widths import DOWN, OUTPUT, Kept, Ordering, Part, channels_of, choose
from llmlite.calibrate.moments import MomentSums
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track


@dataclass(frozen=True)
class Cut:
    """What a student has of its teacher: ``layers`` by the teacher's numbers, and what each of them kept, without its
    weights.
    """

    layers: tuple[int, ...]
    shape: Shape
    kept: tuple[Kept, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; of FFN channels their share of the layer's importance, as there are too many to name."""
        each = [
            {
                "layer": layer,
                "kv_heads": part.kv_heads.tolist(),
                "ffn_importance_kept": round(part.ffn_importance, 4),
                "error_after_repair": {name: round(error, 4) for name, error in part.errors.items()},
            }
            for layer, part in zip(self.layers, self.kept, strict=True)
        ]
        return {"shape": asdict(self.shape), "kept": each}


def cut_tensor(checkpoint: Checkpoint, name: str, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """A layer's tensor with the channels and heads that are kept."""
    kv_heads = shape_of(checkpoint.config).kv_heads
    for dimension, axis in enumerate(axes_of(checkpoint, name)):
        if axis == "ffn":
            tensor = tensor.index_select(dimension, kept.ffn)
        elif axis == "heads":
            width = tensor.shape[dimension] // kv_heads  # of a key/value head, or of all queries that share one
            tensor = tensor.index_select(dimension, channels_of(kept.kv_heads, width))
    return tensor


@dataclass(frozen=True)
class Text:
    """Token rows int64 [rows, length] that the teacher runs to choose by, and how."""

    ids: np.ndarray
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def write_student(
    checkpoint: Checkpoint,
    out: Path,
    layers: tuple[int, ...],
    shape: Shape,
    text: Text,
    ordering: Ordering = "activation",
) -> Cut:
    """Write a student with these ``layers`` into the directory ``out``, config.json last; one layer is in memory.

    Everything keeps its dtype. ``ordering`` is that of the FFN channels; others than "activation" are there to be
    measured against it.
    """
    config = student_config(checkpoint, layers, shape)
    layout = {
        name: TensorSpec(e.dtype, e.shape) for name, e in checkpoint.tensors.items() if not name.startswith(LAYER)
    }
    places: dict[int, dict[str, str]] = {}  # of each layer the teacher's names and the student's
    for place, layer in enumerate(layers):
        old, new = f"{LAYER}{layer}.", f"{LAYER}{place}."
        places[layer] = {name: new + name.removeprefix(old) for name in checkpoint.layer_tensors(layer)}
        for name, student_name in places[layer].items():
            entry = checkpoint.tensors[name]
            layout[student_name] = TensorSpec(entry.dtype, cut_shape(checkpoint, shape, name, entry.shape))
    kept = []
    with SafetensorsWriter(out, layout) as writer:
        for name in layout:
            if not name.startswith(LAYER):
                writer.write(name, checkpoint.read(name))
        for layer, choice in _choices(checkpoint, layers, shape, text, out, ordering):
            for name, student_name in places[layer].items():
                whole = choice.weights.get(name.removeprefix(f"{LAYER}{layer}."), checkpoint.read(name))
                writer.write(student_name, cut_tensor(checkpoint, name, whole, choice).to(layout[student_name].dtype))
            kept.append(replace(choice, weights={}))
    copy_side_files(checkpoint, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Cut(tuple(layers), shape, tuple(kept))


def copy_side_files(checkpoint: Checkpoint, out: Path) -> None:
    """Tokenizer, chat template and generation settings as they are."""
    for file in checkpoint.side_files():
        target = out / file.relative_to(checkpoint.directory)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())


def _choices(
    checkpoint: Checkpoint, layers: tuple[int, ...], shape: Shape, text: Text, folder: Path, ordering: Ordering
) -> Iterator[tuple[int, Kept]]:
    """Each layer that stays, in order, and what it keeps."""
    whole = shape_of(checkpoint.config)
    if (shape.ffn, shape.kv_heads) == (whole.ffn, whole.kv_heads):
        for layer in layers:
            yield layer, Kept(torch.arange(whole.ffn), torch.arange(whole.kv_heads))
        return
    stream = LayerStream(checkpoint, text.device, text.dtype)
    batch = max(BATCH_TOKENS // text.ids.shape[1], 1)
    hidden = stream.embed(text.ids, folder / ".hidden", batch)
    try:
        for layer in track(range(layers[-1] + 1), "what each layer keeps"):
            parts = _run(stream, layer, hidden, batch)
            if layer in layers:
                scores = _scores(checkpoint, layer, ordering)
                yield layer, choose(parts[0], parts[1], shape.ffn, (shape.kv_heads, whole.kv_heads), scores)
            give_freed_memory_back()
    finally:
        hidden.remove()


def _run(stream: LayerStream, layer: int, hidden: Activations, batch: int) -> tuple[Part, Part]:
    """The down and output projections of a layer with the moments of their inputs, float32 and in memory; the layer's
    outputs take the place of its inputs.
    """
    start, rows = 0, hidden.shape[0]
    with stream.layer(layer) as module:
        linears = [module.get_submodule(name.removesuffix(".weight")) for name in (DOWN, OUTPUT)]
        sums, handles = [], []
        for linear in linears:
            assert isinstance(linear, torch.nn.Linear)
            total = MomentSums(linear.in_features, rows, stream.device)
            sums.append(total)
            handles.append(linear.register_forward_pre_hook(_adder(total, lambda: start)))
        for start in range(0, rows, batch):
            hidden.write(start, stream.forward(layer, module, hidden.read(start, batch)))
        for handle in handles:
            handle.remove()
    found = []
    for name, total in zip((DOWN, OUTPUT), sums, strict=True):
        if not total.finite:
            raise InputError(
                f"{stream.checkpoint.source}: the inputs of {LAYER}{layer}.{name} are not all finite on the text; "
                "weights with which the model computes are right"
            )
        weight = stream.checkpoint.read(f"{LAYER}{layer}.{name}").to(stream.device, torch.float32)
        found.append(Part(weight, total.moments()))
    return found[0], found[1]


def _adder(total: MomentSums, start: Callable[[], int]) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    def add(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        total.add(start(), args[0])

    return add


def _scores(checkpoint: Checkpoint, layer: int, ordering: Ordering) -> dict[str, torch.Tensor]:
    """What stands in for the importance of FFN channels under another ordering than by activation."""
    if ordering == "activation":
        return {}
    down = checkpoint.read(f"{LAYER}{layer}.{DOWN}").float()
    if ordering == "random":
        return {"ffn": torch.rand(down.shape[1], generator=torch.Generator().manual_seed(layer))}
    rows = [checkpoint.read(f"{LAYER}{layer}.mlp.{name}_proj.weight").float() for name in ("gate", "up")]
    return {"ffn": down.square().sum(0) + sum(row.square().sum(1) for row in rows)}
