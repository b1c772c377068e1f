"""Tell whether a weight was already rounded to a few bits before it came to us."""

from __future__ import annotations

import torch

GROUP = 32  # divides the blocks of every common 4-bit format
LEVELS = 16


def share_on_low_bit_grid(weight: torch.Tensor) -> float:
    """Of the runs of 32 neighbouring weights in a row, the share that takes at most 16 different values.

    ``weight`` float [out, in]. Next to 0 for a trained weight, even in bfloat16; next to 1 for one that was
    dequantized from 4 bits or fewer with any group size that 16 divides, as long as the groups are neighbours (GPTQ's
    activation order scatters them). Runs of zeros do not count.
    """
    width = weight.shape[1]
    runs = weight[:, : width - width % GROUP].reshape(-1, GROUP)
    runs = runs[runs.abs().amax(-1) > 0]
    if not len(runs):
        return 0.0
    ordered = runs.sort(-1).values
    different = (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1
    return (different <= LEVELS).float().mean().item()
