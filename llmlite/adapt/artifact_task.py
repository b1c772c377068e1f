"""The task of training a written artifact on its base's predictions, which `repair` and `qat` give to `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmlite.adapt.losses import divergence, head_sum, soft_capped
from llmlite.adapt.student import Student
from llmlite.adapt.targets import kept_targets
from llmlite.adapt.teacher import Teacher, held_rows, trained_rows
from llmlite.adapt.training import TrainSettings
from llmlite.checkpoint.artifact import TRAINING
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.memory import free_memory

TAUGHT = f"{TRAINING}taught"  # the folder of the base's predictions
SMALLEST_SLOPE = 1e-12  # one group's share of the slope is far below Adam's default, one code's even more
KEPT = 0.3  # share of the free memory that activations may take; beyond it they are computed twice


@dataclass(frozen=True)
class ArtifactSettings(TrainSettings):
    """How to train an artifact. ``rate`` is in codes per step; ``scale_rate``, of scales and minimums, and
    ``norm_rate``, of norms and biases, are multiples of it, and relative changes. ``held_rows``: rows that judge, at
    most.
    """

    batch_rows: int = field(default=2, metadata={"help": "rows of the data in one forward pass"})
    scale_rate: float = 1.0
    norm_rate: float = 1.0
    held_rows: int = 8


class ArtifactTask:
    """What `train` trains: every real number of the artifact, and its codes where the student trains them.

    ``ids`` int64 [rows, length] is the text, ``teacher`` what the base predicts on it.
    """

    def __init__(self, student: Student, ids: np.ndarray, teacher: Teacher, settings: ArtifactSettings):
        self.student, self.teacher, self.settings = student, teacher, settings
        self._ids, self._trained = torch.from_numpy(ids), trained_rows(len(ids))
        self._held = held_rows(len(ids), settings.held_rows)
        self._head = student.head.to(student.dtype)

    @property
    def rows(self) -> int:
        return len(self._trained)

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return {**self.student.latents(), **self.student.factor_changes(), **self.student.vector_changes()}

    def groups(self) -> list[dict[str, Any]]:
        student, settings = self.student, self.settings
        parts = (
            (student.latents(), 1.0),
            (student.factor_changes(), settings.scale_rate),
            (student.vector_changes(), settings.norm_rate),
        )
        return [{"params": [*part.values()], "rate": rate, "eps": SMALLEST_SLOPE} for part, rate in parts if part]

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        self.student.prepare()
        return self._divergence([self._trained[row] for row in rows])

    @torch.no_grad()
    def judge(self) -> float:
        self.student.prepare()
        return sum(self._divergence([row]).item() for row in self._held) / len(self._held)

    def _divergence(self, rows: list[int]) -> torch.Tensor:
        """Mean KL(base || student) in nats over the positions of the rows."""
        hidden = self.student.hidden(self._ids[rows]).flatten(0, 1)
        target = kept_targets(self.teacher, rows, 1.0, self.student.device)

        def measure(logits: torch.Tensor, part: slice) -> torch.Tensor:
            known, found = target.compare(soft_capped(logits, self.student.checkpoint.config), part)
            return divergence(known, found, "kl").sum() / len(hidden)

        return head_sum(hidden, self._head, measure)


def activations_fit(checkpoint: Checkpoint, tokens: int, device: str) -> bool:
    """Whether those of all layers may be kept for the backward pass of so many tokens."""
    wide = sum(
        e.shape[0] for name, e in checkpoint.tensors.items() if name.startswith(f"{LAYER}0.") and len(e.shape) > 1
    )
    needed = 4 * tokens * checkpoint.num_layers * (3 * wide + 6 * checkpoint.config["hidden_size"])
    return needed < KEPT * free_memory(device)
