"""Adapters made of rounding errors: for each linear layer the low-rank part of what its rounded weight lost.

Nothing is trained. Layer by layer, as in `quantize`, the base and the rounded network run side by side on calibration
text, the rounded one with the adapters made so far. A layer's product is fitted to what its inputs are there, and to
the weight that also makes good what the layers before it lost (`corrected`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmlite.calibrate.moments import MomentSums
from llmlite.calibrate.rows import Rows
from llmlite.calibrate.stages import StagedLayer, stage_inputs
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError, first_line
from llmlite.formats.peft import AdapterWriter
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track
from llmlite.quantize.low_rank import low_rank
from llmlite.quantize.rtn import row_errors
from llmlite.quantize.solve import damped
from llmlite.quantize.target import corrected
from llmlite.quantize.types import Moments

BATCH_TOKENS = 512
DAMPING = 0.02
Init = Literal["qera", "eora", "loftq"]


@dataclass(frozen=True)
class ErrorAdapterSettings:
    """``init``: qera weighs the error by the second moments of the inputs; eora is another name for the same product;
    loftq weighs all channels alike, and needs no text. ``drift``: how much is applied of the correction for what
    earlier layers lost, 0 to 1; above 0 the base runs beside the rounded network.
    """

    init: Init = "qera"
    rank: int = 32
    drift: float = 1.0
    device: str = "cpu"


@dataclass(frozen=True)
class ErrorAdapter:
    """What was made. ``bytes``: of the pairs. ``before`` and ``after``: relative weighted error of each layer's output
    without and with its pair, by the layer's name, on held-out tokens where the text has enough; tr(E M ET) / tr(W M
    WT), M the identity for loftq.
    """

    bytes: int
    before: dict[str, float]
    after: dict[str, float]


def error_adapter(
    base: Checkpoint, rounded: Checkpoint, rows: Rows | None, directory: Path, settings: ErrorAdapterSettings
) -> ErrorAdapter:
    """Write to ``directory`` a peft adapter that brings ``rounded`` nearer to ``base``.

    ``rounded``: `base`'s own artifact, as `dequantized` reads it; ``rows``: calibration text, unless loftq. Their
    activations lie in ``directory`` meanwhile. Raises `InputError` for a rank that is too large, for checkpoints of
    different shapes, and where inputs are not finite.
    """
    shapes = _shapes(base, rounded, settings.rank)
    writer = AdapterWriter(directory, shapes, settings.rank, rounded.source)
    try:
        work = _Work(base, rounded, writer, directory, settings)
        if settings.init == "loftq":
            for module in track(shapes, "adapters"):
                work.unweighted(module)
        else:
            if rows is None:
                raise ValueError(f"{settings.init} needs calibration text")
            work.calibrated(rows)
        writer.close()
    finally:
        writer.abandon()
    return ErrorAdapter(writer.bytes, work.before, work.after)


def _shapes(base: Checkpoint, rounded: Checkpoint, rank: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(base.num_layers):
        for name in base.family.linears:
            module = f"{LAYER}{layer}.{name}"
            wanted = base.tensors[f"{module}.weight"].shape
            found = rounded.tensors.get(f"{module}.weight")
            if found is None or found.shape != wanted:
                raise InputError(
                    f"{rounded.source}: {module} is not {list(wanted)} as in {base.source}: an artifact of another base"
                )
            if not 1 <= rank <= min(wanted):
                raise InputError(f"--rank {rank}: {module} is {list(wanted)}; from 1 to {min(wanted)} is right")
            shapes[module] = (wanted[0], wanted[1])
    return shapes


class _Work:
    """Goes through the layers of both networks."""

    def __init__(
        self,
        base: Checkpoint,
        rounded: Checkpoint,
        writer: AdapterWriter,
        scratch: Path,
        settings: ErrorAdapterSettings,
    ):
        self.base, self.rounded, self.writer, self.scratch, self.settings = base, rounded, writer, scratch, settings
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def unweighted(self, module: str) -> None:
        """One layer's pair from its two weights alone."""
        weight, seen = (self._weight(checkpoint, module) for checkpoint in (self.base, self.rounded))
        self._pair(module, weight, seen, None, None)

    def calibrated(self, rows: Rows) -> None:
        """Every layer's pairs, with the inputs that it has after the layers before it got theirs."""
        networks = {"rounded": self.rounded} | ({"base": self.base} if self.settings.drift > 0 else {})
        batch = max(BATCH_TOKENS // rows.ids.shape[1], 1)
        streams = {name: LayerStream(checkpoint, self.settings.device) for name, checkpoint in networks.items()}
        hidden = {name: stream.embed(rows.ids, self._file(name, 0), batch) for name, stream in streams.items()}
        for number in track(range(self.base.num_layers), "adapters"):
            with ExitStack() as stack:
                staged = {}
                for name, stream in streams.items():
                    module = stack.enter_context(stream.layer(number))
                    scratch, fixed = self._file(name, number), name == "base"
                    staged[name] = StagedLayer(stream, number, module, hidden[name], scratch, fixed=fixed)
                    stack.callback(staged[name].close)
                for stage in range(len(self.base.family.stages)):
                    self._stage(number, stage, staged, batch)
                last = number + 1 == self.base.num_layers
                outputs = {} if last else {name: self._outputs(name, layer, batch) for name, layer in staged.items()}
            for activations in hidden.values():
                activations.remove()
            hidden = outputs
            give_freed_memory_back()

    def _stage(self, number: int, stage: int, staged: dict[str, StagedLayer], batch: int) -> None:
        """The pairs of the linear layers that share an input; their products are put into the rounded network."""
        now = staged["rounded"]
        sums = MomentSums(now.linear(stage).in_features, now.hidden.shape[0], self.settings.device)
        for start, inputs in self._inputs(stage, staged, batch):
            sums.add(start, *inputs)
        names = self.base.family.stages[stage]
        if not sums.finite:
            raise InputError(
                f"{self.rounded.source}: the inputs of {LAYER}{number}.{names[0]} are not all finite on the "
                "calibration text"
            )
        moments = sums.moments()
        modules = [f"{LAYER}{number}.{name}" for name in names]
        matrix = damped(moments.xxt, DAMPING)
        for name, module, target in zip(names, modules, self._targets(modules, moments, matrix), strict=True):
            linear = now.module.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            linear.weight.data += self._pair(module, target, linear.weight.data, matrix, moments.held or moments)

    def _targets(self, modules: list[str], moments: Moments, matrix: torch.Tensor) -> list[torch.Tensor]:
        """What the layers of one stage should compute with: their weights, corrected for the drift of their inputs."""
        weights = [self._weight(self.base, module) for module in modules]
        if moments.cross is None:
            return weights
        try:
            whole = corrected(torch.cat(weights), moments, matrix, self.settings.drift)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{self.rounded.source}: {modules[0]} has no adapter: {first_line(error)}") from None
        return list(whole.split([len(weight) for weight in weights]))

    def _inputs(
        self, stage: int, staged: dict[str, StagedLayer], batch: int
    ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]]:
        """Where each batch starts, and what `MomentSums.add` takes of it."""
        now, ideal = staged["rounded"], staged.get("base")
        for start in range(0, now.hidden.shape[0], batch):
            yield start, stage_inputs(now, ideal, stage, start, batch)

    def _outputs(self, name: str, layer: StagedLayer, batch: int) -> Activations:
        outputs = Activations(self._file(name, layer.number + 1), layer.hidden.shape)
        for start in range(0, layer.hidden.shape[0], batch):
            outputs.write(start, layer.outputs(start, batch))
        return outputs

    def _pair(
        self, module: str, target: torch.Tensor, seen: torch.Tensor, matrix: torch.Tensor | None, judge: Moments | None
    ) -> torch.Tensor:
        """Write the pair of one layer, and note what it is worth; its product as it is kept, float32 [out, in]."""
        try:
            b, a = low_rank(target - seen, self.settings.rank, matrix)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{self.rounded.source}: {module} has no adapter: {first_line(error)}") from None
        self.writer.write(module, a.cpu(), b.cpu())
        change = b.to(self.writer.dtype).float() @ a.to(self.writer.dtype).float()
        whole = row_errors(target, torch.zeros_like(target), judge).sum().item()
        for told, values in ((self.before, seen), (self.after, seen + change)):
            told[module] = row_errors(target, values, judge).sum().item() / whole if whole > 0 else 0.0
        return change

    def _weight(self, checkpoint: Checkpoint, module: str) -> torch.Tensor:
        weight = checkpoint.read(f"{module}.weight").to(self.settings.device, torch.float32)
        if not torch.isfinite(weight).all():
            raise InputError(f"{checkpoint.source}: {module} holds NaN or infinite values")
        return weight

    def _file(self, name: str, number: int) -> Path:
        return self.scratch / f".{name}-{number}"
