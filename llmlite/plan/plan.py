"""What will be done to each tensor, decided and checked before any work: a row per tensor, with its bytes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, LAYER
from llmlite.checkpoint.safetensors_index import NAMES
from llmlite.errors import InputError
from llmlite.plan.target import Target
from llmlite.plan.types import TypeTable

SolverName = Literal["auto", "rtn", "gptq"]


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
    """Every tensor's row, in the order in which they are worked on and written."""

    target: Target
    rows: tuple[PlanRow, ...]

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
        return any(row.solver == "gptq" for row in self.rows)

    def to_json(self) -> list[dict]:
        return [asdict(row) for row in self.rows]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([str(self.target), self.to_json()]).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, target: Target, types: TypeTable, solver: SolverName = "auto") -> Plan:
    """Resolve the rules to a row per tensor; `InputError` for the first tensor that the format can't hold."""
    chosen = _solver(target, types, solver)
    linears = {f"{LAYER}{i}.{name}.weight" for i in range(checkpoint.num_layers) for name in checkpoint.family.linears}
    rows = []
    for name in _working_order(checkpoint):
        entry = checkpoint.tensors[name]
        if name in linears:
            kind = types.linear
            how = chosen if kind in types.rounded else "cast"
        elif name in (EMBEDDING, HEAD):
            kind = types.head if name == HEAD or checkpoint.tied else types.embedding
            how = "rtn" if kind in types.rounded else "cast"
        else:
            kind, how = types.other(entry.shape), "cast"
        reason = types.refusal(kind, entry.shape)
        if reason:
            raise InputError(
                f"{checkpoint.source}: {name} {list(entry.shape)} can't become {target}: {reason}"
                + _better_group(checkpoint, target)
            )
        rows.append(PlanRow(name, entry.shape, NAMES[entry.dtype], kind, how, types.nbytes(name, kind, entry.shape)))
    return Plan(target, tuple(rows))


def _better_group(checkpoint: Checkpoint, target: Target) -> str:
    """Names a group size that divides every width, where the one asked for does not."""
    widths = {checkpoint.tensors[f"{LAYER}0.{name}.weight"].shape[1] for name in checkpoint.family.linears}
    fitting = [group for group in (128, 64, 32) if all(width % group == 0 for width in widths)]
    if target.group is None or all(width % target.group == 0 for width in widths) or not fitting:
        return ""
    return f"; a group of {fitting[0]} divides every width of this model"


def _working_order(checkpoint: Checkpoint) -> list[str]:
    """Embedding, then layer by layer what is copied before what is rounded, final norm, head."""
    names = [EMBEDDING]
    for layer in range(checkpoint.num_layers):
        linears = [f"{LAYER}{layer}.{name}.weight" for name in checkpoint.family.linears]
        rest = [n for n in checkpoint.layer_tensors(layer) if n not in linears and not n.endswith("inv_freq")]
        names += [*rest, *linears]
    names.append(FINAL_NORM)
    if not checkpoint.tied:
        names.append(HEAD)
    return names


def _solver(target: Target, types: TypeTable, asked: SolverName) -> str:
    if target.format == "bnb":
        if asked != "auto":
            raise InputError(f"--solver {asked}: bitsandbytes rounds by itself; leave --solver out with --to {target}")
        return "bitsandbytes"
    if types.linear not in types.rounded:
        if asked != "auto":
            raise InputError(f"--solver {asked}: nothing is rounded with --to {target}; leave --solver out")
        return "cast"
    if asked != "auto":
        return asked
    # At 8 bits rounding to nearest already loses next to nothing, and needs no calibration.
    return "rtn" if types.bits == 8 else "gptq"


def stored_dtype(checkpoint: Checkpoint, target: Target) -> torch.dtype:
    """The 16-bit dtype that a safetensors artifact keeps its other tensors and scales in, and is computed in."""
    if target.format == "gptq":
        return torch.float16  # the format's scales are float16
    return torch.bfloat16 if checkpoint.dtype == torch.float32 else checkpoint.dtype
