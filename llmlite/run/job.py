"""One pass over a checkpoint, row of the plan by row of the plan: read, round, write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llmlite.calibrate.moments import MomentSums
from llmlite.calibrate.rows import Rows
from llmlite.calibrate.stages import StagedLayer
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError
from llmlite.memory import give_freed_memory_back
from llmlite.plan.plan import CALIBRATED, Plan, PlanRow
from llmlite.progress import track
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.solve import SolverSettings, solve
from llmlite.quantize.types import Grid, Moments, Rounded
from llmlite.run.sinks import Sink

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Work:
    """What a job is told beside the plan: how to solve, where to compute, where to keep activations."""

    solver: SolverSettings
    device: str
    scratch: Path

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Job:
    """Rounds and writes every row of a plan; `errors` has each rounded tensor's relative weighted error."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, sink: Sink, work: Work):
        self.checkpoint, self.plan, self.sink, self.work = checkpoint, plan, sink, work
        self.errors: dict[str, float] = {}

    def run(self, rows: Rows | None) -> dict[str, float]:
        """Write every row; ``rows`` are the calibration tokens where the plan asks for them."""
        before, layers, after = self._parts()
        for row in before:
            self._whole(row)
        if rows is None:
            for layer in track(layers, "layers"):
                for row in layer:
                    self._whole(row)
                give_freed_memory_back()
        else:
            self._calibrated(layers, rows)
        for row in after:
            self._whole(row)
        return self.errors

    def _parts(self) -> tuple[list[PlanRow], list[list[PlanRow]], list[PlanRow]]:
        layers: list[list[PlanRow]] = [[] for _ in range(self.checkpoint.num_layers)]
        before: list[PlanRow] = []
        after: list[PlanRow] = []
        for row in self.plan.rows:
            if row.name.startswith(LAYER):
                layers[int(row.name.removeprefix(LAYER).split(".")[0])].append(row)
            else:
                (after if layers[0] else before).append(row)
        return before, layers, after

    def _read(self, row: PlanRow) -> torch.Tensor:
        tensor = self.checkpoint.read(row.name)
        if not torch.isfinite(tensor).all():
            raise InputError(f"{self.checkpoint.source}: tensor {row.name!r} holds NaN or infinite values")
        return tensor

    def _whole(self, row: PlanRow) -> None:
        """A row that needs no activations."""
        tensor = self._read(row)
        grid = self.sink.grid(row)
        if row.solver == "cast":
            self.sink.cast(row, tensor)
        elif grid is None:
            self.sink.encode(row, tensor.to(self.work.device))
        else:
            self._put(row, round_to_nearest(tensor.to(self.work.device), None, grid))

    def _put(self, row: PlanRow, rounded: Rounded) -> None:
        self.errors[row.name] = rounded.error
        self.sink.rounded(row, rounded.cpu())

    def _calibrated(self, layers: list[list[PlanRow]], rows: Rows) -> None:
        """Layer by layer, stage by stage, with what the layers rounded so far give."""
        stream = LayerStream(self.checkpoint, self.work.device, self.work.dtype)
        batch = max(BATCH_TOKENS // rows.ids.shape[1], 1)
        networks = ["rounded"] if self.work.solver.drift == 0 else ["rounded", "original"]
        hidden = {name: stream.embed(rows.ids, self._file(name, 0), batch) for name in networks}
        for number, layer in enumerate(track(layers, "layers")):
            with ExitStack() as stack:
                staged = {}
                for name in networks:
                    module = stack.enter_context(stream.layer(number, copy=name == "original"))
                    scratch = self._file(name, number)
                    staged[name] = StagedLayer(stream, number, module, hidden[name], scratch)
                    stack.callback(staged[name].close)
                self._layer(number, layer, staged, batch)
                for name in networks:
                    outputs = Activations(self._file(name, number + 1), hidden[name].shape)
                    for start in range(0, len(rows.ids), batch):
                        outputs.write(start, staged[name].outputs(start, batch))
                    hidden[name].remove()
                    hidden[name] = outputs
            give_freed_memory_back()
        for activations in hidden.values():
            activations.remove()

    def _file(self, name: str, number: int) -> Path:
        return self.work.scratch / f".{name}-{number}"

    def _layer(self, number: int, layer: list[PlanRow], staged: dict[str, StagedLayer], batch: int) -> None:
        """Round one layer's linear layers, stage by stage, and write all its rows."""
        family = self.checkpoint.family
        linears: dict[str, PlanRow] = {}
        for row in layer:
            name = row.module.removeprefix(f"{LAYER}{number}.")
            if name in family.linears and row.solver in CALIBRATED:
                linears[name] = row
            else:
                self._whole(row)
        now, ideal = staged["rounded"], staged.get("original")
        for stage, names in enumerate(family.stages):
            sums = MomentSums(
                now.linear(stage).in_features, now.hidden.shape[0], self.work.device, drift=len(staged) > 1
            )
            for start in range(0, now.hidden.shape[0], batch):
                x = now.inputs(stage, start, batch)
                sums.add(start, x, None if ideal is None else ideal.inputs(stage, start, batch))
            moments = sums.moments()
            for rows in self._alike([linears[name] for name in names if name in linears]):
                self._round(rows, moments, [now.module.get_submodule(self._short(row, number)) for row in rows])

    def _short(self, row: PlanRow, number: int) -> str:
        return row.module.removeprefix(f"{LAYER}{number}.")

    def _alike(self, rows: list[PlanRow]) -> Iterator[list[PlanRow]]:
        """Rows of one stage that can be solved as one weight: the same grid, and no scales that span a tensor."""
        left = list(rows)
        while left:
            first = left[0]
            same = [r for r in left if (r.type, r.solver) == (first.type, first.solver)]
            if self.sink.snap(first) is not None:
                same = same[:1]
            yield same
            left = [row for row in left if row not in same]

    def _round(self, rows: list[PlanRow], moments: Moments, modules: list[torch.nn.Module]) -> None:
        """Round the weights of one stage that share a grid, write them, and put them into their modules."""
        weight = torch.cat([self._read(row).to(self.work.device).float() for row in rows])
        grid = self.sink.grid(rows[0])
        assert grid is not None
        solved = self._solve(rows[0], weight, moments, grid)
        done = 0
        for row, module in zip(rows, modules, strict=True):
            part = solved.map(lambda t, a=done, b=done + row.shape[0]: t[a:b])  # type: ignore[misc]
            done += row.shape[0]
            self._put(row, part)
            module.weight.data.copy_(part.dequantize())  # type: ignore[union-attr,operator]

    def _solve(self, row: PlanRow, weight: torch.Tensor, moments: Moments, grid: Grid) -> Rounded:
        if row.solver == "imatrix":
            importance = moments.xxt.diagonal()
            return round_to_nearest(weight, moments.held or moments, grid, importance)
        try:
            return solve(weight, moments, grid, self.work.solver, self.sink.snap(row))
        except ValueError as error:
            raise InputError(f"{self.checkpoint.source}: {row.name} can't be rounded: {error}") from None
