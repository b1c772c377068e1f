"""How much memory and scratch space a plan's work will need, told before it starts."""

from __future__ import annotations

import math

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, LAYER
from llmlite.plan.plan import CALIBRATED, Plan, PlanRow

FLOAT = 4
# Float32 copies of the weights of a stage alive at once while they are rounded: as read, side by side, the target, the
# slopes, values and codes of the descent, what the file will hold, its errors. Counted, and held by a test.
COPIES_ROUNDED = 8
# Matrices [in, in] of the solver: the damped moments, and to factor them a copy, its root, the identity, the inverse.
MATRICES = 5
COPIES_NEAREST = 5  # of a piece that is rounded to nearest
PIECE = 2**24  # weights that round-to-nearest takes at a time
HEAD_PIECE = 2**23  # weights of a head that are solved at a time, at least


def working_memory(checkpoint: Checkpoint, plan: Plan, batch_tokens: int, networks: int) -> int:
    """Bytes at the peak beside the program itself: the worst of the embedding, the head and any decoder layer.

    ``batch_tokens``: tokens that run through a layer at once; ``networks``: 2 where the unquantized one runs beside.
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
    return max(worst, *(_layer(checkpoint, plan, rows, batch_tokens, networks) for rows in layers.values()))


def _alone(checkpoint: Checkpoint, row: PlanRow) -> int:
    """One tensor outside the layers' stages: as stored, as written, and a piece of it being rounded."""
    stored = checkpoint.tensors[row.name].nbytes
    if row.solver == "cast":
        return stored + row.bytes
    if row.solver not in CALIBRATED:
        return stored + row.bytes + row.parameters + min(row.parameters, PIECE) * FLOAT * COPIES_NEAREST
    rows, width = row.shape
    piece = rows_of_head(rows, width) * width
    return stored + row.bytes + row.parameters + (piece * COPIES_ROUNDED + (4 + MATRICES) * width**2) * FLOAT


def rows_of_head(rows: int, width: int) -> int:
    """How many rows of a head [rows, width] are solved together: at least ``width``, as each piece factors [in, in]."""
    return min(rows, max(HEAD_PIECE // width, width))


def _layer(checkpoint: Checkpoint, plan: Plan, rows: list[PlanRow], batch_tokens: int, networks: int) -> int:
    if not plan.calibrated:
        return max(_alone(checkpoint, row) for row in rows)
    shapes = {row.module.split(".", 3)[3]: row.shape for row in rows if row.solver in CALIBRATED}
    weights = sum(row.parameters for row in rows) * FLOAT * networks
    widest = max(max(row.shape) for row in rows)
    running = batch_tokens * (widest * 3 + checkpoint.config["hidden_size"] * 6) * FLOAT
    stages = [[shapes[name] for name in names if name in shapes] for names in checkpoint.family.stages]
    return weights + max(_stage(stage, running, networks) for stage in stages)


def _stage(shapes: list[tuple[int, ...]], running: int, networks: int) -> int:
    """The moments of one stage's inputs, as many held out, and what fills or uses them.

    With a second network there are cross moments too, and of a layer that writes to the residual stream, which stands
    alone in its stage, what that stream has lost.
    """
    if not shapes:
        return running
    width, weights = shapes[0][1], sum(math.prod(shape) for shape in shapes)
    lost = weights if networks > 1 and len(shapes) == 1 else 0
    moments = 2 * (networks * width**2 + lost)
    return (moments + max(MATRICES * width**2 + weights * COPIES_ROUNDED, running // FLOAT)) * FLOAT


def scratch_space(checkpoint: Checkpoint, plan: Plan, tokens: int, networks: int) -> int:
    """Bytes of activations on the disk at the peak, for ``tokens`` of calibration text.

    Each network has the inputs and the outputs of a decoder layer, and what each part of the layer (attention,
    feed-forward) adds to the residual stream; of the last part the network being rounded keeps the inputs of the
    linear layer that closes it instead, and of the others these beside it.
    """
    shapes = {row.module.split(".", 3)[3]: row.shape for row in plan.rows if row.name.startswith(f"{LAYER}0.")}
    stages = checkpoint.family.stages
    closing = {stage[0].rpartition(".")[0]: shapes[stage[0]][1] for stage in stages}  # the last of each part stays
    hidden = checkpoint.config["hidden_size"]
    rounded = (1 + len(closing)) * hidden + sum(closing.values())
    original = (2 + len(closing)) * hidden
    return tokens * (rounded + (networks - 1) * original) * FLOAT
