"""One pass over a checkpoint, row of the plan by row of the plan: read, round, write."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.calibrate.moments import HELD_EVERY, MomentSums
from llmlite.calibrate.rows import Rows
from llmlite.calibrate.stages import StagedLayer, stage_inputs
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.artifact import JOURNAL, TRAINING
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError, first_line
from llmlite.memory import give_freed_memory_back
from llmlite.plan.plan import CALIBRATED, Plan, PlanRow
from llmlite.progress import track
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.solve import SolverSettings, solve
from llmlite.quantize.types import Grid, Moments, Rounded
from llmlite.run.head import TIED_DAMPING, enough_rows, head_moments, solve_in_pieces
from llmlite.run.journal import Journal
from llmlite.run.sinks import Sink
from llmlite.run.timing import Clock

BATCH_TOKENS = 512
ESTIMATE_ROWS = 2048  # of a head are solved to see how long all will take
PHASES = ("capture", "moments", "solving", "writing")  # what `Job.seconds` tells apart


@dataclass(frozen=True)
class Work:
    """What a job is told beside the plan: how to solve, where to compute, where to keep activations and journal.

    ``drift``: the unquantized network runs beside the one that is being rounded. ``importance``: the mean squared
    inputs of linear layers by tensor name, float32 [in], where they are known without calibration.
    """

    solver: SolverSettings
    device: str
    scratch: Path
    drift: bool = True
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Job:
    """Rounds and writes every row of a plan; `errors` has each rounded tensor's relative weighted error.

    ``journal``: how far an earlier run of the same job has come; it is kept up to date after each decoder layer.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, sink: Sink, work: Work, journal: Journal):
        self.checkpoint, self.plan, self.sink, self.work, self.journal = checkpoint, plan, sink, work, journal
        self.errors = dict(journal.errors)
        self._clocks = {phase: Clock(work.device) for phase in PHASES}
        self._weighs = any(row.solver == "feedback" for row in plan.rows)  # an importance matrix has tokens alike

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time of this run went."""
        return {phase: clock.seconds for phase, clock in self._clocks.items()}

    def run(self, rows: Rows | None) -> dict[str, float]:
        """Write every row; ``rows`` are the calibration tokens where the plan asks for them."""
        before, layers, after = self._parts()
        done = self.journal.layers
        if done:
            for row in chain(before, *layers[:done]):
                self.sink.keep(row)
        else:
            for row in before:
                if row.solver in CALIBRATED and rows is not None:
                    self._tied_head(row, rows)
                else:
                    self._whole(row)
        heads, hidden = [row for row in after if row.solver in CALIBRATED and not self.journal.head], {}
        if rows is None:
            for number in track(range(done, len(layers)), "layers"):
                for row in layers[number]:
                    self._whole(row)
                self._write_journal(number + 1)
                give_freed_memory_back()
        elif done < len(layers) or heads:
            hidden = self._calibrated(layers, rows, bool(heads))
        else:
            self._forget_activations()
        for row in after:
            if row in heads and rows is not None:
                self._own_head(row, hidden, self._batch(rows))
            elif row.solver in CALIBRATED:
                self.sink.keep(row)
            else:
                self._whole(row)
        return self.errors

    def estimate(self, rows: Rows) -> float:
        """Seconds that the layers still to do, and a head that is solved, will take; nothing is written.

        From one layer run on two batches, of which the first only warms up, and from a part of the head.
        """
        done, batch, stream = self.journal.layers, self._batch(rows), self._stream()
        layer = self._parts()[1][done]
        few = rows.ids[np.arange(2 * batch) % len(rows.ids)]
        once, each, passed = (Clock(self.work.device) for _ in range(3))
        with ExitStack() as stack:
            hidden = {}
            for name in self._networks:
                hidden[name] = stream.embed(few, self.work.scratch / f".estimate-{name}", batch)
                stack.callback(hidden[name].remove)
            with once:
                staged = self._staged(stream, done, hidden, stack)
            for start in (0, batch):
                passed.seconds = 0.0
                with passed:
                    stream.forward(done, staged["rounded"].module, hidden["rounded"].read(start, batch))
            for stage, linears in enumerate(self._stages(done, layer)):
                sums = MomentSums(staged["rounded"].linear(stage).in_features, HELD_EVERY, self.work.device)
                sums.add(0, *self._inputs(stage, staged, 0, batch))
                with each:
                    sums.add(HELD_EVERY - 1, *self._inputs(stage, staged, batch, batch))
                moments = sums.moments()
                for alike in self._alike(linears):
                    grid = self.sink.grid(alike[0])
                    assert grid is not None
                    with once:
                        self._solve(alike, moments, grid)
            for name, part in staged.items():
                hidden[name].write(0, part.outputs(0, batch))
                with each:
                    hidden[name].write(batch, part.outputs(batch, batch))
            head = self._estimated_head(stream, hidden, rows, passed.seconds)
        give_freed_memory_back()
        return head + (self.checkpoint.num_layers - done) * (once.seconds + each.seconds * len(rows.ids) / batch)

    def _estimated_head(self, stream: LayerStream, hidden: dict[str, Activations], rows: Rows, each: float) -> float:
        """Seconds for the head, from few of its rows; ``each``: how long a batch takes through a layer."""
        tied = self.checkpoint.tied
        row = next(row for row in self.plan.rows if row.name == self.checkpoint.head)
        if row.solver not in CALIBRATED or (tied and self.journal.layers):
            return 0.0
        moments, clock = head_moments(stream, hidden, self._batch(rows)), Clock(self.work.device)
        weight, grid = self._read(row)[:ESTIMATE_ROWS].to(self.work.device).float(), self.sink.grid(row)
        assert grid is not None
        with clock:
            self._solved(row, weight, moments, grid, self.work.solver)
        solving = clock.seconds * row.shape[0] / len(weight)
        batches = len(enough_rows(row, rows.ids)) / self._batch(rows)
        return solving + (self.checkpoint.num_layers * batches * each if tied else 0.0)

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

    def _write_journal(self, layers: int) -> None:
        """So many layers are done, and what they wrote is on the disk: a killed run goes on after them."""
        with self._clocks["writing"]:
            self.sink.flush()
            self.journal.layers, self.journal.errors = layers, dict(self.errors)
            self.journal.write(self.work.scratch)

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
            with self._clocks["writing"]:
                self.sink.cast(row, tensor)
        elif grid is None:
            with self._clocks["solving"]:
                self.sink.encode(row, tensor.to(self.work.device))
        else:
            with self._clocks["solving"]:
                importance = self.work.importance.get(row.name)
                rounded = round_to_nearest(tensor.to(self.work.device), None, grid, importance)
            self._put(row, rounded)

    def _put(self, row: PlanRow, rounded: Rounded) -> None:
        self.errors[row.name] = rounded.error
        with self._clocks["writing"]:
            self.sink.rounded(row, rounded.cpu())

    def _calibrated(self, layers: list[list[PlanRow]], rows: Rows, to_the_end: bool) -> dict[str, Activations]:
        """Layer by layer, stage by stage, with what the layers rounded so far give.

        ``to_the_end``: what the last layer gives is wanted too, and returned.
        """
        stream, batch = self._stream(), self._batch(rows)
        hidden = self._first_inputs(stream, rows, batch)
        for number in track(range(self.journal.layers, len(layers)), "layers"):
            with ExitStack() as stack:
                with self._clocks["capture"]:
                    staged = self._staged(stream, number, hidden, stack)
                self._layer(number, layers[number], staged, batch)
                last = number + 1 == len(layers) and not to_the_end
                outputs = {} if last else {name: self._outputs(name, layer, batch) for name, layer in staged.items()}
            self._write_journal(number + 1)
            for activations in hidden.values():
                activations.remove()
            hidden = outputs
            give_freed_memory_back()
        return hidden

    def _tied_head(self, row: PlanRow, rows: Rows) -> None:
        """The embedding that is the head too, by what the unquantized network gives it on a part of the text."""
        stream, batch = self._stream(), self._batch(rows)
        with self._clocks["capture"]:
            hidden = stream.through(enough_rows(row, rows.ids), self._file("head", 0), batch, "head's inputs")
        with self._clocks["moments"]:
            moments = head_moments(stream, {"rounded": hidden}, batch)
        hidden.remove()
        self._head(row, moments, replace(self.work.solver, damping=max(TIED_DAMPING, self.work.solver.damping)))

    def _own_head(self, row: PlanRow, hidden: dict[str, Activations], batch: int) -> None:
        """A head with a weight of its own, by what the rounded network gives it."""
        with self._clocks["moments"]:
            moments = head_moments(self._stream(), hidden, batch)
        self._head(row, moments, self.work.solver)
        self.journal.head = True
        self._write_journal(self.checkpoint.num_layers)
        for activations in hidden.values():
            activations.remove()

    def _head(self, row: PlanRow, moments: Moments, settings: SolverSettings) -> None:
        """Round and write a head."""
        grid, weight = self.sink.grid(row), self._read(row)
        assert grid is not None
        with self._clocks["solving"]:
            rounded = solve_in_pieces(weight, moments, lambda part: self._solved(row, part, moments, grid, settings))
        self._put(row, rounded)

    def _stream(self) -> LayerStream:
        return LayerStream(self.checkpoint, self.work.device, self.work.dtype)

    @staticmethod
    def _batch(rows: Rows) -> int:
        """How many rows of the calibration text run at once."""
        return max(BATCH_TOKENS // rows.ids.shape[1], 1)

    @property
    def _networks(self) -> tuple[str, ...]:
        return ("original", "rounded") if self.work.drift else ("rounded",)  # a copy is made before weights are loaded

    def _staged(
        self, stream: LayerStream, number: int, hidden: dict[str, Activations], stack: ExitStack
    ) -> dict[str, StagedLayer]:
        """Layer ``number`` of each network, its weights loaded until ``stack`` closes."""
        staged = {}
        for name, activations in hidden.items():
            fixed = name == "original"
            module = stack.enter_context(stream.layer(number, copy=fixed))
            scratch = self._file(name, number)
            staged[name] = StagedLayer(stream, number, module, activations, scratch, fixed=fixed)
            stack.callback(staged[name].close)
        return staged

    def _first_inputs(self, stream: LayerStream, rows: Rows, batch: int) -> dict[str, Activations]:
        """What the first layer to do takes in, in the rounded network and, to see the drift, in the original one."""
        networks, done = self._networks, self.journal.layers
        with self._clocks["capture"]:
            if done == 0:
                return {name: stream.embed(rows.ids, self._file(name, 0), batch) for name in networks}
            files = {name: self._file(name, done) for name in networks}
            self._forget_activations(files.values())
            stream.embed(rows.ids[:batch], self._file("rounded", 0), batch).remove()  # for the layers' other arguments
            shape = (*rows.ids.shape, self.checkpoint.config["hidden_size"])
            return {name: Activations(file, shape, reopen=True) for name, file in files.items()}

    def _forget_activations(self, but: Collection[Path] = ()) -> None:
        """Remove those of the layer that an earlier run was cut off in."""
        for file in self.work.scratch.glob(".*"):
            if file.name != JOURNAL and not file.name.startswith(TRAINING) and file not in but:  # a repair's goes on
                file.unlink()

    def _outputs(self, name: str, layer: StagedLayer, batch: int) -> Activations:
        """The inputs of the next layer, on the disk for good."""
        with self._clocks["capture"]:
            outputs = Activations(self._file(name, layer.number + 1), layer.hidden.shape)
            for start in range(0, layer.hidden.shape[0], batch):
                outputs.write(start, layer.outputs(start, batch))
            outputs.flush()
        return outputs

    def _file(self, name: str, number: int) -> Path:
        return self.work.scratch / f".{name}-{number}"

    def _layer(self, number: int, layer: list[PlanRow], staged: dict[str, StagedLayer], batch: int) -> None:
        """Round one layer's linear layers, stage by stage, and write all its rows."""
        stages = self._stages(number, layer)
        calibrated = set(chain(*stages))
        for row in layer:
            if row not in calibrated:
                self._whole(row)
        for stage, linears in enumerate(stages):
            moments = self._moments(stage, staged, batch)
            for rows in self._alike(linears):
                self._round(rows, moments, staged["rounded"].module)
            del moments  # before the next stage's are laid out

    def _stages(self, number: int, layer: list[PlanRow]) -> list[list[PlanRow]]:
        """The rows of a layer that are rounded with its activations, stage by stage."""
        named = {row.module.removeprefix(f"{LAYER}{number}."): row for row in layer if row.solver in CALIBRATED}
        return [[named[name] for name in names if name in named] for names in self.checkpoint.family.stages]

    def _moments(self, stage: int, staged: dict[str, StagedLayer], batch: int) -> Moments:
        """The moments of a stage's inputs; every stage is run, since the layer's outputs need what it keeps."""
        now = staged["rounded"]
        rows = now.hidden.shape[0]
        sums = MomentSums(now.linear(stage).in_features, rows, self.work.device)
        for start in range(0, rows, batch):
            with self._clocks["capture"]:
                inputs = self._inputs(stage, staged, start, batch)
            with self._clocks["moments"]:
                sums.add(start, *inputs)
        if not sums.finite:
            name = self.checkpoint.family.stages[stage][0]
            raise InputError(
                f"{self.checkpoint.source}: the inputs of {LAYER}{now.number}.{name} are not all finite on the "
                "calibration text; weights with which the model computes in float32 are right"
            )
        with self._clocks["moments"]:
            return sums.moments()

    def _inputs(self, stage: int, staged: dict[str, StagedLayer], start: int, batch: int) -> tuple[Any, Any, Any]:
        """What `MomentSums.add` takes, for rows from ``start``."""
        ideal = staged.get("original")
        return stage_inputs(staged["rounded"], ideal, stage, start, batch, by_worth=self._weighs)

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

    def _round(self, rows: list[PlanRow], moments: Moments, layer: torch.nn.Module) -> None:
        """Round the weights of one stage that share a grid, write them, and put them into their layer."""
        grid = self.sink.grid(rows[0])
        assert grid is not None
        with self._clocks["solving"]:
            solved = self._solve(rows, moments, grid)
        done = 0
        for row in rows:
            part = solved.map(lambda t, a=done, b=done + row.shape[0]: t[a:b])  # type: ignore[misc]
            done += row.shape[0]
            self._put(row, part)
            linear = layer.get_submodule(row.module.removeprefix(LAYER).partition(".")[2])
            linear.weight.data.copy_(part.dequantize())  # type: ignore[union-attr,operator]

    def _solve(self, rows: list[PlanRow], moments: Moments, grid: Grid) -> Rounded:
        """The rows' weights, one upon the other, rounded."""
        weight = torch.cat([self._read(row).to(self.work.device).float() for row in rows])
        if rows[0].solver == "imatrix":
            importance = moments.xxt.diagonal()
            return round_to_nearest(weight, moments.held or moments, grid, importance)
        return self._solved(rows[0], weight, moments, grid, self.work.solver)

    def _solved(
        self, row: PlanRow, weight: torch.Tensor, moments: Moments, grid: Grid, settings: SolverSettings
    ) -> Rounded:
        try:
            return solve(weight, moments, grid, settings, self.sink.snap(row))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{self.checkpoint.source}: {row.name} can't be rounded: {first_line(error)}") from None
