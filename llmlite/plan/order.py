"""The tensors of a checkpoint that an artifact holds, in the order in which they are worked on."""

from __future__ import annotations

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, LAYER


def working_order(checkpoint: Checkpoint) -> list[str]:
    """Embedding, then layer by layer what is copied before what is rounded, final norm, head unless it is tied."""
    names = [EMBEDDING]
    for layer in range(checkpoint.num_layers):
        linears = [f"{LAYER}{layer}.{name}.weight" for name in checkpoint.family.linears]
        rest = [n for n in checkpoint.layer_tensors(layer) if n not in linears and not n.endswith("inv_freq")]
        names += [*rest, *linears]
    names.append(FINAL_NORM)
    if not checkpoint.tied:
        names.append(HEAD)
    return names
