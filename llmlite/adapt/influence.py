"""How much each decoder layer does: block influence, and what leaving out that layer alone costs.

Block influence is ShortGPT's (Men et al. 2024, section 3.1): one minus the cosine between what enters a layer and what
leaves it. It overlooks layers that change little and that all later ones need, so each layer is also left out by
itself, and the divergence from the whole network is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmlite.adapt.teacher import BATCH_TOKENS, LOGIT_ROWS, output_head
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.errors import InputError
from llmlite.formats.gguf.metadata import full_config
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track

PROTECTED = 2  # layers at either end that are never left out: their influence is near 1 in every network measured
SPREAD = 2  # this many times as many layers as are to go are considered, by influence


@dataclass(frozen=True)
class LayerScores:
    """``influence`` of every layer, 0 to 2; ``divergence`` in nats per token, KL(whole || without that layer), of the
    layers that may be left out.
    """

    influence: tuple[float, ...]
    divergence: dict[int, float]

    def drop(self, count: int) -> tuple[int, ...]:
        """The ``count`` layers to leave out, in the order of the network: of the 2 x ``count`` with the least
        influence those that alone cost least.
        """
        able = sorted(self.divergence, key=lambda layer: self.influence[layer])[: SPREAD * count]
        return tuple(sorted(sorted(able, key=lambda layer: self.divergence[layer])[:count]))


def droppable(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The layers that may be left out: not those at the ends, and where some layers see a window only, none of those
    that see everything. What these do shows on long texts, and calibration rows are short.
    """
    kinds = full_config(checkpoint.config).get("layer_types") or []
    needed = {n for n, kind in enumerate(kinds) if kind == "full_attention"} if len(set(kinds)) > 1 else set()
    inner = range(PROTECTED, checkpoint.num_layers - PROTECTED)
    return tuple(layer for layer in inner if layer not in needed)


def check_layers(checkpoint: Checkpoint, kept: int) -> None:
    """`InputError` where so few layers can't be kept."""
    total = checkpoint.num_layers
    least = total - len(droppable(checkpoint))
    if not least <= kept <= total:
        raise InputError(
            f"--layers {kept}: {checkpoint.source} has {total}, of which the first {PROTECTED}, the last {PROTECTED} "
            f"and those that alone see a whole text stay; {least} to {total} are right"
        )


@torch.no_grad()
def measure_layers(
    checkpoint: Checkpoint, ids: np.ndarray, checked: int, folder: Path, device: str, dtype: torch.dtype
) -> LayerScores:
    """The scores over token rows int64 [rows, length]; the first ``checked`` rows run without each layer, too.

    One decoder layer is in memory at a time; ``folder`` holds the hidden states meanwhile, a file for each layer.
    """
    rows, length = ids.shape
    batch, checked = max(BATCH_TOKENS // length, 1), min(checked, rows)
    stream = LayerStream(checkpoint, device, dtype)
    hidden = stream.embed(ids, folder / ".influence", batch)
    without: dict[int, Activations] = {}
    influence = []
    try:
        for number in track(range(checkpoint.num_layers), "influence of the layers"):
            if number in droppable(checkpoint):
                without[number] = Activations(folder / f".without-{number}", (checked, *hidden.shape[1:]))
                without[number].write(0, hidden.read(0, checked))
            with stream.layer(number) as module:
                influence.append(_influence(stream, number, module, hidden, batch))
                for other, states in without.items():
                    if other != number:
                        stream.advance(number, module, states, batch)
            give_freed_memory_back()
        return LayerScores(tuple(influence), _divergences(checkpoint, hidden, without, device))
    finally:
        for states in (hidden, *without.values()):
            states.remove()


def _influence(stream: LayerStream, number: int, module: torch.nn.Module, hidden: Activations, batch: int) -> float:
    """One layer's influence; its outputs take the place of its inputs in ``hidden``."""
    total = 0.0
    for start in range(0, hidden.shape[0], batch):
        before = hidden.read(start, batch)
        after = stream.forward(number, module, before).float().cpu()
        total += float(torch.cosine_similarity(before, after, dim=-1).sum())
        hidden.write(start, after)
    return 1 - total / (hidden.shape[0] * hidden.shape[1])


def _divergences(
    checkpoint: Checkpoint, hidden: Activations, without: dict[int, Activations], device: str
) -> dict[int, float]:
    logits = output_head(checkpoint, device)
    totals = dict.fromkeys(without, 0.0)
    checked = next(iter(without.values())).shape[0] if without else 0
    for row in track(range(checked), "divergence without each layer"):
        whole = hidden.read(row, 1)[0]
        others = {layer: states.read(row, 1)[0] for layer, states in without.items()}
        for start in range(0, len(whole), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            base = torch.log_softmax(logits(whole[part].to(device)), -1)
            chance = base.exp()
            for layer, states in others.items():
                changed = torch.log_softmax(logits(states[part].to(device)), -1)
                totals[layer] += float((chance * (base - changed)).sum())
    return {layer: total / (checked * hidden.shape[1]) for layer, total in totals.items()}
