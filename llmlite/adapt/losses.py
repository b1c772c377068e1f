"""How far a student's next-token distribution is from its teacher's, and gradients with few logits in memory.

``kl`` is KL(teacher || student); ``reverse`` KL(student || teacher), which seeks the teacher's modes (MiniLLM, Gu et
al. 2024); ``skew`` KL(teacher || a teacher + (1 - a) student), whose gradient stays small where the student gives a
token next to nothing (DistiLLM, Ko et al. 2024, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

LossName = Literal["kl", "reverse", "skew"]
SKEW = 0.1  # DistiLLM's a
LEAST = 2**-23  # float32's precision of 1
HELD_BYTES = 128 * 2**20  # of float32 logits at a time: each piece's gradient of the head is a pass over all of it

Measure = Callable[[torch.Tensor, slice], torch.Tensor]


def divergence(teacher: torch.Tensor, student: torch.Tensor, loss: LossName) -> torch.Tensor:
    """Nats of each position, float32 [n], of log-probabilities [n, outcomes]."""
    if loss == "reverse":
        return (student.exp() * (student - teacher)).sum(-1)
    if loss == "skew":
        student = torch.logaddexp(teacher + math.log(SKEW), student + math.log(1 - SKEW))
    return (teacher.exp() * (teacher - student)).sum(-1)


def soft_capped(logits: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Logits as the model of a config.json bends them before the softmax, which gemma's do."""
    cap = config.get("final_logit_softcapping")
    return torch.tanh(logits / cap) * cap if cap else logits


def outcomes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, top + 1] of the tokens ``ids`` [n, top] and of all others together, of logits [n, tokens].

    As `teacher.with_rest` of their log-softmax, in a third of the passes over the vocabulary; where the others' share
    is below float32's precision of 1 it is taken for that.
    """
    found: torch.Tensor = _Outcomes.apply(logits, ids)
    return found


class _Outcomes(torch.autograd.Function):
    """q the probabilities, G what comes back: G_i - q_i sum(G) for a named token, (G_rest / q_rest - sum(G)) q_j
    for each of the others.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        whole = logits.logsumexp(-1, keepdim=True)
        named = logits.gather(-1, ids) - whole
        rest = torch.log1p(-named.exp().sum(-1, keepdim=True).clamp(max=1 - LEAST))
        ctx.save_for_backward(logits, ids, whole, named, rest)
        return torch.cat([named, rest], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, ids, whole, named, rest = ctx.saved_tensors
        got = gradients[0]
        total = got.sum(-1, keepdim=True)
        slope = torch.sub(logits, whole).exp_().mul_(got[:, -1:] / rest.exp() - total)
        return slope.scatter_(-1, ids, got[:, :-1] - named.exp() * total), None


def head_sum(hidden: torch.Tensor, head: torch.Tensor, measure: Measure) -> torch.Tensor:
    """The sum over positions of what ``measure`` makes of logits float32 [n, tokens] of the positions in a slice.

    ``hidden`` [positions, width], ``head`` [tokens, width]. The logits of a few positions are held at a time, in the
    backward pass too: gradients are made in the forward pass. Under autocast the products are in its dtype.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    if torch.is_grad_enabled():
        found: torch.Tensor = _HeadSum.apply(hidden, head, measure, dtype)
        return found
    with torch.autocast(kind, enabled=False):
        states, weight = hidden.to(dtype), head.to(dtype)
        parts = _parts(len(hidden), len(head))
        return torch.stack([measure((states[part] @ weight.T).float(), part) for part in parts]).sum()


def positions_held(tokens: int) -> int:
    """Of how many positions logits over so many tokens are held at a time."""
    return max(HELD_BYTES // (4 * tokens), 16)


def _parts(positions: int, tokens: int) -> list[slice]:
    size = positions_held(tokens)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


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
            for part in _parts(len(hidden), len(head)):
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
