"""What a student's left-out layers did, taken over by the down projections before and behind them: least squares.

The down projection before left-out layers is moved so that the hidden states behind it come as near as they can to
the teacher's behind the gap; that of the layer behind takes over some of what is left. ReplaceMe (Shopkhoev et al.
2025, arXiv:2505.02819, section 3) fits a linear map of that layer's output to the same end. Here it is one of its FFN
channels, of which there are more, and fitted to the states that the student itself has, so that it also makes good what
an earlier gap did.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from llmlite.adapt.shape import shape_of
from llmlite.adapt.shrink import Text
from llmlite.adapt.teacher import BATCH_TOKENS
from llmlite.adapt.widths import DOWN, least_squares
from llmlite.calibrate.moments import HELD_EVERY, MomentSums, held_out
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track
from llmlite.quantize.types import Moments

RIDGES = (0.01, 0.1, 0.3, 1.0, 3.0)  # shares of the moments' mean diagonal; held-out rows choose


@torch.no_grad()
def reconstruct(teacher: Checkpoint, folder: Path, layers: tuple[int, ...], text: Text) -> dict[int, float]:
    """Rewrite down projections of the student in ``folder``, which `write_student` made of these ``layers``, in place.

    Returns what is left of the squared distance between the student's and the teacher's hidden states, on held-out
    rows and each token's by its own length, by the teacher's number of each layer that took over something. Of
    families that put a norm behind the down projection, and with a text of fewer than 8 rows, none does.
    """
    student = open_checkpoint(folder)
    places = _places(layers)
    if not places or len(text.ids) < HELD_EVERY or "post_feedforward_layernorm" in teacher.family.norms:
        return {}
    pair = _Pair(teacher, student, layers, text, folder)
    left = {}
    layout = {name: TensorSpec(entry.dtype, entry.shape) for name, entry in student.tensors.items()}
    try:
        pair.begin(places[0])
        with SafetensorsWriter(folder, layout, reopen=True) as writer:
            for place in track(range(places[0], places[-1] + 1), "what was left out, taken over"):
                name = f"{LAYER}{place}.{DOWN}"
                found = pair.step(place, place in places)
                if found is not None:
                    left[layers[place]] = found.left
                    writer.write(name, found.weight.to(layout.pop(name).dtype))
                give_freed_memory_back()
            for name in layout:
                writer.keep(name)
    finally:
        pair.remove()
    return left


def _places(layers: tuple[int, ...]) -> list[int]:
    """The student's layers on both sides of what was left out."""
    gaps = [place for place, (layer, following) in enumerate(pairwise(layers)) if following > layer + 1]
    return sorted({*gaps, *(place + 1 for place in gaps)})


@dataclass(frozen=True)
class _Found:
    """A down projection that comes nearer, float32 [hidden, ffn], and what is left of the squared distance."""

    weight: torch.Tensor
    left: float


class _Pair:
    """The teacher and its student, run side by side over the same rows."""

    def __init__(self, teacher: Checkpoint, student: Checkpoint, layers: tuple[int, ...], text: Text, folder: Path):
        self.layers, self.batch = layers, max(BATCH_TOKENS // text.ids.shape[1], 1)
        self.streams = [LayerStream(checkpoint, text.device, text.dtype) for checkpoint in (teacher, student)]
        shapes = [shape_of(checkpoint.config) for checkpoint in (teacher, student)]
        self.alike = replace(shapes[0], layers=0) == replace(shapes[1], layers=0)  # a layer that is kept is unchanged
        files = (folder / ".teacher", folder / ".student")
        self.theirs, self.mine = (
            stream.embed(text.ids, file, self.batch) for stream, file in zip(self.streams, files, strict=True)
        )

    def begin(self, place: int) -> None:
        """Run both up to the student's layer at ``place``, before which nothing was left out."""
        for number in range(place):
            self._advance(self.streams[0], number, self.theirs)
            if not self.alike:
                self._advance(self.streams[1], number, self.mine)
        for start in self._starts() if self.alike else ():
            self.mine.write(start, self.theirs.read(start, self.batch))

    def step(self, place: int, takes_over: bool) -> _Found | None:
        """Run the student's layer, and the teacher's up to where the student's next layer has its place."""
        behind = self.layers[place + 1] if place + 1 < len(self.layers) else self.layers[place] + 1
        for number in range(self.layers[place], behind):
            self._advance(self.streams[0], number, self.theirs)
        stream = self.streams[1]
        found = None
        with stream.layer(place) as module:
            if takes_over:
                found = self._fitted(place, module)
                if found is not None:
                    _down(module).weight.data = found.weight.to(stream.dtype)
            stream.advance(place, module, self.mine, self.batch)
        return found

    def remove(self) -> None:
        """Delete the states."""
        self.theirs.remove()
        self.mine.remove()

    def _starts(self) -> range:
        return range(0, self.theirs.shape[0], self.batch)

    def _advance(self, stream: LayerStream, number: int, states: Activations) -> None:
        with stream.layer(number) as module:
            stream.advance(number, module, states, self.batch)

    def _fitted(self, place: int, module: torch.nn.Module) -> _Found | None:
        """The layer's down projection fitted to the teacher's states; None where held-out rows gain nothing."""
        down, device = _down(module), self.streams[1].device
        taken: list[torch.Tensor] = []
        handle = down.register_forward_pre_hook(lambda _module, args: taken.append(args[0]))
        sums, apart = MomentSums(down.in_features, self.theirs.shape[0], device), 0.0
        for start in self._starts():
            theirs = self.theirs.read(start, self.batch).to(device)
            missing = theirs - self.streams[1].forward(place, module, self.mine.read(start, self.batch)).float()
            length = theirs.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            missing /= length
            sums.add(start, taken.pop().float() / length, r=missing)
            apart += float(missing[held_out(start, len(missing))].square().sum())
        handle.remove()
        best = min(_changes(sums.moments()), key=lambda change: change[1], default=None)
        if best is None or not best[1] < 0 or not apart > 0:
            return None
        return _Found(down.weight.float() + best[0], 1 + best[1] / apart)


def _down(module: torch.nn.Module) -> torch.nn.Linear:
    down = module.get_submodule(DOWN.removesuffix(".weight"))
    assert isinstance(down, torch.nn.Linear)
    return down


def _changes(moments: Moments) -> Iterator[tuple[torch.Tensor, float]]:
    """Least squares with each ridge: the change of the weight [out, in], and what it adds to the held-out squares."""
    held = moments.held
    assert held is not None and moments.residual is not None and held.residual is not None
    for ridge in RIDGES:
        found = least_squares(moments.xxt, moments.residual.T, ridge)
        if found is not None:
            change = found.T
            yield change, float(((change @ held.xxt) * change).sum() - 2 * (change * held.residual).sum())
