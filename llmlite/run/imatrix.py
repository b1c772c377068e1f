"""Measure llama.cpp's importance matrix: the mean squared inputs of every linear layer of the unquantized model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmlite.calibrate.rows import Rows
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.artifact import refuse_full_disk, scratch_directory
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.gguf_names import gguf_name
from llmlite.errors import InputError
from llmlite.formats.gguf.imatrix import Imatrix, write_imatrix
from llmlite.memory import give_freed_memory_back, keep_heap_small
from llmlite.progress import track
from llmlite.run.text import calibration_rows, check_row_length, choose_device, opened

BATCH_TOKENS = 2048
FLOAT = 4


@dataclass(frozen=True)
class ImatrixSettings:
    """What `measure_imatrix` can be told."""

    calibration: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text, JSON lines or chat files, or dataset names (default: a small mix that is packaged)"},
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "tokens of calibration text in all"})
    row_length: int = field(default=512, metadata={"help": "tokens in one calibration row"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration rows"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})


def measure_imatrix(model: str | Path, out: str | Path, settings: ImatrixSettings) -> Imatrix:
    """Run calibration text through ``model`` (directory, GGUF file or hub id) and write the new file ``out``.

    It has the entries that llama-imatrix writes by default: each linear layer of each decoder layer, and no head, tied
    or not (tools/imatrix/README.md, --process-output). The model computes in float32, one decoder layer in memory at
    a time; chunks are the calibration rows. Raises `InputError` for a model, text or ``out`` that won't do, before
    the model runs or at the first inputs that are not finite; `OutsideError` and OSError where the disk fails.
    """
    keep_heap_small()
    out = Path(out)
    _check_out(out)
    check_row_length(settings.calibration_tokens, settings.row_length)
    device = choose_device(settings.device, settings.threads)
    with scratch_directory(out) as scratch, opened(str(model), settings.revision, scratch / "base") as checkpoint:
        rows = calibration_rows(
            checkpoint, settings.calibration, settings.calibration_tokens, settings.row_length, settings.seed
        )
        _check_disk(out, checkpoint, rows)
        sums = _sums(checkpoint, rows, device, scratch / "hidden")
        count, length = rows.ids.shape
        datasets = tuple(source["source"] for source in rows.sources)
        counts = dict.fromkeys(sums, rows.ids.size)
        imatrix = Imatrix(sums, counts, count, length, datasets, f"the importance matrix of {checkpoint.source}")
        write_imatrix(out, imatrix)
    return imatrix


def _check_out(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: its folder is not there")
    if os.path.lexists(out):
        raise InputError(f"-o {out}: is there already; remove it or name another file")


def _check_disk(out: Path, checkpoint: Checkpoint, rows: Rows) -> None:
    """The file's sums and names, and the hidden states of one layer while it is made."""
    linears = [f"{LAYER}{n}.{name}.weight" for n in range(checkpoint.num_layers) for name in checkpoint.family.linears]
    file = sum(checkpoint.tensors[name].shape[1] * FLOAT for name in linears)
    refuse_full_disk(out, file, rows.ids.size * checkpoint.config["hidden_size"] * FLOAT)


@torch.no_grad()
def _sums(checkpoint: Checkpoint, rows: Rows, device: str, file: Path) -> dict[str, torch.Tensor]:
    """Per GGUF tensor name the sum of squared inputs over all tokens, float32 [in]; summed in float64."""
    stream = LayerStream(checkpoint, device)
    batch = max(BATCH_TOKENS // rows.ids.shape[1], 1)
    hidden = stream.embed(rows.ids, file, batch)
    sums: dict[str, torch.Tensor] = {}
    try:
        for number in track(range(checkpoint.num_layers), "layers"):
            for stage, total in zip(checkpoint.family.stages, _layer(stream, number, hidden, batch), strict=True):
                names = [f"{LAYER}{number}.{name}.weight" for name in stage]
                if not torch.isfinite(total).all():
                    raise InputError(
                        f"{checkpoint.source}: the inputs of {names[0]} are not all finite on the calibration text; "
                        "weights with which the model computes in float32 are right"
                    )
                sums.update({gguf_name(checkpoint.family, name): total.float().cpu() for name in names})
            give_freed_memory_back()
    finally:
        hidden.remove()
    return sums


def _layer(stream: LayerStream, number: int, hidden: Activations, batch: int) -> list[torch.Tensor]:
    """Each stage's sums of squared inputs, float64 [in]; layer ``number``'s outputs take the place of its inputs."""
    totals, handles = [], []
    with stream.layer(number) as module:
        for stage in stream.checkpoint.family.stages:
            first = module.get_submodule(stage[0])
            assert isinstance(first, torch.nn.Linear)
            total = torch.zeros(first.in_features, dtype=torch.float64, device=stream.device)
            handles.append(first.register_forward_pre_hook(_adder(total)))
            totals.append(total)
        for start in range(0, hidden.shape[0], batch):
            hidden.write(start, stream.forward(number, module, hidden.read(start, batch)))
        for handle in handles:
            handle.remove()
    return totals


def _adder(total: torch.Tensor) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    """A hook that adds a linear layer's squared inputs [rows, length, in] to ``total`` [in]."""

    def add(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        total.add_(args[0].flatten(0, -2).square().sum(0))

    return add
