"""Types under a budget: what `quantize` does for --target-size and --target-bpw before it rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from rich.table import Table

from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.errors import InputError
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.writer import head_bytes
from llmlite.plan.budget import parse_size
from llmlite.plan.presets import preset_name
from llmlite.quantize.rtn import round_to_nearest
from llmlite.run.allocate import AllocateSettings, Allocation, Offer, allocate

CURVATURE_ROWS = 32  # rows of calibration text that the curvature is taken from, at most
SMALLEST_BITS, LARGEST_BITS = 2.0, 16.0  # bits per weight that can be asked for
SPARE = 4096  # bytes left free: notes about the calibration in the file's head, and its alignment


def tensor_budget(checkpoint: Checkpoint, target_size: str | None, target_bpw: float | None) -> int:
    """Bytes that the matrices may take: the whole file's less its head and its vectors, or bits per weight of all."""
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items() if not name.endswith("inv_freq")}
    vectors = sum(gguf.nbytes("f32", shape) for shape in shapes.values() if len(shape) == 1)
    if target_bpw is not None:
        if not SMALLEST_BITS < target_bpw <= LARGEST_BITS:
            raise InputError(f"--target-bpw {target_bpw}: above {SMALLEST_BITS:g}, at most {LARGEST_BITS:g} is right")
        return math.floor(target_bpw * sum(math.prod(shape) for shape in shapes.values()) / 8) - vectors
    assert target_size is not None
    model = describe(checkpoint)
    layout = {model.gguf_name(name): ("f32" if len(shape) == 1 else "f16", shape) for name, shape in shapes.items()}
    return parse_size(target_size) - head_bytes(model.metadata, layout) - vectors - SPARE


def allocate_types(checkpoint: Checkpoint, budget: int, rows: Rows, device: str) -> Allocation:
    """A GGUF type for every matrix, for the least divergence in ``budget`` bytes; see `allocate`."""
    ids = rows.ids[:: max(len(rows.ids) // CURVATURE_ROWS, 1)][:CURVATURE_ROWS]
    measured = max(min(8, len(ids) // 2), 1)
    offer = Offer(_candidates(checkpoint), _sizes(checkpoint), _rounder(checkpoint))
    return allocate(checkpoint, budget, offer, ids, AllocateSettings(measure_rows=measured, device=device))


def rules_of(allocation: Allocation) -> tuple[str, ...]:
    """The choice as rules for the plan: one exact name each."""
    return tuple(f"^{name.replace('.', chr(92) + '.')}$={kind}" for name, kind in allocation.types.items())


def nearest_preset(allocation: Allocation) -> str:
    """The preset that is named after the type that most matrices got."""
    kind = Counter(allocation.types.values()).most_common(1)[0][0]
    return preset_name(kind) or "q8_0"


def allocation_table(allocation: Allocation) -> Table:
    """How many matrices of each role got which type, and what they cost."""
    table = Table(title=f"types for {allocation.bytes / 1e6:,.1f} MB of matrices")
    for heading in ("role", "types", "MB", "predicted KL"):
        table.add_column(heading, justify="left" if heading in ("role", "types") else "right")
    for role in dict.fromkeys(row.role for row in allocation.rows):
        mine = [row for row in allocation.rows if row.role == role]
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.type for row in mine).most_common())
        size, predicted = sum(row.bytes for row in mine) / 1e6, sum(row.predicted for row in mine)
        table.add_row(role, kinds, f"{size:,.1f}", f"{predicted:.4f}")
    return table


def _candidates(checkpoint: Checkpoint) -> Callable[[str], list[str]]:
    kinds = [name for name, kind in gguf.TYPES.items() if kind.grid is not None]

    def candidates(name: str) -> list[str]:
        return [kind for kind in kinds if gguf.refusal(kind, checkpoint.tensors[name].shape) is None]

    return candidates


def _sizes(checkpoint: Checkpoint) -> Callable[[str, str], int]:
    return lambda name, kind: gguf.nbytes(kind, checkpoint.tensors[name].shape)


def _rounder(checkpoint: Checkpoint) -> Callable[[str, str, torch.Tensor | None], torch.Tensor]:
    """Weighted rounding to nearest: feedback takes about the same share off every type's loss."""

    def rounder(name: str, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
        return round_to_nearest(checkpoint.read(name), None, gguf.grid_of(kind), importance).dequantize()

    return rounder
