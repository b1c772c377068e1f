"""What will be done to each tensor, decided and checked before any work: a row per tensor, with its bytes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.safetensors_index import NAMES
from llmlite.errors import InputError
from llmlite.formats.gguf.types import grid_of
from llmlite.plan.order import working_order
from llmlite.plan.target import Target
from llmlite.plan.types import Assigned, TypeTable

SolverName = Literal["auto", "rtn", "imatrix", "feedback"]
CALIBRATED = ("imatrix", "feedback")  # the solvers that ask for the moments of a layer's inputs


@dataclass(frozen=True)
class PlanRow:
    """One tensor: ``name`` and ``shape`` as in the base, ``type`` what it becomes, ``solver`` how, ``bytes`` stored."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    type: str
    solver: str
    bytes: int

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Every tensor's row, in the order in which they are worked on and written.

    ``notes``: one sentence for each type that some tensors can't have, with what they become instead.
    """

    target: Target
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors; the file adds its header and, in GGUF, the tokenizer."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.parameters

    @property
    def calibrated(self) -> bool:
        """Some solver asks for the moments of a layer's inputs."""
        return any(row.solver in CALIBRATED for row in self.rows)

    def to_json(self) -> list[dict]:
        return [asdict(row) for row in self.rows]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([str(self.target), self.to_json()]).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, target: Target, types: TypeTable, solver: SolverName = "auto") -> Plan:
    """Resolve the rules to a row per tensor; `InputError` for the first tensor that the format can't hold."""
    assigned = types.assign(checkpoint)
    linears = {f"{LAYER}{i}.{name}.weight" for i in range(checkpoint.num_layers) for name in checkpoint.family.linears}
    chosen = _solver(target, types, solver, {assigned.types[name] for name in linears} & types.rounded)
    solved = linears | {checkpoint.head} if chosen == "feedback" and _coarse(types, assigned, checkpoint) else linears
    rows = []
    for name in working_order(checkpoint):
        entry, kind = checkpoint.tensors[name], assigned.types[name]
        how = "cast" if kind not in types.rounded else chosen if name in solved else "rtn"
        reason = types.refusal(kind, entry.shape)
        if reason:
            raise InputError(
                f"{checkpoint.source}: {name} {list(entry.shape)} can't become {target.format}:{kind}: {reason}"
                + _better_group(checkpoint, target)
            )
        rows.append(PlanRow(name, entry.shape, NAMES[entry.dtype], kind, how, types.nbytes(name, kind, entry.shape)))
    return Plan(target, tuple(rows), assigned.notes)


def _coarse(types: TypeTable, assigned: Assigned, checkpoint: Checkpoint) -> bool:
    """The head becomes a type of fewer than 8 bits; with 8 and more, rounding to nearest loses next to nothing."""
    kind = assigned.types[checkpoint.head]
    return kind in types.rounded and grid_of(kind).bits < 8  # only GGUF's tables round a head


def _better_group(checkpoint: Checkpoint, target: Target) -> str:
    """Names a group size that divides every width, where the one asked for does not."""
    widths = {checkpoint.tensors[f"{LAYER}0.{name}.weight"].shape[1] for name in checkpoint.family.linears}
    fitting = [group for group in (128, 64, 32) if all(width % group == 0 for width in widths)]
    if target.group is None or all(width % target.group == 0 for width in widths) or not fitting:
        return ""
    return f"; a group of {fitting[0]} divides every width of this model"


def _solver(target: Target, types: TypeTable, asked: SolverName, rounded: set[str]) -> str:
    """How linear layers are rounded; ``rounded``: the types on a grid that some of them become."""
    if not rounded:
        if asked != "auto":
            raise InputError(f"--solver {asked}: nothing is rounded with --to {target}; leave --solver out")
        return "cast"
    if target.format == "bnb" and (target.type == "int8" or asked == "imatrix"):
        if asked not in ("auto", "rtn"):
            right = "rtn or auto" if target.type == "int8" else "rtn, feedback or auto"
            raise InputError(f"--solver {asked}: bitsandbytes itself rounds {target}; {right} is right")
        return "rtn"
    return "feedback" if asked == "auto" else asked


def stored_dtype(checkpoint: Checkpoint, target: Target) -> torch.dtype:
    """The 16-bit dtype that a safetensors artifact keeps its other tensors and scales in, and is computed in."""
    if target.format == "gptq":
        return torch.float16  # the format's scales are float16
    return torch.bfloat16 if checkpoint.dtype == torch.float32 else checkpoint.dtype
