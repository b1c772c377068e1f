"""What a trainer needs to go on after it was killed: one file, replaced in one step, and the best parameters beside it.

Both are safetensors: the file of the state has parameters and AdamW's moments, and the history as JSON in its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmlite.checkpoint.artifact import JOURNAL, TRAINING, flush_directory, write_json
from llmlite.errors import InputError, WriteError, first_line

STATE = f"{TRAINING}state"
MOMENTS = ("exp_avg", "exp_avg_sq")
COPIES = 8  # the state is three times the parameters, the best ones one: each old file is there until the new one is


@dataclass
class State:
    """How far a training is. ``run``: what must be alike to go on; ``seconds`` spent, in all runs together."""

    run: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    best_step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)


def disk_needed(parameters: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a training of these parameters takes on disk while it runs, at most."""
    return COPIES * sum(value.numel() * value.element_size() for value in parameters.values())


def best_file(folder: Path, step: int) -> Path:
    """Where the parameters of ``step`` are kept while they are the best."""
    return folder / f"{TRAINING}best-{step}"


def save_state(
    folder: Path, state: State, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state, on the disk in one step, and remove what it no longer needs."""
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    write_tensors(folder / STATE, tensors, {"state": json.dumps(asdict(state))})
    if not (folder / JOURNAL).exists():
        write_json(folder / JOURNAL, {"training": state.run})
    for file in folder.glob(f"{TRAINING}best-*"):
        if file != best_file(folder, state.best_step):
            file.unlink()


def load_state(
    folder: Path,
    run: dict[str, Any],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> State | None:
    """The state in ``folder`` with its tensors put into parameters and optimizer; None where there is none.

    `InputError` where it is another training's.
    """
    if not (folder / STATE).is_file():
        return None
    tensors = read_tensors(folder / STATE)
    with safe_open(folder / STATE, framework="pt") as file:
        state = State(**json.loads(file.metadata()["state"]))
    state.judged = [(step, loss) for step, loss in state.judged]
    _refuse_another(folder, state, run, parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
            found = {moment: tensors[f"{moment}:{name}"] for moment in MOMENTS if f"{moment}:{name}" in tensors}
            if found:
                moved = {moment: value.to(parameter.device) for moment, value in found.items()}
                step = torch.tensor(float(state.step), device=parameter.device)  # where fused AdamW reads it
                optimizer.state[parameter] = {"step": step, **moved}
    return state


def _refuse_another(
    folder: Path, state: State, run: dict[str, Any], parameters: Mapping[str, torch.Tensor], tensors: dict
) -> None:
    different = sorted(key for key in state.run.keys() | run.keys() if state.run.get(key) != run.get(key))
    shapes = {name: value.shape for name, value in parameters.items()}
    found = {
        name: value.shape for name, value in tensors.items() if not name.startswith(tuple(f"{m}:" for m in MOMENTS))
    }
    if shapes != found:
        different.append("the parameters it trains")
    if different:
        raise InputError(
            f"--resume: the unfinished training in {folder} differs in {', '.join(different)}; give it what it was "
            "started with, or leave --resume out to begin again"
        )


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, there in one step and on the disk when this returns; `WriteError` where it can't be."""
    new = file.with_name(f"{file.name}.new")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, new, metadata)
    except SafetensorError as error:  # the library's word for a full disk too
        new.unlink(missing_ok=True)
        raise WriteError(first_line(error)) from None
    with open(new, "rb") as written:
        os.fsync(written.fileno())
    new.rename(file)
    flush_directory(file.parent)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
