"""Choose the type of every tensor under a budget: predict by curvature, correct by measuring, judge on other text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from llmlite.calibrate.fisher import Curvatures, fisher, predicted_loss
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD, LAYER
from llmlite.errors import InputError
from llmlite.memory import free_memory
from llmlite.plan.budget import Option
from llmlite.plan.correct import Corrected, CorrectionSettings, Item, Run, correct
from llmlite.progress import note, track

FLOAT = 4
Rounder = Callable[[str, str, torch.Tensor | None], torch.Tensor]
Rounded = Callable[[str, str], torch.Tensor]


@dataclass(frozen=True)
class Offer:
    """What may be chosen.

    ``candidates(name)``: the types a tensor can take, in any order; ``nbytes(name, type)``: what one takes on disk;
    ``rounder(name, type, importance)``: the weight [out, in] that its reader sees, importance float32 [in] the mean
    square of each of its inputs, None for an embedding that is not the head too.
    """

    candidates: Callable[[str], list[str]]
    nbytes: Callable[[str, str], int]
    rounder: Rounder


@dataclass(frozen=True)
class AllocateSettings:
    """How the choice is made. ``measure_rows`` rows of the text are measured at each run, as many others at the end."""

    draws: int = field(default=1, metadata={"help": "labels drawn per token of calibration text for the curvature"})
    measure_rows: int = field(default=8, metadata={"help": "rows of calibration text that a choice is measured on"})
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class AllocationRow:
    """One tensor's choice. ``predicted``: mean divergence in nats per token, corrected by its role's factor."""

    name: str
    role: str
    type: str
    bytes: int
    predicted: float


@dataclass(frozen=True)
class Allocation:
    """The choice: name -> type, in the order of the network, and what it should and did cost.

    ``predicted`` and ``fitted``: mean divergence in nats per token as corrected, and as measured on the rows that the
    choice was made by. ``measured``: the same on rows that no choice was made by, None where the text had none left.
    ``factors``: measured over predicted, by role. ``runs``: every choice that was measured on the way.
    """

    types: dict[str, str]
    rows: tuple[AllocationRow, ...]
    bytes: int
    predicted: float
    fitted: float
    measured: float | None
    factors: dict[str, float]
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        """For the manifest: the table, the sums, the factors, and the runs without their types."""
        runs = [{key: value for key, value in asdict(run).items() if key != "types"} for run in self.runs]
        return {**asdict(self), "types": self.types, "runs": runs}


def allocated_names(checkpoint: Checkpoint) -> list[str]:
    """The weights that a type is chosen for, in the order of the network: embedding, linear layers, untied head."""
    layers = range(checkpoint.num_layers)
    linears = [f"{LAYER}{layer}.{name}.weight" for layer in layers for name in checkpoint.family.linears]
    return [EMBEDDING, *linears, *([] if checkpoint.tied else [HEAD])]


def role_of(name: str) -> str:
    """The part of the network that a weight is, whatever its layer: "mlp.down_proj", "embed_tokens", "lm_head"."""
    module = name.removesuffix(".weight")
    return module.removeprefix(LAYER).split(".", 1)[1] if module.startswith(LAYER) else module.split(".")[-1]


def allocate(
    checkpoint: Checkpoint, budget: int, offer: Offer, ids: np.ndarray, settings: AllocateSettings | None = None
) -> Allocation:
    """Give every weight of `allocated_names` a type so that their bytes are at most ``budget``.

    ``ids`` int64 [rows, length]: calibration text. The whole model runs in float32, so it must fit into memory.
    Raises `InputError` where it does not, where the smallest types exceed the budget, or where the text has fewer
    rows than a choice is measured on.
    """
    settings = settings or AllocateSettings()
    if len(ids) < settings.measure_rows or settings.measure_rows < 1:
        raise InputError(
            f"the calibration text has {len(ids)} rows and a choice is to be measured on {settings.measure_rows}; at "
            "least one row and no more than the text has are right"
        )
    names = allocated_names(checkpoint)
    sizes = {name: {kind: offer.nbytes(name, kind) for kind in offer.candidates(name)} for name in names}
    _check_budget(sizes, budget)
    if checkpoint.config.get("final_logit_softcapping"):
        raise InputError(f"{checkpoint.source}: types can't be chosen for a model that caps its logits; name a type")
    _check_memory(checkpoint, settings)
    model = _load(checkpoint, settings.device)
    curvatures = fisher(model, checkpoint.family, ids, settings.draws, settings.seed)
    rounder = partial(_weighted, offer.rounder, {name: _importance(name, curvatures) for name in names})
    items = [_item(model, name, sizes[name], rounder, curvatures) for name in track(names, "predictions")]
    del curvatures
    rows = settings.measure_rows
    trial = _Trial(model, ids[: 2 * rows], rounder)
    chosen = correct(items, budget, partial(trial.divergence, slice(0, rows)), settings.correction)
    measured = trial.divergence(slice(rows, None), chosen.types) if len(ids) > rows else None
    if measured is None:
        note("the calibration text has no rows left to judge the choice of types on")
    return _allocation(items, chosen, measured)


def _importance(name: str, curvatures: Curvatures) -> torch.Tensor | None:
    return curvatures[name][-1].inputs  # of an embedding that is the head too, the head's


def _weighted(rounder: Rounder, importance: dict[str, torch.Tensor | None], name: str, kind: str) -> torch.Tensor:
    return rounder(name, kind, importance[name])


def _allocation(items: list[Item], chosen: Corrected, measured: float | None) -> Allocation:
    rows = []
    for item in items:
        kind = chosen.types[item.name]
        option = item.options[kind]
        rows.append(AllocationRow(item.name, item.role, kind, option.bytes, option.loss * chosen.factors[item.role]))
    return Allocation(
        chosen.types,
        tuple(rows),
        chosen.bytes,
        chosen.predicted,
        chosen.measured,
        measured,
        chosen.factors,
        chosen.runs,
    )


def _check_budget(sizes: dict[str, dict[str, int]], budget: int) -> None:
    """Before any work is done."""
    for name, kinds in sizes.items():
        if not kinds:
            raise InputError(f"{name}: no type on offer fits its shape; f16 would")
    smallest = sum(min(kinds.values()) for kinds in sizes.values())
    if smallest > budget:
        raise InputError(f"{budget:,} bytes are too few: the smallest types of this model take {smallest:,} bytes")


def _check_memory(checkpoint: Checkpoint, settings: AllocateSettings) -> None:
    """The model in float32, a second copy of its weights as tried, and the factors of the curvature."""
    weights = sum(int(np.prod(entry.shape)) for entry in checkpoint.tensors.values())
    widths = [checkpoint.tensors[f"{LAYER}0.{name}.weight"].shape[1] for name in checkpoint.family.linears]
    factors = checkpoint.num_layers * sum(width**2 for width in widths)
    needed = (2 * weights + factors) * FLOAT
    free = free_memory(settings.device)
    if needed > free:
        raise InputError(
            f"{checkpoint.source}: choosing types takes the whole model in float32 and its curvature, "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; a preset needs less"
        )


def _load(checkpoint: Checkpoint, device: str) -> Any:
    """The transformers model in float32, its weights without gradients."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.eval().requires_grad_(False).to(device)


def _item(model: Any, name: str, sizes: dict[str, int], rounder: Rounded, curvatures: Curvatures) -> Item:
    weight = model.get_parameter(name)
    options = {
        kind: Option(size, predicted_loss(curvatures[name], weight, rounder(name, kind).to(weight.device)))
        for kind, size in sizes.items()
    }
    return Item(name, role_of(name), options)


class _Trial:
    """A model whose weights are exchanged for rounded ones; between two runs only those that differ.

    Of the unchanged model the last hidden states are kept, and its predictions made from them anew at each run.
    """

    def __init__(self, model: Any, ids: np.ndarray, rounder: Rounded):
        self.model, self.rounder = model, rounder
        self.ids = torch.from_numpy(ids).to(model.device)
        self.head = model.get_output_embeddings().weight.data
        self.now: dict[str, str] = {}
        with torch.no_grad():
            self.hidden = [self._run(row) for row in self.ids]

    def _run(self, row: torch.Tensor) -> torch.Tensor:
        return self.model.model(input_ids=row[None], use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def divergence(self, rows: slice, types: Mapping[str, str]) -> float:
        """The mean KL(whole || rounded) in nats per token over these rows."""
        for name, kind in types.items():
            if self.now.get(name) != kind:
                parameter = self.model.get_parameter(name)
                parameter.data = self.rounder(name, kind).to(parameter.device, parameter.dtype)
                self.now[name] = kind
        bias = self.model.get_output_embeddings().bias
        total = 0.0
        for row, before in zip(self.ids[rows], self.hidden[rows], strict=True):
            p = torch.log_softmax(torch.nn.functional.linear(before, self.head, bias), -1)
            q = torch.log_softmax(self.model.get_output_embeddings()(self._run(row)), -1)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return total / self.ids[rows].numel()
