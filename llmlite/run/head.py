"""Round the weight that gives the logits: what enters it, and its rows some at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from llmlite.calibrate.moments import MomentSums
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.errors import InputError
from llmlite.plan.memory import rows_of_head
from llmlite.plan.plan import PlanRow
from llmlite.progress import track
from llmlite.quantize.rtn import row_errors, stack
from llmlite.quantize.types import Moments, Rounded

HEAD_TOKENS = 8  # of the calibration text for each channel of a tied head, which is rounded before anything else
# Added to the moments of a tied head, as a share of their median diagonal: the weight is the embedding as well, where
# an error counts in all channels alike. (On SmolLM2-135M's calibration text 0.1 and 0.3 gave the same, 1 a worse KL.)
TIED_DAMPING = 0.3


def enough_rows(row: PlanRow, ids: np.ndarray) -> np.ndarray:
    """Token rows of ``ids`` [rows, length], spread over the text, that are enough for a tied head."""
    wanted = -(-HEAD_TOKENS * row.shape[1] // ids.shape[1])
    return ids[:: max(len(ids) // wanted, 1)]


def head_moments(stream: LayerStream, hidden: dict[str, Activations], batch: int) -> Moments:
    """The moments of the head's inputs, from what the last layer gives in the "rounded" network and in the "original".

    `InputError` where they are not all finite.
    """
    now, ideal = hidden["rounded"], hidden.get("original")

    def entering(activations: Activations) -> torch.Tensor:
        return norm(activations.read(start, batch).to(stream.device, stream.dtype))

    with stream.final_norm() as norm, torch.no_grad():
        sums = MomentSums(now.shape[2], now.shape[0], stream.device)
        for start in range(0, now.shape[0], batch):
            sums.add(start, entering(now), None if ideal is None else entering(ideal))
    if not sums.finite:
        raise InputError(f"{stream.checkpoint.source}: the inputs of the head are not all finite on the text")
    return sums.moments()


def solve_in_pieces(weight: torch.Tensor, moments: Moments, solve: Callable[[torch.Tensor], Rounded]) -> Rounded:
    """``solve`` of the weight [out, in], some rows at a time in float32 where the moments are; on the CPU again."""
    judge = moments.held or moments
    pieces, lost, whole = [], 0.0, 0.0
    for part in track(weight.split(rows_of_head(*weight.shape)), "head"):
        part = part.to(moments.xxt.device).float()
        pieces.append(solve(part).cpu())
        size = float(row_errors(part, torch.zeros_like(part), judge).sum())
        lost, whole = lost + pieces[-1].error * size, whole + size
    return replace(stack(pieces), error=lost / whole if whole > 0 else 0.0)
