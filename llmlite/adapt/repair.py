"""Tune what is real in an artifact of rounded weights on the base's predictions, at the same bytes and types.

Codes, whole-number scales, embedding and head stay; norms, biases, scales and minimums are trained with Adam on
KL(base || artifact), as the second phase of EfficientQAT (Chen et al. 2024, section 3.3) trains step sizes. Rows that
are not trained on judge: the artifact stays as it was unless they say that the new one, rounded and read back, is
nearer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from llmlite.adapt.stored import Stored, Value, put_in_place, refusal, rewritten
from llmlite.adapt.student import Student
from llmlite.adapt.teacher import (
    LOGIT_ROWS,
    Teacher,
    disk_needed,
    divergence,
    held_rows,
    logits_of,
    teach,
    trained_rows,
)
from llmlite.calibrate.moments import HELD_EVERY
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import JOURNAL
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD, LAYER
from llmlite.errors import InputError
from llmlite.memory import give_freed_memory_back
from llmlite.plan.types import GgufTypes, SafetensorsTypes
from llmlite.progress import track


@dataclass(frozen=True)
class RepairSettings:
    """How long and how fast to train. The rates are relative changes per step at the start; they fall as a cosine."""

    steps: int = field(default=64, metadata={"help": "steps of repair at most"})
    batch_rows: int = 2
    norm_rate: float = 1e-3
    scale_rate: float = 1e-3
    top: int = 512
    judge_every: int = 8
    patience: int = 3
    held_rows: int = 16
    seed: int = 0
    device: str = "cpu"


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
    checkpoint: Checkpoint, types: GgufTypes | SafetensorsTypes, ids: np.ndarray, settings: RepairSettings
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
    needed, free = memory_needed(checkpoint, ids.shape[1]), psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"--repair: the whole model is trained at once, which needs about {needed / 2**20:,.0f} MiB of memory, and "
            f"the machine has {free / 2**20:,.0f} MiB free; leave it out"
        )


def memory_needed(checkpoint: Checkpoint, length: int) -> int:
    """Bytes that `repair` takes at the peak for rows of ``length`` tokens, about."""
    sizes = {name: math.prod(entry.shape) for name, entry in checkpoint.tensors.items()}
    linears = {name: size for name, size in sizes.items() if name.startswith(LAYER) and "_proj." in name}
    outer = sizes[EMBEDDING] + (0 if checkpoint.tied else sizes[HEAD])
    weights = 3 * sum(linears.values()) + 4 * outer  # code, step, an eighth of: factor, change, slope, Adam's two, best
    wide = sum(checkpoint.tensors[name].shape[0] for name in linears if name.startswith(f"{LAYER}0."))
    hidden, vocabulary = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
    activations = 4 * length * (hidden * (checkpoint.num_layers + 16) + 4 * wide)
    logits = 4 * 10 * LOGIT_ROWS * vocabulary
    return (weights + activations + logits + 4 * 4 * max(linears.values())) * 3 // 2  # the heap holds some back


def repair(checkpoint: Checkpoint, stored: Stored, rows: Rows, settings: RepairSettings, scratch: Path) -> Repaired:
    """Tune ``stored``, the weights of an artifact of ``checkpoint``, in place: each file is replaced in one step by one
    of the same layout.

    ``rows`` is the calibration text, every eighth row held out; in the folder ``scratch`` the base's predictions are
    kept meanwhile. The artifact is never worse on the held-out rows than it was. `InputError` as `check_repair` says.
    """
    start = time.monotonic()
    trained, held = _chosen(len(rows.ids), settings)
    used = sorted({*trained, *held})
    ids = rows.ids[used]
    place = {row: number for number, row in enumerate(used)}
    teacher = teach(checkpoint, ids, scratch, settings.top, settings.device)
    try:
        run = _Run(checkpoint, ids, teacher, [place[row] for row in held], settings)
        before, steps, best = run.train(stored, [place[row] for row in trained])
        after = before
        if best is not None:
            after = run.judged(Student(checkpoint, stored.rewrite(best.values), settings.device))
        if best is None or not after < before:
            note = f"repair: {steps} steps made the artifact no nearer to its base on held-out text, so it is as it was"
            return Repaired(before, before, steps, 0, round(time.monotonic() - start, 1), note)
        (scratch / JOURNAL).unlink(missing_ok=True)  # its layers are no longer what the files hold: no run goes on here
        put_in_place(stored)
        return Repaired(before, after, steps, best.step, round(time.monotonic() - start, 1))
    finally:
        for file in stored.files:
            rewritten(file).unlink(missing_ok=True)
        teacher.remove()


def repair_scratch(checkpoint: Checkpoint, ids: np.ndarray, settings: RepairSettings) -> int:
    """Bytes on disk that the base's predictions take while `repair` runs, beside a second copy of the weights."""
    trained, held = _chosen(len(ids), settings)
    rows = len({*trained, *held})
    return disk_needed(rows, ids.shape[1], settings.top, checkpoint.config["hidden_size"])


def _chosen(rows: int, settings: RepairSettings) -> tuple[list[int], list[int]]:
    """The row of each place in each step's batch, and the rows that judge, spread over the text."""
    others = trained_rows(rows)
    chance, wanted = np.random.default_rng(settings.seed), settings.steps * settings.batch_rows
    epochs = [chance.permutation(others) for _ in range(-(-wanted // len(others)))]
    return np.concatenate(epochs)[:wanted].tolist(), held_rows(rows, settings.held_rows)


@dataclass(frozen=True)
class _Best:
    step: int
    values: dict[str, Value]


class _Run:
    """Trains and judges students on the same rows ``ids`` of text, ``held`` their numbers that judge."""

    def __init__(
        self, checkpoint: Checkpoint, ids: np.ndarray, teacher: Teacher, held: list[int], settings: RepairSettings
    ):
        self.checkpoint, self.teacher, self.held, self.settings = checkpoint, teacher, held, settings
        self.ids = torch.from_numpy(ids)

    def train(self, stored: Stored, order: list[int]) -> tuple[float, int, _Best | None]:
        """The held-out divergence as stored, the steps made, and the best values if any are better than those stored.

        ``order``: the rows of the batches, one behind the other.
        """
        settings = self.settings
        student = Student(self.checkpoint, stored, settings.device)
        before = least = self.judged(student)
        best, since = None, 0
        optimizer = torch.optim.Adam(
            [
                {"params": list(student.vector_changes().values()), "lr": settings.norm_rate},
                {"params": list(student.factor_changes().values()), "lr": settings.scale_rate},
            ],
            betas=(0.9, 0.95),
            eps=1e-12,  # one group's share of the slope is far below Adam's default
        )
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(settings.steps))
        for step in track(range(1, settings.steps + 1), "repair"):
            for row in order[(step - 1) * settings.batch_rows : step * settings.batch_rows]:
                self._backward(student, row)
            optimizer.step()
            optimizer.zero_grad()
            fall.step()
            if step % settings.judge_every and step < settings.steps:
                continue
            now = self.judged(student)
            if now < least:
                least, best, since = now, _Best(step, student.values()), 0
            else:
                since += 1
            if since == settings.patience:
                break
        del student, optimizer
        give_freed_memory_back()
        return before, step, best

    @torch.no_grad()
    def judged(self, student: Student) -> float:
        """The mean divergence in nats per token over the held-out rows."""
        total = 0.0
        for row in self.held:
            hidden = student.hidden(self.ids[row : row + 1])[0]
            total += sum(float(kl.sum(dtype=torch.float64)) for kl in self._divergences(student, hidden, row))
        return total / (len(self.held) * self.ids.shape[1])

    def _backward(self, student: Student, row: int) -> None:
        """Add one row's share of a batch to the slopes; the logits of a few positions are held at a time."""
        hidden = student.hidden(self.ids[row : row + 1])
        leaf = hidden.detach().requires_grad_()
        for kl in self._divergences(student, leaf[0], row):
            (kl.sum() / (self.ids.shape[1] * self.settings.batch_rows)).backward()
        hidden.backward(leaf.grad)

    def _divergences(self, student: Student, hidden: torch.Tensor, row: int) -> Iterator[torch.Tensor]:
        ids, logs = (part.to(hidden.device) for part in self.teacher.read(row))
        for start in range(0, len(hidden), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            yield divergence(logits_of(hidden[part], student.head, self.checkpoint), ids[part], logs[part])


def _cosine(steps: int) -> Callable[[int], float]:
    """The share of the first rate at each step: 1 at the first, 0 after the last."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
