"""Where the tensors of an artifact go: safetensors in one of the formats, or one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import GGUF_FILE
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.formats.bitsandbytes import BitsAndBytes, StoredScales
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.metadata import imatrix_metadata
from llmlite.formats.gguf.writer import GgufWriter
from llmlite.plan.plan import CALIBRATED, Plan, PlanRow
from llmlite.plan.types import GgufTypes, SafetensorsTypes
from llmlite.quantize.types import Grid, Ranges, Rounded


class Sink(Protocol):
    """Takes each row of the plan once, in the plan's order, and writes it through to the disk.

    `keep` takes a row that the unfinished run has written; after `flush` what was taken is on the disk for good.
    ``notes``: one sentence for each known difference of what will be written from the checkpoint.
    """

    notes: tuple[str, ...]

    def grid(self, row: PlanRow) -> Grid | None: ...
    def snap(self, row: PlanRow) -> Callable[[torch.Tensor], Ranges] | None: ...
    def cast(self, row: PlanRow, tensor: torch.Tensor) -> None: ...
    def rounded(self, row: PlanRow, rounded: Rounded) -> None: ...
    def encode(self, row: PlanRow, weight: torch.Tensor) -> torch.Tensor: ...
    def keep(self, row: PlanRow) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class SafetensorsSink:
    """A directory that transformers loads: shards, config with its quantization_config, tokenizer files."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, plan: Plan, types: SafetensorsTypes, reopen: bool):
        kept = str(types.dtype).removeprefix("torch.")
        same = checkpoint.dtype == types.dtype
        self.notes: tuple[str, ...] = () if same else (f"tensors that are not rounded are kept in {kept}",)
        self.types, self._directory, self._checkpoint, self._plan = types, directory, checkpoint, plan
        layout = {name: spec for row in plan.rows for name, spec in self._tensors(row).items()}
        self._writer = SafetensorsWriter(directory, layout, reopen=reopen)
        self._stored: StoredScales | None = None  # of the nf4 weight that is being rounded

    def _tensors(self, row: PlanRow) -> dict[str, TensorSpec]:
        """What a row becomes in the file."""
        layout = self.types.layout(row.module, row.type, row.shape)
        if row.type == self.types.linear:
            return layout
        return {row.name: layout[f"{row.module}.weight"]}  # a bias has no module of its own

    def grid(self, row: PlanRow) -> Grid | None:
        if row.type != self.types.linear:
            return None
        if isinstance(self.types.format, BitsAndBytes):  # rounding to nearest is left to the library
            return self.types.format.grid if row.solver == "feedback" else None
        return self.types.grid

    def snap(self, row: PlanRow) -> Callable[[torch.Tensor], Ranges] | None:
        if not isinstance(self.types.format, BitsAndBytes):
            return None
        nf4 = self.types.format

        def snapped(scales: torch.Tensor) -> Ranges:
            self._stored = nf4.snap(row.module, scales)
            return self._stored.ranges

        return snapped

    def cast(self, row: PlanRow, tensor: torch.Tensor) -> None:
        kept = tensor.to(self.types.dtype)
        if not torch.isfinite(kept).all():
            raise InputError(
                f"{row.name} has values beyond the range of {self.types.dtype}, which {self._plan.target} keeps"
            )
        self._writer.write(row.name, kept)

    def rounded(self, row: PlanRow, rounded: Rounded) -> None:
        if isinstance(self.types.format, BitsAndBytes):
            assert self._stored is not None
            self._put(self.types.format.pack(row.module, rounded, self._stored))
        else:
            self._put(self.types.format.pack(row.module, rounded))

    def encode(self, row: PlanRow, weight: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.types.format, BitsAndBytes)
        tensors, seen = self.types.format.encode(row.module, weight)
        self._put(tensors)
        return seen

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)

    def keep(self, row: PlanRow) -> None:
        for name in self._tensors(row):
            self._writer.keep(name)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        for file in self._checkpoint.side_files():
            copy = self._directory / file.relative_to(self._checkpoint.directory)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
        config = dict(self._checkpoint.config)
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.types.dtype).removeprefix("torch.")
        ignored = ["lm_head"]
        if isinstance(self.types.format, BitsAndBytes):
            config["quantization_config"] = self.types.format.config(ignored)
        else:
            assert self.types.grid is not None
            config["quantization_config"] = self.types.format.config(self.types.grid, ignored)
        (self._directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def abandon(self) -> None:
        self._writer.abandon()


class GgufSink:
    """One GGUF file with everything llama.cpp needs."""

    def __init__(
        self, directory: Path, checkpoint: Checkpoint, plan: Plan, types: GgufTypes, rows: Rows | None, reopen: bool
    ):
        self._model = describe(checkpoint)
        self.notes = self._model.notes
        extra = self._model.extra()
        layout = {self._model.gguf_name(row.name): (row.type, row.shape) for row in plan.rows}
        layout.update({name: ("f32", tuple(tensor.shape)) for name, tensor in extra.items()})
        metadata = {**self._model.metadata, **types.metadata}
        if rows is not None and plan.calibrated:
            dataset = ", ".join(source["source"] for source in rows.sources)
            solved = sum(row.solver in CALIBRATED for row in plan.rows)
            metadata |= imatrix_metadata("measured while rounding", dataset, solved, len(rows.ids))
        self._writer = GgufWriter(directory / GGUF_FILE, metadata, layout, reopen=reopen)
        self._extra = extra

    def grid(self, row: PlanRow) -> Grid | None:
        return gguf.grid_of(row.type) if row.type in GgufTypes.rounded else None

    def snap(self, row: PlanRow) -> Callable[[torch.Tensor], Ranges] | None:
        return None

    def cast(self, row: PlanRow, tensor: torch.Tensor) -> None:
        tensor = self._model.to_gguf(row.name, tensor)
        self._writer.write(self._model.gguf_name(row.name), gguf.encode(tensor, row.type))

    def rounded(self, row: PlanRow, rounded: Rounded) -> None:
        order = self._model.rows(row.name)
        if order is not None:  # rows are rounded each on its own, so their order can change afterwards
            rounded = rounded.map(lambda part: part[order])
        self._writer.write(self._model.gguf_name(row.name), gguf.pack(rounded, row.type))

    def encode(self, row: PlanRow, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("GGUF types are integer grids")

    def keep(self, row: PlanRow) -> None:
        self._writer.keep(self._model.gguf_name(row.name))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        for name, tensor in self._extra.items():
            self._writer.write(name, gguf.encode(tensor, "f32"))
        self._writer.close()

    def abandon(self) -> None:
        self._writer.abandon()


def open_sink(
    directory: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    types: GgufTypes | SafetensorsTypes,
    rows: Rows | None,
    *,
    reopen: bool = False,
) -> Sink:
    """The sink for the plan's target; ``rows``: the calibration tokens, which a GGUF file tells of.

    ``reopen``: the directory is an unfinished run's, and its files are gone on with.
    """
    if isinstance(types, GgufTypes):
        return GgufSink(directory, checkpoint, plan, types, rows, reopen)
    return SafetensorsSink(directory, checkpoint, plan, types, reopen)
