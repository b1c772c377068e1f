"""A student before and after its training: made from its teacher, checked against the machine, written."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from llmlite.adapt.influence import measure_layers
from llmlite.adapt.losses import positions_held
from llmlite.adapt.reconstruct import reconstruct
from llmlite.adapt.shape import parameters, shape_of, student_config
from llmlite.adapt.shrink import Text, copy_side_files, write_student
from llmlite.adapt.targets import TOP
from llmlite.adapt.teacher import disk_needed
from llmlite.adapt.training_state import COPIES
from llmlite.checkpoint.artifact import refuse_full_disk, write_json
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.run.text import calibration_rows

if TYPE_CHECKING:
    from llmlite.run.distill import DistillSettings, Job

CHOICE_TOKENS, INFLUENCE_TOKENS, CHECKED_TOKENS = 32768, 8192, 1024  # of text, to choose what stays by
FLOAT = 4


def made_student(job: Job, work: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A student of the teacher in the folder ``work``, and what it lost; an earlier run's where there is one."""
    folder, note = work / "student", work / "made.json"
    if not note.is_file():
        folder.mkdir(exist_ok=True)
        teacher, ids = job.teacher, _varied(job)
        scores: dict[str, Any] = {}
        layers = tuple(range(teacher.num_layers))
        if job.shape.layers < teacher.num_layers:
            length = ids.shape[1]
            some = _spread(ids, INFLUENCE_TOKENS)
            found = measure_layers(teacher, some, max(CHECKED_TOKENS // length, 1), work, job.device, job.dtype)
            gone = found.drop(teacher.num_layers - job.shape.layers)
            layers = tuple(layer for layer in layers if layer not in gone)
            scores = {
                "dropped": list(gone),
                "influence": [round(value, 4) for value in found.influence],
                "divergence_without": {str(layer): round(value, 4) for layer, value in found.divergence.items()},
            }
        text = Text(ids, job.device, job.dtype)
        cut = write_student(teacher, folder, layers, job.shape, text)
        begun = time.monotonic()
        left = {str(layer): round(share, 4) for layer, share in reconstruct(teacher, folder, layers, text).items()}
        taken = {"distance_left": left, "seconds": round(time.monotonic() - begun, 1)}
        write_json(note, {**scores, **cut.to_json(), "reconstructed": taken})
    return open_checkpoint(folder), json.loads(note.read_text())


def _varied(job: Job) -> np.ndarray:
    """Rows of the training's text and, where that is the user's own, as many of the packaged mix: int64 [rows, length].

    What a layer does for one kind of text says little about the others.
    """
    if not job.own_text:
        return _spread(job.taught, CHOICE_TOKENS)
    own = _spread(job.taught, CHOICE_TOKENS // 2)
    mix = calibration_rows(job.teacher, (), own.size, own.shape[1], 0).ids
    return np.random.default_rng(0).permutation(np.concatenate([own, mix]))


def _spread(ids: np.ndarray, tokens: int) -> np.ndarray:
    """At least so many tokens where there are as many, less than twice, from all over the text."""
    return ids[:: max(ids.size // tokens, 1)]


def write_trained(student: Checkpoint, weights: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """The student's checkpoint with trained weights, each in the dtype it had, config.json last."""
    layout = {name: TensorSpec(entry.dtype, entry.shape) for name, entry in student.tensors.items()}
    with SafetensorsWriter(folder, layout) as writer:
        for name, spec in layout.items():
            trained = weights.get(EMBEDDING if name == HEAD and student.tied else name)
            value = student.read(name) if trained is None else trained.detach().to("cpu", spec.dtype)
            if not torch.isfinite(value).all():
                raise InputError(f"{name}: a trained weight does not fit {spec.dtype}; a student in float32 is right")
            writer.write(name, value)
    copy_side_files(student, folder)
    (folder / "config.json").write_text(json.dumps(student.config, indent=2) + "\n")


def check_room(out: Path, job: Job, settings: DistillSettings) -> None:
    """`InputError` where the disk or the memory is too small for the training."""
    teacher, source = job.teacher, job.student or job.teacher
    count = parameters(source, job.shape)
    stored = count * source.dtype.itemsize
    rows, length = job.rows.ids.shape
    logits = disk_needed(rows if not job.live else len(job.held), length, TOP, teacher.config["hidden_size"])
    training = COPIES * FLOAT * count if settings.steps else 0
    refuse_full_disk(out, stored, training + logits + (stored if job.student is None else 0))
    needed = memory_needed(job, settings, count)
    free = psutil.virtual_memory().available
    if needed > free and job.device == "cpu" and settings.steps:
        raise InputError(
            f"distill: the whole student is trained at once, which needs about {needed / 2**20:,.0f} MiB of memory, "
            f"and the machine has {free / 2**20:,.0f} MiB free; a smaller student, --batch-rows 1 or a shorter "
            "--row-length takes less"
        )


def memory_needed(job: Job, settings: DistillSettings, count: int) -> int:
    """Bytes that training a student of ``count`` parameters takes at the peak, about."""
    config = (
        student_config(job.teacher, range(job.shape.layers), job.shape) if job.student is None else job.student.config
    )
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    weights = 4 * FLOAT * count + FLOAT * vocabulary * hidden  # weight, gradient, two moments; the head's gradient
    tokens = settings.batch_rows * job.rows.ids.shape[1]
    each = job.shape.layers * (16 * hidden + 6 * job.shape.ffn)
    if settings.attention:
        each += 2 * job.shape.layers * config["num_attention_heads"] * job.rows.ids.shape[1]
    logits = 5 * positions_held(vocabulary) * vocabulary
    teacher = parameters(job.teacher, shape_of(job.teacher.config)) * job.dtype.itemsize if job.live else 0
    return math.ceil(weights + FLOAT * (tokens * each + logits) + teacher)
