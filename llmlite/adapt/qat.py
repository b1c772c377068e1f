"""Quantization-aware training: the codes, scales and norms of a written artifact trained on the base's predictions.

It begins at the codes and scales that are there, best those of error feedback, and lowers KL(base || artifact) through
the rounding: the straight-through estimator (Bengio et al. 2013) for codes, learned scales (as in LSQ, Esser et al.
2020), all layers at once. What is trained is what the file holds, on the same grid, in the same bytes: nothing is
rounded afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from llmlite.adapt.artifact_task import TAUGHT, ArtifactSettings, ArtifactTask, activations_fit
from llmlite.adapt.losses import positions_held
from llmlite.adapt.stored import Stored, refusal
from llmlite.adapt.student import Student
from llmlite.adapt.targets import keep_on_disk
from llmlite.adapt.training import Trained, check_training, computing_dtype, train
from llmlite.calibrate.moments import HELD_EVERY
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD, LAYER
from llmlite.errors import InputError
from llmlite.formats.gguf import types as gguf
from llmlite.memory import free_memory
from llmlite.plan.types import GgufTypes, SafetensorsTypes

EXPERIMENTAL = "2 bits by training through the rounding are experimental: measure before use"


@dataclass(frozen=True)
class QatSettings(ArtifactSettings):
    """How to train codes, scales and norms."""

    steps: int = field(default=96, metadata={"help": "steps of the optimizer"})
    # 0.005 turns the codes back that feedback chose against the weight: SmolLM2 at 3 bits went from 0.34 to 1.59 nats
    rate: float = field(default=0.0007, metadata={"help": "how far a code may move in a step, at its highest"})
    judge_every: int = field(default=32, metadata={"help": "steps between two looks at the held-out rows"})
    save_every: int = field(default=32, metadata={"help": "steps after which the state for --resume is written"})
    scale_rate: float = 1.5
    norm_rate: float = 1.5


def check_qat(
    checkpoint: Checkpoint,
    types: GgufTypes | SafetensorsTypes,
    ids: np.ndarray,
    settings: QatSettings,
    device: str = "cpu",
) -> tuple[str, ...]:
    """`InputError` for what can't be trained, before any work; sentences that belong in the manifest.

    ``ids`` int64 [rows, length] is the text.
    """
    check_training(settings)
    grids = _grids(checkpoint, types)
    for kind, grid in grids.items():
        if grid.codebook is not None:
            raise InputError(
                f"{kind}: its values are not evenly spaced, and codes are trained on even ones; gptq:w3g64, "
                "compressed-tensors:w4a16 and alike, or quantize --repair, which trains its scales, are right"
            )
    if len(ids) < HELD_EVERY:
        raise InputError(
            f"the training text has {len(ids)} rows, and at least {HELD_EVERY} are right: every {HELD_EVERY}th judges "
            "what the others train"
        )
    needed, free = memory_needed(checkpoint), free_memory(device)
    if needed > free:
        raise InputError(
            f"training through the rounding holds the whole model with AdamW's moments, about {needed / 2**20:,.0f} "
            f"MiB, and {free / 2**20:,.0f} MiB are free; quantize --repair needs far less"
        )
    return (EXPERIMENTAL,) if any(grid.bits == 2 for grid in grids.values()) else ()


def _grids(checkpoint: Checkpoint, types: GgufTypes | SafetensorsTypes) -> dict[str, Any]:
    """The grids of linear layers by the names of their types."""
    if isinstance(types, GgufTypes):
        linears = tuple(f"{name}.weight" for name in checkpoint.family.linears)
        assigned = types.assign(checkpoint).types
        kinds = {kind for name, kind in assigned.items() if name.endswith(linears)}
        found = {f"gguf:{kind}": gguf.TYPES[kind].grid for kind in sorted(kinds)}
    else:
        reason = refusal(types)
        if reason is not None:
            raise InputError(reason)
        grid = types.grid or types.format.grid  # type: ignore[union-attr]
        found = {f"{types.format.name}:{types.linear}": grid}
    grids = {kind: grid for kind, grid in found.items() if grid is not None}
    if not grids:
        raise InputError(f"{', '.join(found)}: has no codes to train")
    return grids


def memory_needed(checkpoint: Checkpoint) -> int:
    """Bytes that training takes at the peak with each layer's activations made twice, about."""
    sizes = {name: math.prod(entry.shape) for name, entry in checkpoint.tensors.items()}
    linears = sum(size for name, size in sizes.items() if name.startswith(LAYER) and "_proj." in name)
    outer = sizes[EMBEDDING] + (0 if checkpoint.tied else sizes[HEAD])
    vocabulary = checkpoint.config["vocab_size"]
    # Latent, slope, two moments and a copy of the best in 4 bytes, the weight in 2, steps and codes in 1.
    return (24 * linears + 8 * outer) * 5 // 4 + 4 * 5 * positions_held(vocabulary) * vocabulary


def qat(
    checkpoint: Checkpoint, stored: Stored, ids: np.ndarray, settings: QatSettings, folder: Path, device: str = "cpu"
) -> Trained:
    """Train ``stored``, the weights of an artifact of ``checkpoint``, on text ``ids`` int64 [rows, length].

    Where held-out rows say that the result is nearer to the base (``best_step`` above 0), it lies beside the old files,
    `rewritten` of each, for `put_in_place`. In ``folder`` the base's predictions and the training's state are kept, and
    what an earlier run left there is gone on with; the stored files must be those that it began with. ``seconds`` are
    those of the training, without the base's predictions. Raises as `train` does.
    """
    dtype = computing_dtype(settings.dtype, torch.device(device))
    with PartialState().main_process_first():  # the others take what the first one wrote
        teacher = keep_on_disk(checkpoint, ids, folder / TAUGHT, device, dtype)
    recompute = not activations_fit(checkpoint, settings.batch_rows * ids.shape[1], device)
    student = Student(checkpoint, stored, device, dtype, codes=True, recompute=recompute)
    task = ArtifactTask(student, ids, teacher, settings)
    trained = train(task, settings, folder, "training codes")
    if trained.best_step and PartialState().is_main_process:
        stored.rewrite(student.values())
    return trained
