"""How far a student's next-token distribution is from its teacher's, and gradients with few logits in memory.

``kl`` is KL(teacher || student); ``reverse`` KL(student || teacher), which seeks the teacher's modes (MiniLLM, Gu et
al. 2024); ``skew`` KL(teacher || a teacher + (1 - a) student), whose gradient stays small where the student gives a
token next to nothing (DistiLLM, Ko et al. 2024, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from llmlite.adapt.teacher import LOGIT_ROWS

LossName = Literal["kl", "reverse", "skew"]
SKEW = 0.1  # DistiLLM's a

Measure = Callable[[torch.Tensor, slice], torch.Tensor]


def divergence(teacher: torch.Tensor, student: torch.Tensor, loss: LossName) -> torch.Tensor:
    """Nats of each position, float32 [n], of log-probabilities [n, outcomes]."""
    if loss == "reverse":
        return (student.exp() * (student - teacher)).sum(-1)
    if loss == "skew":
        student = torch.logaddexp(teacher + math.log(SKEW), student + math.log(1 - SKEW))
    return (teacher.exp() * (teacher - student)).sum(-1)


def outcomes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, top + 1] of the tokens ``ids`` [n, top] and of all others together, of logits [n, tokens].

    As `teacher.with_rest` of their log-softmax, in half the passes over the vocabulary.
    """
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat([logits.gather(-1, ids), others], -1), -1)


def head_sum(hidden: torch.Tensor, head: torch.Tensor, measure: Measure) -> torch.Tensor:
    """The sum over positions of what ``measure`` makes of logits float32 [n, tokens] of the positions in a slice.

    ``hidden`` [positions, width], ``head`` [tokens, width]. The logits of `LOGIT_ROWS` positions are held at a time,
    in the backward pass too: gradients are made in the forward pass. Under autocast the products are in its dtype.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    if torch.is_grad_enabled():
        found: torch.Tensor = _HeadSum.apply(hidden, head, measure, dtype)
        return found
    with torch.autocast(kind, enabled=False):
        states, weight = hidden.to(dtype), head.to(dtype)
        parts = [slice(start, start + LOGIT_ROWS) for start in range(0, len(hidden), LOGIT_ROWS)]
        return torch.stack([measure((states[part] @ weight.T).float(), part) for part in parts]).sum()


class _HeadSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, measure: Measure, dtype: torch.dtype
    ) -> torch.Tensor:
        states, weight = hidden.to(dtype), head.to(dtype)
        to_hidden = torch.empty_like(states)
        to_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                logits = (states[part] @ weight.T).float().requires_grad_()
                with torch.enable_grad():
                    value = measure(logits, part)
                slope = torch.autograd.grad(value, logits)[0].to(dtype)
                total += value.detach()
                to_hidden[part] = slope @ weight
                if to_head is not None:
                    to_head += slope.T @ states[part]
        ctx.kinds = (hidden.dtype, head.dtype)
        ctx.save_for_backward(to_hidden, *([] if to_head is None else [to_head]))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kinds, saved = ctx.kinds, ctx.saved_tensors
        found = [(part * gradients[0]).to(kind) for part, kind in zip(saved, kinds, strict=False)]
        return found[0], found[1] if len(found) > 1 else None, None, None
