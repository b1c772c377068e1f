"""Compress a checkpoint: one decoder layer in memory at a time, from the embedding to the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from llmlite import __version__
from llmlite.adapt.repair import Repaired, RepairSettings, check_repair, repair, repair_scratch, rows_wanted
from llmlite.adapt.stored import open_stored
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import (
    atomic_directory,
    refuse_existing,
    refuse_full_disk,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError
from llmlite.formats.gguf.imatrix import diagonal, read_imatrix
from llmlite.memory import keep_heap_small
from llmlite.plan.memory import scratch_space, working_memory
from llmlite.plan.plan import Plan, make_plan, stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.progress import console, note, say
from llmlite.quantize.lattice import share_on_low_bit_grid
from llmlite.quantize.solve import SolverSettings
from llmlite.run.allocate import Allocation
from llmlite.run.budget import allocate_types, allocation_table, nearest_preset, rules_of, tensor_budget
from llmlite.run.job import BATCH_TOKENS, Job, Work
from llmlite.run.journal import Journal, begin, describe_run, read_journal
from llmlite.run.settings import QuantizeSettings, check
from llmlite.run.sinks import open_sink
from llmlite.run.text import calibration_rows, choose_device, opened, other_rows


@dataclass(frozen=True)
class Quantized:
    """What was written: the artifact's directory, its plan, and each rounded tensor's relative weighted error.

    ``on_low_bit_grid``: the share of sampled weights that lay on a grid of 4 bits or fewer before; ``notes``: known
    differences of the artifact from its base; ``seconds``: where the time of this run went; ``allocation``: the types
    chosen for a budget; ``repaired``: what the training of norms and scales gave.
    """

    directory: Path
    plan: Plan
    errors: dict[str, float]
    on_low_bit_grid: float
    notes: tuple[str, ...]
    seconds: dict[str, float]
    allocation: Allocation | None = None
    repaired: Repaired | None = None


@dataclass(frozen=True)
class _Chosen:
    """The target and the rules over it, as given or as chosen for a budget."""

    to: str | None
    types: tuple[str, ...]
    allocation: Allocation | None = None


def quantize(model: str | Path, out: str | Path, settings: QuantizeSettings) -> Quantized:
    """Compress ``model`` (directory, GGUF file or hub id) into the new directory ``out``.

    Everything is checked, and the plan complete, before the first byte is written; ``out`` appears when all is
    done. A run that is killed or interrupted after a decoder layer is gone on with under ``settings.resume``, to the
    same bytes. Raises `InputError` for input that can't be compressed as asked, `OutsideError` and OSError for the
    rest.
    """
    check(settings)
    keep_heap_small()
    out = Path(out)
    refuse_existing(out)
    if out.suffix == ".gguf":
        raise InputError(f"-o {out}: name a directory; the GGUF file will be {out.with_suffix('')}/model.gguf")
    device = choose_device(settings.device, settings.threads)
    with opened(str(model), settings.revision, out) as checkpoint:
        return quantize_checkpoint(checkpoint, out, settings, device)


def quantize_checkpoint(
    checkpoint: Checkpoint, out: Path, settings: QuantizeSettings, device: str, told: Mapping[str, Any] | None = None
) -> Quantized:
    """What `quantize` does once its model is open; ``told`` goes into the manifest too."""
    chosen, rows = _with_types(checkpoint, settings, device)
    target = parse_target(chosen.to or "")
    types = type_table(target, stored_dtype(checkpoint, target), settings.desc_act, chosen.types)
    plan = make_plan(checkpoint, target, types, "imatrix" if settings.imatrix else settings.solver)
    _check_solver_options(settings, plan)
    flattered = _low_bit_share(checkpoint)
    if flattered > 0.5:
        say(
            f"warning: {flattered:.0%} of the sampled weights of {checkpoint.source} already lie on a grid of 4 bits "
            "or fewer; figures for what is made from them flatter the rounding"
        )
    fitted = plan.calibrated and not settings.imatrix
    if rows is None and (fitted or settings.repair):
        rows = _rows(checkpoint, settings)
    tuning, text = RepairSettings(steps=settings.repair_steps, seed=settings.seed), None
    if settings.repair:
        assert rows is not None
        text = rows.ids
        if fitted:
            wanted = rows_wanted(tuning) * settings.row_length
            text = other_rows(checkpoint, settings.calibration, rows, wanted, settings.seed).ids
        check_repair(checkpoint, types, text, tuning, device)
    importance = _importance(checkpoint, plan, settings)
    networks = _networks(settings, plan)
    scratch = 0 if text is None else plan.bytes + repair_scratch(checkpoint, text, tuning)
    _check_disk(out, checkpoint, plan, rows, networks, scratch)
    _tell_memory(checkpoint, plan, networks)
    journal = _journal(out, checkpoint, plan, rows, settings, device)
    with _kept_when_interrupted(out), atomic_directory(out, resume=journal.layers > 0) as directory:
        sink = open_sink(directory, checkpoint, plan, types, rows, reopen=journal.layers > 0)
        notes = (*plan.notes, *sink.notes)
        for sentence in notes:
            note(sentence)
        job = Job(checkpoint, plan, sink, _work(settings, device, directory, networks > 1, importance), journal)
        try:
            calibration = rows if fitted else None
            if calibration is not None and journal.layers < checkpoint.num_layers:
                console.print(f"time: about {_spoken(job.estimate(calibration))} for the rounding", style="dim")
            errors = job.run(calibration)
            sink.close()
        finally:
            sink.abandon()
        repaired = None
        if text is not None:
            stored = open_stored(checkpoint, directory, types)
            repaired = repair(checkpoint, stored, text, tuning, directory, device)
            notes += (repaired.note,) if repaired.note else ()
        done = Quantized(out, plan, errors, flattered, notes, job.seconds, chosen.allocation, repaired)
        write_manifest(directory, {**_manifest(checkpoint, done, rows, settings), **(told or {})})
    return done


def _with_types(checkpoint: Checkpoint, settings: QuantizeSettings, device: str) -> tuple[_Chosen, Rows | None]:
    """The target as given, or types chosen for a budget, and the calibration rows that this took."""
    if settings.to is not None:
        return _Chosen(settings.to, settings.types), None
    budget = tensor_budget(checkpoint, settings.target_size, settings.target_bpw)
    rows = _rows(checkpoint, settings)
    allocation = allocate_types(checkpoint, budget, rows, device)
    console.print(allocation_table(allocation))
    return _Chosen(f"gguf:{nearest_preset(allocation)}", rules_of(allocation) + settings.types, allocation), rows


def _check_solver_options(settings: QuantizeSettings, plan: Plan) -> None:
    if settings.desc_act and plan.target.format != "gptq":
        raise InputError(f"--desc-act: only gptq files can say it, {plan.target} can't; leave it out")
    if plan.calibrated or settings.repair:
        return
    for option, given in (("--calibration", settings.calibration), ("--desc-act", settings.desc_act)):
        if given:
            raise InputError(
                f"{option}: only --solver feedback and imatrix use it, and --to {plan.target} uses neither here"
            )


def _work(
    settings: QuantizeSettings, device: str, scratch: Path, drift: bool, importance: dict[str, torch.Tensor]
) -> Work:
    solver = SolverSettings(settings.damping, settings.sweeps, settings.drift, settings.desc_act)
    return Work(solver, device, scratch, drift, importance)


def _importance(checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings) -> dict[str, torch.Tensor]:
    """The mean squared inputs of each linear layer, from the importance matrix that was given."""
    if settings.imatrix is None:
        return {}
    imatrix = read_imatrix(Path(settings.imatrix))
    imatrix.check(checkpoint)
    names = [row.name for row in plan.rows if row.solver == "imatrix"]
    return {name: diagonal(imatrix, checkpoint.family, name) for name in names}


def _lasting(settings: QuantizeSettings) -> dict:
    """The settings that bear on the result."""
    return {name: value for name, value in asdict(settings).items() if name != "resume"}


def _journal(
    out: Path, checkpoint: Checkpoint, plan: Plan, rows: Rows | None, settings: QuantizeSettings, device: str
) -> Journal:
    """The unfinished run's journal, or an empty one; says which."""
    run = describe_run(checkpoint, plan, rows, _lasting(settings), device)
    journal = begin(out, run, settings.resume)
    if journal.layers:
        said = f"resumed: goes on at layer {journal.layers} of {checkpoint.num_layers}"
    elif settings.resume:
        said = f"note: there is no unfinished run of {out} to resume; this one begins at the beginning"
    else:
        left = read_journal(out)
        if left is None or left.differences(journal):
            return journal
        said = f"note: an unfinished run of {out} is removed; --resume would have gone on at layer {left.layers}"
    say(said)
    return journal


@contextmanager
def _kept_when_interrupted(out: Path) -> Iterator[None]:
    """An interrupt that leaves something to go on with says so."""
    try:
        yield
    except KeyboardInterrupt:
        left = read_journal(out)
        if left is not None:
            raise KeyboardInterrupt(f"interrupted; --resume goes on at layer {left.layers}") from None
        raise


def _low_bit_share(checkpoint: Checkpoint) -> float:
    """The largest share on a low-bit grid among the linear layers of the first and the middle decoder layer."""
    layers = {0, checkpoint.num_layers // 2}
    names = [f"{LAYER}{layer}.{name}.weight" for layer in layers for name in checkpoint.family.linears]
    shares = [share_on_low_bit_grid(checkpoint.read(name)) for name in names]
    return sum(shares) / len(shares)


def _rows(checkpoint: Checkpoint, settings: QuantizeSettings) -> Rows:
    tokens, length = settings.calibration_tokens, settings.row_length
    return calibration_rows(checkpoint, settings.calibration, tokens, length, settings.seed)


def _networks(settings: QuantizeSettings, plan: Plan) -> int:
    """How many run side by side: the one being rounded, and the unquantized one where its inputs are aimed at."""
    aimed = settings.drift > 0 and any(row.solver == "feedback" for row in plan.rows)
    return 2 if aimed else 1


def _check_disk(out: Path, checkpoint: Checkpoint, plan: Plan, rows: Rows | None, networks: int, after: int) -> None:
    """``after``: bytes beside the artifact that what comes after the rounding takes, whose scratch is free again."""
    scratch = 0 if rows is None else scratch_space(checkpoint, plan, rows.ids.size, networks)
    refuse_full_disk(out, plan.bytes, max(scratch, after))


def _tell_memory(checkpoint: Checkpoint, plan: Plan, networks: int) -> None:
    """Say what the work needs, and warn where the machine does not have it."""
    needed = working_memory(checkpoint, plan, BATCH_TOKENS, networks)
    console.print(f"memory: about {needed / 2**20:,.0f} MiB at the peak, beside the program itself", style="dim")
    free = psutil.virtual_memory().available
    if needed > free:
        say(f"warning: the machine has {free / 2**20:,.0f} MiB of memory free")


def _spoken(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _manifest(checkpoint: Checkpoint, done: Quantized, rows: Rows | None, settings: QuantizeSettings) -> dict:
    packages = ("torch", "transformers", "safetensors")
    return {
        "llmlite": __version__,
        "kind": "artifact",
        "base": {
            "source": checkpoint.source,
            "config_sha256": sha256_of(checkpoint.directory / "config.json"),
            "on_low_bit_grid": round(done.on_low_bit_grid, 4),
        },
        "format": str(done.plan.target),
        "settings": _lasting(settings),
        "calibration": None if rows is None else {"sources": list(rows.sources), "row_length": rows.ids.shape[1]},
        "parameters": done.plan.parameters,
        "plan_sha256": done.plan.sha256,
        "plan": done.plan.to_json(),
        "errors": done.errors,
        "allocation": None if done.allocation is None else done.allocation.to_json(),
        "repair": None if done.repaired is None else asdict(done.repaired),
        "notes": list(done.notes),
        "versions": {name: version(name) for name in packages},
        "evals": {},
    }
