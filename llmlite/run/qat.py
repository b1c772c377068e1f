"""Train the codes of an artifact on its base's predictions: what `llmlite distill --to FORMAT:TYPE` does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmlite import __version__
from llmlite.adapt.curve import loss_curve
from llmlite.adapt.qat import QatSettings, check_qat
from llmlite.adapt.qat import qat as train_codes
from llmlite.adapt.stored import open_stored, rewritten
from llmlite.adapt.targets import TOP
from llmlite.adapt.teacher import disk_needed
from llmlite.adapt.training import Trained
from llmlite.adapt.training_state import COPIES
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import (
    TRAINING,
    read_manifest,
    refuse_existing,
    refuse_full_disk,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.errors import InputError
from llmlite.memory import give_freed_memory_back, keep_heap_small
from llmlite.plan.plan import make_plan, stored_dtype
from llmlite.plan.target import Target, parse_target
from llmlite.plan.types import GgufTypes, SafetensorsTypes, type_table
from llmlite.progress import note
from llmlite.run.quantize import QuantizeSettings, quantize_checkpoint
from llmlite.run.text import calibration_rows, check_row_length, opened, other_rows
from llmlite.run.training import describe_model, training_device, training_directory

PICTURE = "loss.png"
WORK, START = f"{TRAINING}work", "start"  # in the partial directory: the artifact as it was
ONE_BIT = re.compile(r"[a-z-]+:(w1|i?q1|tq1|binary)")


@dataclass(frozen=True, kw_only=True)
class TrainCodesSettings(QatSettings):
    """What `train_quantized` can be told; those that `distill` has too mean the same there."""

    teacher: str = field(metadata={"help": "whose predictions are learned: a directory, a GGUF file or a hub id"})
    to: str = field(metadata={"help": "FORMAT:TYPE, as in gptq:w3g64: train codes and scales through the rounding"})
    student: str | None = field(
        default=None, metadata={"help": "an artifact of TEACHER to begin with (default: made with error feedback)"}
    )
    data: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text, JSON lines or chat files, or dataset names (default: a small mix that is packaged)"},
    )
    data_tokens: int = field(default=65536, metadata={"help": "tokens of the text in all"})
    row_length: int = field(default=512, metadata={"help": "tokens in one row"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    resume: bool = field(default=False, metadata={"help": "go on with the unfinished run that has the same -o"})


@dataclass(frozen=True)
class TrainedArtifact:
    """What was written: the artifact's directory, how it was trained, and known differences from its base."""

    directory: Path
    format: str
    trained: Trained
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = self.trained
        kept = f"of step {told.best_step} of {told.steps}" if told.best_step else "as they were"
        return "\n".join(
            [
                f"{self.directory}: {self.format}, codes, scales and norms {kept}, in {told.seconds:,.0f} seconds",
                f"divergence from the base on held-out rows: {told.before:.4f} before, {told.after:.4f} now",
                *self.notes,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        facts = {"artifact": str(self.directory), "format": self.format, "training": asdict(self.trained)}
        return {**facts, "notes": list(self.notes)}


@dataclass(frozen=True)
class _Job:
    teacher: Checkpoint
    target: Target
    types: GgufTypes | SafetensorsTypes
    rows: Rows
    device: str
    notes: tuple[str, ...]
    bytes: int  # of the artifact's weights


def train_quantized(out: str | Path, settings: TrainCodesSettings) -> TrainedArtifact:
    """Train an artifact of ``settings.teacher`` into the new directory ``out``, the same format, type and bytes.

    It begins with ``settings.student``, which stays as it is, or is rounded with error feedback first. A run that is
    killed is gone on with under ``settings.resume``, to the same bytes. Raises `InputError` for what can't be done as
    asked, `OutsideError` for a loss that is not a number and a full disk.
    """
    out = Path(out)
    target = _target(settings.to)
    check_row_length(settings.data_tokens, settings.row_length, "--data-tokens")
    keep_heap_small()
    refuse_existing(out)
    device = training_device(settings.device, settings.threads)
    with opened(settings.teacher, settings.revision, out) as teacher:
        job = _job(teacher, target, settings, device)
        for sentence in job.notes:
            note(sentence)
        _check_disk(out, job)
        with training_directory(out, _run(job, settings), settings.resume) as folder:
            return _train(folder, out, job, settings)


def _target(text: str) -> Target:
    if ONE_BIT.match(text.lower()):
        raise InputError(
            f"--to {text}: by rounding alone one bit holds no model, trained or not; 3 bits are right, and 2 are "
            "experimental"
        )
    return parse_target(text)


def _job(teacher: Checkpoint, target: Target, settings: TrainCodesSettings, device: str) -> _Job:
    start = None if settings.student is None else _manifest_of(Path(settings.student), teacher, target)
    desc_act = bool(start["settings"]["desc_act"]) if start else False
    rules = tuple(start["settings"]["types"]) if start else ()
    types = type_table(target, stored_dtype(teacher, target), desc_act, rules)
    plan = make_plan(teacher, target, types)
    if settings.student is not None:
        open_stored(teacher, Path(settings.student), types)
    taken = start["settings"]["calibration_tokens"] if start else QuantizeSettings.calibration_tokens
    fitted = calibration_rows(teacher, settings.data, taken, settings.row_length, settings.seed)
    rows = other_rows(teacher, settings.data, fitted, settings.data_tokens, settings.seed)
    notes = (*check_qat(teacher, types, rows.ids, settings, device), *plan.notes)
    return _Job(teacher, target, types, rows, device, notes, plan.bytes)


def _check_disk(out: Path, job: _Job) -> None:
    kept = 4 * COPIES * sum(math.prod(entry.shape) for entry in job.teacher.tensors.values())
    rows, length = job.rows.ids.shape
    kept += disk_needed(rows, length, TOP, job.teacher.config["hidden_size"])
    refuse_full_disk(out, 2 * job.bytes, kept)  # as it was, and as it is trained


def _manifest_of(start: Path, teacher: Checkpoint, target: Target) -> dict[str, Any]:
    """llmlite.json of the artifact to begin with; `InputError` where it is none of this base and format."""
    manifest = (read_manifest(start) if start.is_dir() else None) or {}
    if manifest.get("kind") != "artifact" or manifest.get("format") != str(target):
        raise InputError(f"--student {start}: an artifact that llmlite quantize made with --to {target} is right")
    if manifest["base"]["config_sha256"] != sha256_of(teacher.directory / "config.json"):
        raise InputError(f"--student {start}: was made from {manifest['base']['source']}, which has another config")
    return manifest


def _run(job: _Job, settings: TrainCodesSettings) -> dict[str, Any]:
    """All that decides what is trained."""
    lasting = {name: value for name, value in asdict(settings).items() if name not in ("resume", "threads")}
    models = {"teacher": describe_model(job.teacher.source, job.teacher.directory, job.teacher.gguf)}
    if settings.student is not None:
        files = sorted(Path(settings.student).glob("model*"))
        models["student"] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    run = {"llmlite": __version__, **models, "data": list(job.rows.sources), "settings": lasting, "device": job.device}
    return json.loads(json.dumps(run))


def _train(folder: Path, out: Path, job: _Job, settings: TrainCodesSettings) -> TrainedArtifact:
    from accelerate import PartialState

    work = folder / WORK
    start = work / START
    with PartialState().main_process_first():
        if not start.is_dir():
            work.mkdir(exist_ok=True)
            _begin(start, job, settings)
    give_freed_memory_back()
    stored = open_stored(job.teacher, start, job.types)
    trained = train_codes(job.teacher, stored, job.rows.ids, settings, folder, job.device)
    notes = (*job.notes, *((trained.note,) if trained.note else ()))
    done = TrainedArtifact(out, str(job.target), trained, notes)
    if PartialState().is_main_process:
        manifest = read_manifest(start) or {}
        fresh = {file.name: rewritten(file) for file in stored.files if trained.best_step}
        for file in sorted(start.iterdir(), key=lambda file: file.name == "config.json"):
            if file not in fresh.values():
                _put(fresh.get(file.name, file), folder / file.name)  # a killed run needs them where they are
        loss_curve(trained, folder / PICTURE, f"{out.name}: {job.target} learns from {job.teacher.source}")
        write_manifest(folder, _manifest(manifest, job, settings, done))
    return done


def _put(file: Path, place: Path) -> None:
    """The file or folder at a second place, without a copy of a file where the file system can."""
    if file.is_dir():
        shutil.copytree(file, place, dirs_exist_ok=True)
        return
    place.unlink(missing_ok=True)  # of a run that was killed here
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _begin(start: Path, job: _Job, settings: TrainCodesSettings) -> None:
    """The artifact to begin with, in a folder of its own."""
    if settings.student is not None:
        new = start.with_name(f"{START}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(settings.student, new)
        new.rename(start)
        return
    rounding = QuantizeSettings(
        to=settings.to, calibration=settings.data, row_length=settings.row_length, seed=settings.seed,
        device=job.device, threads=settings.threads, revision=settings.revision, resume=settings.resume,
    )  # fmt: skip
    quantize_checkpoint(job.teacher, start, rounding, job.device)


def _manifest(start: dict[str, Any], job: _Job, settings: TrainCodesSettings, done: TrainedArtifact) -> dict[str, Any]:
    """That of the artifact it began with, and how it was trained; what was measured of that one is not kept."""
    told = {name: value for name, value in asdict(settings).items() if name != "resume"}
    data = {"sources": list(job.rows.sources), "row_length": job.rows.ids.shape[1]}
    notes = [*start.get("notes", []), *(note for note in done.notes if note not in start.get("notes", []))]
    trained = {"settings": told, "data": data, **asdict(done.trained)}
    return {**start, "llmlite": __version__, "errors": {}, "notes": notes, "trained": trained, "evals": {}}
