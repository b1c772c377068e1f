"""Tune what is real in an artifact of rounded weights on the base's predictions, at the same bytes and types.

Codes, whole-number scales, embedding and head stay; norms, biases, scales and minimums are trained on KL(base ||
artifact), as the second phase of EfficientQAT (Chen et al. 2024, section 3.3) trains step sizes. Rows that are not
trained on judge: the artifact stays as it was unless they say that the new one, rounded and read back, is nearer.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from llmlite.adapt.artifact_task import TAUGHT, ArtifactSettings, ArtifactTask, activations_fit
from llmlite.adapt.losses import positions_held
from llmlite.adapt.stored import Stored, put_in_place, refusal, rewritten
from llmlite.adapt.student import Student
from llmlite.adapt.targets import TOP, keep_on_disk
from llmlite.adapt.teacher import Teacher, disk_needed
from llmlite.adapt.training import computing_dtype, train
from llmlite.adapt.training_state import COPIES
from llmlite.calibrate.moments import HELD_EVERY
from llmlite.checkpoint.artifact import JOURNAL, TRAINING
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD, LAYER
from llmlite.errors import InputError
from llmlite.memory import free_memory, give_freed_memory_back
from llmlite.plan.types import GgufTypes, SafetensorsTypes

WORK = f"{TRAINING}repair"  # the folder of the training's state
SMALLEST_GROUP = 16  # weights that share a real scale, at least


@dataclass(frozen=True)
class RepairSettings(ArtifactSettings):
    """How long and how fast to train norms and scales. ``rate`` is a relative change per step."""

    steps: int = field(default=128, metadata={"help": "steps of repair at most"})
    rate: float = 1e-3
    judge_every: int = 16
    save_every: int = 16
    held_rows: int = 16


@dataclass(frozen=True)
class Repaired:
    """Divergence from the base on held-out rows in nats per token, of the artifact before and as it is now.

    ``steps``: trained in all; ``best_step``: whose values were kept, 0 where the artifact stayed as it was, which
    ``note`` then says.
    """

    before: float
    after: float
    steps: int
    best_step: int
    seconds: float
    note: str | None = None


def check_repair(
    checkpoint: Checkpoint,
    types: GgufTypes | SafetensorsTypes,
    ids: np.ndarray,
    settings: RepairSettings,
    device: str = "cpu",
) -> None:
    """`InputError` for what `repair` can't do, before any work: ``ids`` int64 [rows, length] is the text."""
    reason = None if isinstance(types, GgufTypes) else refusal(types)
    if reason is not None:
        raise InputError(f"--repair: {reason}; or leave it out")
    if settings.steps < 1:
        raise InputError(f"--repair-steps {settings.steps}: at least 1 is right")
    if len(ids) < HELD_EVERY:
        raise InputError(
            f"--repair: the calibration text has {len(ids)} rows, and at least {HELD_EVERY} are right: every "
            f"{HELD_EVERY}th judges what the others train"
        )
    needed, free = memory_needed(checkpoint, settings.batch_rows * ids.shape[1]), free_memory(device)
    if needed > free:
        raise InputError(
            f"--repair: the whole model is trained at once, which needs about {needed / 2**20:,.0f} MiB of memory, and "
            f"{free / 2**20:,.0f} MiB are free; leave it out"
        )


def memory_needed(checkpoint: Checkpoint, tokens: int) -> int:
    """Bytes that `repair` takes at the peak for batches of so many tokens, with activations made twice, about."""
    sizes = {name: math.prod(entry.shape) for name, entry in checkpoint.tensors.items()}
    linears = {name: size for name, size in sizes.items() if name.startswith(LAYER) and "_proj." in name}
    outer = sizes[EMBEDDING] + (0 if checkpoint.tied else sizes[HEAD])
    # Code, step, and of each group in float32: factor, change, slope, Adam's two, best. The head in a dtype of its own.
    weights = 2 * sum(linears.values()) + 4 * 6 * _trained(checkpoint) + 8 * outer
    wide = sum(checkpoint.tensors[name].shape[0] for name in linears if name.startswith(f"{LAYER}0."))
    hidden, vocabulary = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
    activations = 4 * tokens * (hidden * (checkpoint.num_layers + 16) + 4 * wide)
    logits = 4 * 5 * positions_held(vocabulary) * vocabulary
    return (weights + activations + logits + 4 * 4 * max(linears.values())) * 3 // 2  # the heap holds some back


def _trained(checkpoint: Checkpoint) -> int:
    """Real numbers that are trained, at most: what is not a group's is far less."""
    sizes = [math.prod(e.shape) for name, e in checkpoint.tensors.items() if name.startswith(LAYER)]
    return sum(sizes) // SMALLEST_GROUP


def repair(
    checkpoint: Checkpoint,
    stored: Stored,
    ids: np.ndarray,
    settings: RepairSettings,
    scratch: Path,
    device: str = "cpu",
) -> Repaired:
    """Tune ``stored``, the weights of an artifact of ``checkpoint``, in place: each file is replaced in one step by one
    of the same layout.

    ``ids`` int64 [rows, length] is the text, every eighth row held out. It should be none that codes were fitted to: on
    that the artifact is far nearer to its base than elsewhere, and there is little to learn. In the folder ``scratch``
    the base's predictions and the training's state are kept meanwhile, and what a killed run left there is gone on
    with. The artifact is never worse on the held-out rows than it was, judged in float32. Raises as `check_repair` and
    `train` do.
    """
    start = time.monotonic()
    ids, folder, dtype = _enough(ids, settings), scratch / WORK, computing_dtype("auto", torch.device(device))
    folder.mkdir(exist_ok=True)
    teacher = keep_on_disk(checkpoint, ids, folder / TAUGHT, device, dtype)
    before = _judged(checkpoint, stored, ids, teacher, settings, device)
    recompute = not activations_fit(checkpoint, settings.batch_rows * ids.shape[1], device)
    student = Student(checkpoint, stored, device, dtype, recompute=recompute)
    trained = train(ArtifactTask(student, ids, teacher, settings), settings, folder, "repair")
    values = student.values() if trained.best_step else None
    del student
    give_freed_memory_back()
    try:
        after = before
        if values is not None:
            after = _judged(checkpoint, stored.rewrite(values), ids, teacher, settings, device)
        nearer = after < before
        if nearer:
            (scratch / JOURNAL).unlink(missing_ok=True)  # its layers are no longer what the files hold: no run goes on
            put_in_place(stored)
    finally:
        for file in stored.files:
            rewritten(file).unlink(missing_ok=True)
    shutil.rmtree(folder)
    seconds = round(time.monotonic() - start, 1)
    if nearer:
        return Repaired(before, after, trained.steps, trained.best_step, seconds)
    note = f"repair: {trained.steps} steps made the artifact no nearer to its base on held-out text, so it is as it was"
    return Repaired(before, before, trained.steps, 0, seconds, note)


def repair_scratch(checkpoint: Checkpoint, ids: np.ndarray, settings: RepairSettings) -> int:
    """Bytes on disk that `repair` takes while it runs, beside a second copy of the weights."""
    rows, length = _enough(ids, settings).shape
    return disk_needed(rows, length, TOP, checkpoint.config["hidden_size"]) + 4 * COPIES * _trained(checkpoint)


def rows_wanted(settings: RepairSettings) -> int:
    """Rows of text that are enough for all steps and their judges."""
    taken = settings.steps * settings.batch_rows * settings.accumulate
    return max(-(-taken * HELD_EVERY // (HELD_EVERY - 1)), settings.held_rows * HELD_EVERY)


def _enough(ids: np.ndarray, settings: RepairSettings) -> np.ndarray:
    """As many of the rows as the steps take and their judges, spread over the text."""
    wanted = rows_wanted(settings)
    return ids if len(ids) <= wanted else ids[np.linspace(0, len(ids) - 1, wanted).round().astype(int)]


def _judged(
    checkpoint: Checkpoint, stored: Stored, ids: np.ndarray, teacher: Teacher, settings: RepairSettings, device: str
) -> float:
    """What held-out rows say of the files, computed in float32."""
    return ArtifactTask(Student(checkpoint, stored, device), ids, teacher, settings).judge()
