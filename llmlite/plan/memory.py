"""How much memory a plan's work will need, told before it starts."""

from __future__ import annotations

import math

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, LAYER
from llmlite.plan.plan import Plan, PlanRow

FLOAT = 4
# Copies of a weight alive at once while it is rounded: itself as read and in float32, its transpose, the candidate
# grid's values and errors, codes, both candidates of a row and their differences. Counted, and held by a test.
COPIES_ROUNDED = 8
COPIES_NEAREST = 5  # the same without the transpose and the second candidate
PIECE = 2**24  # weights that round-to-nearest takes at a time


def working_memory(checkpoint: Checkpoint, plan: Plan, batch_tokens: int) -> int:
    """Bytes at the peak beside the program itself: the worst of the embedding, the head and any decoder layer.

    ``batch_tokens``: tokens that run through a layer at once.
    """
    layers: dict[int, list[PlanRow]] = {}
    worst = 0
    for row in plan.rows:
        if row.name.startswith(LAYER):
            layers.setdefault(int(row.name.removeprefix(LAYER).split(".")[0]), []).append(row)
        else:
            worst = max(worst, _alone(checkpoint, row))
    if plan.calibrated:  # the embedding as stored and in float32, to look the calibration tokens up
        embedding = checkpoint.tensors[EMBEDDING]
        worst = max(worst, embedding.nbytes + math.prod(embedding.shape) * FLOAT)
    return max(worst, *(_layer(checkpoint, plan, rows, batch_tokens) for rows in layers.values()))


def _alone(checkpoint: Checkpoint, row: PlanRow) -> int:
    """One tensor without moments: as stored, as written, and a piece of it being rounded."""
    stored = checkpoint.tensors[row.name].nbytes
    rounded = row.parameters + min(row.parameters, PIECE) * FLOAT * COPIES_NEAREST if row.solver == "rtn" else 0
    return stored + row.bytes + rounded


def _layer(checkpoint: Checkpoint, plan: Plan, rows: list[PlanRow], batch_tokens: int) -> int:
    if not plan.calibrated:
        return max(_alone(checkpoint, row) for row in rows)
    linears = [row for row in rows if row.solver != "cast"]
    weights = sum(row.parameters for row in rows) * FLOAT
    family = checkpoint.family
    inputs = {row.module.split(".", 3)[3]: row.shape[1] for row in linears}
    moments = sum(inputs[stage[0]] ** 2 for stage in family.stages) * FLOAT
    solving = max(3 * row.shape[1] ** 2 * FLOAT + math.prod(row.shape) * FLOAT * COPIES_ROUNDED for row in linears)
    widest = max(max(row.shape) for row in linears)
    running = batch_tokens * (widest * 3 + checkpoint.config["hidden_size"] * 6) * FLOAT
    return weights + moments + max(solving, running)
