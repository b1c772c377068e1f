"""One decoder layer run from stage to stage: what a stage's linear layers take in, after the earlier ones changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmlite.calibrate.stream import Activations, Arrived, LayerStream
from llmlite.checkpoint.families import Family


class StagedLayer:
    """A decoder layer, its weights loaded, and the hidden states that enter it.

    `inputs` stops the layer's forward where a stage's linear layers take their input. Where a stage closes its part of
    the layer (the output projection of the attention, the down projection of the feed-forward block), what it takes in
    is kept on disk, and from then on that part is no longer run: its output is that projection of what was kept. So
    each linear layer runs about once, however many stages there are. ``scratch`` begins the names of these files.
    """

    def __init__(self, stream: LayerStream, number: int, module: torch.nn.Module, hidden: Activations, scratch: Path):
        self.stream, self.number, self.module, self.hidden, self.scratch = stream, number, module, hidden, scratch
        family: Family = stream.checkpoint.family
        self._stages = family.stages
        parts = [stage[0].rpartition(".")[0] for stage in family.stages]
        self._closing = {max(i for i, part in enumerate(parts) if part == name): name for name in dict.fromkeys(parts)}
        self._kept: dict[int, Activations] = {}
        self._now = (0, 0)  # the rows that run: where they start, and how many

    def linear(self, stage: int) -> torch.nn.Linear:
        """The first linear layer of a stage."""
        linear = self.module.get_submodule(self._stages[stage][0])
        assert isinstance(linear, torch.nn.Linear)
        return linear

    @torch.no_grad()
    def inputs(self, stage: int, start: int, batch: int) -> torch.Tensor:
        """What the linear layers of ``stage`` take in for rows from ``start``: [rows, length, in].

        Stages are asked for in order, each for all rows.
        """
        if start == 0:
            self._close_parts_before(stage)
        handle = self.linear(stage).register_forward_pre_hook(_stop)
        try:
            self._forward(start, batch)
        except Arrived as arrived:
            taken: torch.Tensor = arrived.args[0]
        finally:
            handle.remove()
        if stage in self._closing:
            if start == 0:
                shape = (*self.hidden.shape[:2], taken.shape[-1])
                self._kept[stage] = Activations(self.scratch.with_name(f"{self.scratch.name}-{stage}"), shape)
            self._kept[stage].write(start, taken)
        return taken

    @torch.no_grad()
    def residual(self, stage: int, start: int, batch: int) -> torch.Tensor | None:
        """What the residual stream holds where ``stage`` adds its output to it: [rows, length, width].

        None for a stage that does not, and for layers that put a norm between the output and the stream.
        """
        if stage not in self._closing or "post_feedforward_layernorm" in self.stream.checkpoint.family.norms:
            return None
        stream = self.hidden.read(start, batch).to(self.stream.device, self.stream.dtype)
        for earlier in (closing for closing in self._closing if closing < stage):
            stream += self.linear(earlier)(self._kept_rows(earlier, start, batch))
        return stream

    @torch.no_grad()
    def outputs(self, start: int, batch: int) -> torch.Tensor:
        """What the layer gives for rows from ``start``, once all stages are done: [rows, length, width]."""
        if start == 0:
            self._close_parts_before(len(self._stages))
        return self._forward(start, batch)

    def close(self) -> None:
        """Let the layer's parts run again, and remove what was kept."""
        for stage, kept in self._kept.items():
            self.module.get_submodule(self._closing[stage]).__dict__.pop("forward", None)
            kept.remove()
        self._kept.clear()

    def _forward(self, start: int, batch: int) -> torch.Tensor:
        self._now = (start, batch)
        return self.stream.forward(self.number, self.module, self.hidden.read(start, batch))

    def _close_parts_before(self, stage: int) -> None:
        for closing, part in self._closing.items():
            module = self.module.get_submodule(part)
            if closing < stage and "forward" not in module.__dict__:
                module.forward = self._from_kept(closing, part)  # type: ignore[method-assign]

    def _from_kept(self, stage: int, part: str) -> Callable[..., Any]:
        linear = self.linear(stage)

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            out = linear(self._kept_rows(stage, *self._now))
            return (out, None) if part == "self_attn" else out  # attention also returns its weights

        return forward

    def _kept_rows(self, stage: int, start: int, batch: int) -> torch.Tensor:
        return self._kept[stage].read(start, batch).to(self.stream.device, self.stream.dtype)


def _stop(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    raise Arrived(args[0])
