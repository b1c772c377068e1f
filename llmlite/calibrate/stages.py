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
    is kept on disk, and from then on that part is no longer run: its output is that projection of what was kept, which
    takes its place on disk when it is first asked for. So each linear layer runs once, however many stages there are.
    ``scratch`` begins the names of these files. ``fixed``: no weight of the layer will change, so that output is
    kept at once.
    """

    def __init__(
        self,
        stream: LayerStream,
        number: int,
        module: torch.nn.Module,
        hidden: Activations,
        scratch: Path,
        *,
        fixed: bool = False,
    ):
        self.stream, self.number, self.module, self.hidden, self.scratch = stream, number, module, hidden, scratch
        self.fixed = fixed
        family: Family = stream.checkpoint.family
        self._stages = family.stages
        parts = [stage[0].rpartition(".")[0] for stage in family.stages]
        self._closing = {max(i for i, part in enumerate(parts) if part == name): name for name in dict.fromkeys(parts)}
        self._kept: dict[int, Activations] = {}  # inputs of the closing stages, by stage
        self._added: dict[int, Activations] = {}  # their outputs, as far as they were asked for
        self._asked: set[tuple[int, int]] = set()  # stage and first row of what lies in `_added`
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
            if self.fixed:
                self._keep(self._added, stage, start, self.linear(stage)(taken))
                self._asked.add((stage, start))
            else:
                self._keep(self._kept, stage, start, taken)
        return taken

    def _keep(self, files: dict[int, Activations], stage: int, start: int, rows: torch.Tensor) -> None:
        if stage not in files:
            name = f"{self.scratch.name}-{stage}{'-out' if files is self._added else ''}"
            files[stage] = Activations(self.scratch.with_name(name), (*self.hidden.shape[:2], rows.shape[-1]))
        files[stage].write(start, rows)

    @torch.no_grad()
    def residual(self, stage: int, start: int, batch: int) -> torch.Tensor | None:
        """What the residual stream holds where ``stage`` adds its output to it: [rows, length, width].

        None for a stage that does not, and for layers that put a norm between the output and the stream.
        """
        if stage not in self._closing or "post_feedforward_layernorm" in self.stream.checkpoint.family.norms:
            return None
        stream = self.hidden.read(start, batch).to(self.stream.device, self.stream.dtype)
        for earlier in (closing for closing in self._closing if closing < stage):
            stream += self._output(earlier, start, batch)
        return stream

    @torch.no_grad()
    def adds(self, stage: int, start: int, batch: int) -> torch.Tensor:
        """What ``stage`` adds to the residual stream with its weight as it is now: [rows, length, width].

        To be asked for after `inputs` of the same rows, of a stage that has a `residual`.
        """
        if self.fixed:
            return self._output(stage, start, batch)
        return self.linear(stage)(self._kept_inputs(stage, start, batch))

    @torch.no_grad()
    def outputs(self, start: int, batch: int) -> torch.Tensor:
        """What the layer gives for rows from ``start``, once all stages are done: [rows, length, width]."""
        if start == 0:
            self._close_parts_before(len(self._stages))
        return self._forward(start, batch)

    def close(self) -> None:
        """Let the layer's parts run again, and remove what was kept."""
        for part in self._closing.values():
            self.module.get_submodule(part).__dict__.pop("forward", None)
        for files in (self._kept, self._added):
            for kept in files.values():
                kept.remove()
            files.clear()
        self._asked.clear()

    def _forward(self, start: int, batch: int) -> torch.Tensor:
        self._now = (start, batch)
        return self.stream.forward(self.number, self.module, self.hidden.read(start, batch))

    def _close_parts_before(self, stage: int) -> None:
        for closing, part in self._closing.items():
            module = self.module.get_submodule(part)
            if closing < stage and "forward" not in module.__dict__:
                module.forward = self._from_kept(closing, part)  # type: ignore[method-assign]

    def _from_kept(self, stage: int, part: str) -> Callable[..., Any]:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            out = self._output(stage, *self._now)
            return (out, None) if part == "self_attn" else out  # attention also returns its weights

        return forward

    def _kept_inputs(self, stage: int, start: int, batch: int) -> torch.Tensor:
        return self._kept[stage].read(start, batch).to(self.stream.device, self.stream.dtype)

    def _output(self, stage: int, start: int, batch: int) -> torch.Tensor:
        """What a closing stage gives for rows from ``start``: computed once, unless it is asked for once only."""
        if (stage, start) in self._asked:
            return self._added[stage].read(start, batch).to(self.stream.device, self.stream.dtype)
        out: torch.Tensor = self.linear(stage)(self._kept_inputs(stage, start, batch))
        if stage + 1 < len(self._stages):
            self._keep(self._added, stage, start, out)
            self._asked.add((stage, start))
        return out


def stage_inputs(
    now: StagedLayer, ideal: StagedLayer | None, stage: int, start: int, batch: int, *, by_worth: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What `MomentSums.add` takes, for rows from ``start``; ``ideal``: the layer in the unquantized network.

    ``by_worth``: of a layer that writes to the residual stream, a token counts by what an error is worth there: the
    norm that reads the stream divides by its size, and that of a token with massive activations is a hundred times
    another's.
    """
    source = ideal or now
    x, y = now.inputs(stage, start, batch), None if ideal is None else ideal.inputs(stage, start, batch)
    stream = source.residual(stage, start, batch) if ideal is not None or by_worth else None
    if stream is None:
        return x, y, None
    left = None if ideal is None else now.residual(stage, start, batch)
    lost = None if left is None else stream - left
    if not by_worth:
        return x, y, lost
    whole = stream + source.adds(stage, start, batch)
    share = whole.float().square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
    return x * share, None if y is None else y * share, None if lost is None else lost * share


def _stop(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    raise Arrived(args[0])
