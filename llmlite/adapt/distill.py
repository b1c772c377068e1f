"""Teach a student its teacher's next-token distributions: the task that `training.train` runs.

Knowledge distillation (Hinton et al. 2015) on logits, and where asked for on what enters each layer (TinyBERT, Jiao
et al. 2020, with trained projections where widths differ), on the last layer's attention (MiniLM, Wang et al. 2020),
and on continuations that the student samples itself (GKD, Agarwal et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llmlite.adapt.losses import LossName, divergence, head_sum, soft_capped
from llmlite.adapt.targets import LiveTeacher, Seen, Target, kept_targets, see
from llmlite.adapt.teacher import Teacher

SAMPLED = 64  # tokens of a continuation that the student samples
PROJECTION = "projections."  # begins the names of parameters that are no part of the student


@dataclass(frozen=True)
class Weights:
    """What the loss is made of: (1 - ``data``) of the divergence named ``loss`` at ``temperature``, ``data`` of the
    text's own cross-entropy, and so much of hidden states and attention; ``on_policy``: the share of rows that end in
    the student's own words.
    """

    loss: LossName = "kl"
    temperature: float = 1.0
    data: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    on_policy: float = 0.0

    @property
    def live(self) -> bool:
        """Whether only the teacher itself, and not its logits on disk, will do."""
        return bool(self.hidden or self.attention or self.on_policy)


@dataclass(frozen=True)
class Held:
    """Of held-out rows: KL(teacher || student) and the text's own cross-entropy, in nats per token, and the share of
    positions where both have the same likeliest token.
    """

    kl: float
    cross_entropy: float
    same_top: float


@dataclass(frozen=True)
class Lessons:
    """What is taught: token rows int64 [rows, length], and of the teacher either its logits of these on disk or itself.

    ``held`` rows and the teacher's logits of them judge. ``layers``: of each of the student's layers the teacher's
    whose inputs its own are to match; ``tokens``: how many of the student's logits count, from the first on, where
    its head has more rows than its tokenizer has tokens.
    """

    ids: np.ndarray
    held: np.ndarray
    judge: Teacher
    teacher: Teacher | LiveTeacher
    layers: tuple[int, ...] = ()
    tokens: int | None = None


class Distillation:
    """A student, a transformers causal language model in float32, and its lessons; see `training.Task`."""

    def __init__(self, model: Any, lessons: Lessons, weights: Weights, device: str = "cpu"):
        self.model, self.lessons, self.weights, self.device = model.to(device), lessons, weights, device
        self.config = model.config.to_dict()
        self.ids = torch.from_numpy(lessons.ids)
        self.projections = torch.nn.ModuleDict()
        if weights.hidden and isinstance(lessons.teacher, LiveTeacher):
            mine, its = model.config.hidden_size, lessons.teacher.checkpoint.config["hidden_size"]
            if mine != its:
                for layer in range(1, len(lessons.layers)):
                    self.projections[str(layer)] = torch.nn.Linear(mine, its, bias=False)
                self.projections.to(device)

    @property
    def rows(self) -> int:
        return len(self.ids)

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return found | {f"{PROJECTION}{name}": p for name, p in self.projections.named_parameters()}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters().values())}]

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        ids, scored = self._own_words(self.ids[list(rows)].to(self.device))
        weights, teacher = self.weights, self.lessons.teacher
        mine = see(self.model.model, ids, bool(weights.hidden), bool(weights.attention))
        total = torch.zeros((), device=self.device)
        if isinstance(teacher, LiveTeacher):
            if weights.data < 1 or weights.live:
                its = teacher.see(ids, bool(weights.hidden), bool(weights.attention))
                target: Target | None = teacher.target(its, weights.temperature)
                total = (
                    total + weights.hidden * self._hidden(mine, its) + weights.attention * self._attention(mine, its)
                )
            else:
                target = None
        else:
            target = kept_targets(teacher, rows, weights.temperature, self.device) if weights.data < 1 else None
        return total + self._logits(mine.states, ids, scored, target)

    @torch.no_grad()
    def judge(self) -> float:
        held, share = self.held(), self.weights.data
        return (1 - share) * held.kl + share * held.cross_entropy

    @torch.no_grad()
    def held(self) -> Held:
        """The student as it is on the held-out rows."""
        kl, own, same = 0.0, 0.0, 0
        for row, ids in enumerate(torch.from_numpy(self.lessons.held).to(self.device)):
            target = kept_targets(self.lessons.judge, [row], 1.0, self.device)
            likeliest = target.ids.gather(1, target.logs[:, :-1].argmax(-1, keepdim=True))[:, 0]

            def measure(
                logits: torch.Tensor, part: slice, ids: Any = ids, target: Any = target, top: Any = likeliest
            ) -> Any:
                nonlocal own, same
                logits = soft_capped(logits, self.config)
                following = ids[1:][part]
                own += float(functional.cross_entropy(logits[: len(following)], following, reduction="sum"))
                same += int((logits.argmax(-1) == top[part]).sum())
                known, found = target.compare(logits, part)
                return divergence(known, found, "kl").sum()

            kl += float(head_sum(see(self.model.model, ids[None]).states[0], self._head(), measure))
        rows, length = self.lessons.held.shape
        return Held(kl / (rows * length), own / (rows * (length - 1)), same / (rows * length))

    def _head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight[: self.lessons.tokens]

    def _logits(
        self, states: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor, target: Target | None
    ) -> torch.Tensor:
        """The divergence over all positions but those before a sampled continuation, mixed with the text's own loss.

        ``scored`` bool [rows, length]: the positions that count; the text's own loss counts rows of text only.
        """
        weights = self.weights
        following = torch.cat([ids[:, 1:], ids[:, :1]], 1).flatten()
        known = scored.all(1, keepdim=True).expand_as(scored).clone()
        known[:, -1] = False  # what follows a row is not known
        counted, known = scored.flatten(), known.flatten()
        apart = (1 - weights.data) * weights.temperature**2 / counted.sum()
        data = weights.data / known.sum().clamp(min=1)

        def measure(logits: torch.Tensor, part: slice) -> torch.Tensor:
            logits = soft_capped(logits, self.config)
            value = torch.zeros((), device=logits.device)
            if target is not None:
                teachers, students = target.compare(logits, part)
                value = apart * (divergence(teachers, students, weights.loss) * counted[part]).sum()
            if weights.data:
                own = functional.cross_entropy(logits, following[part], reduction="none")
                value = value + data * (own * known[part]).sum()
            return value

        return head_sum(states.flatten(0, 1), self._head(), measure)

    def _hidden(self, mine: Seen, its: Seen) -> torch.Tensor:
        """Squared distance of what enters each layer but the first, relative to the teacher's squared length."""
        if not self.weights.hidden:
            return torch.zeros((), device=self.device)
        found = []
        for layer, its_layer in list(enumerate(self.lessons.layers))[1:]:
            wanted = its.inputs[its_layer].float()
            states = mine.inputs[layer]
            got = self.projections[str(layer)](states) if self.projections else states
            found.append(((got.float() - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
        return torch.stack(found).mean()

    def _attention(self, mine: Seen, its: Seen) -> torch.Tensor:
        """KL(teacher || student) of the last layer's attention; of its mean over heads where their numbers differ."""
        if mine.attention is None or its.attention is None:
            return torch.zeros((), device=self.device)
        got, wanted = mine.attention.float(), its.attention.float()
        if got.shape[1] != wanted.shape[1]:
            got, wanted = got.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny  # later positions have none
        return (wanted * (wanted.clamp(min=tiny).log() - got.clamp(min=tiny).log())).sum(-1).mean()

    def _own_words(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows, some of them ending as the student goes on from their beginning, and the positions that count."""
        scored = torch.ones_like(ids, dtype=torch.bool)
        share = self.weights.on_policy
        own = (torch.rand(len(ids)) < share).to(self.device) if share else torch.zeros(len(ids), dtype=torch.bool)
        if not own.any():
            return ids, scored
        start = max(ids.shape[1] - SAMPLED, ids.shape[1] // 2)
        ids = ids.clone()
        ids[own] = sampled(self.model, ids[own, :start], ids.shape[1], self.lessons.tokens)
        scored[own, : start - 1] = False
        return ids, scored


@torch.no_grad()
def sampled(model: Any, ids: torch.Tensor, length: int, tokens: int | None = None) -> torch.Tensor:
    """Rows of token ids [rows, some] continued to ``length`` by drawing from the model's own distribution.

    ``tokens``: how many of its logits count, from the first on; all where None.
    """
    from transformers import DynamicCache

    cache, fed = DynamicCache(config=model.config), ids
    while ids.shape[1] < length:
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1, :tokens]
        fed = torch.multinomial(torch.softmax(logits.float(), -1).cpu(), 1).to(ids.device)
        ids = torch.cat([ids, fed], 1)
    return ids
