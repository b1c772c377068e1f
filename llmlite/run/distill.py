"""Train a student on its teacher's predictions: what `llmlite distill` does."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llmlite import __version__
from llmlite.adapt.curve import loss_curve
from llmlite.adapt.distill import PROJECTION, Distillation, Held, Lessons, Weights
from llmlite.adapt.losses import LossName
from llmlite.adapt.shape import Shape, parameters, shape_of, student_shape
from llmlite.adapt.targets import LiveTeacher, keep_on_disk, load_model
from llmlite.adapt.training import Trained, TrainSettings, check_training, computing_dtype, train
from llmlite.adapt.vocabulary import match_vocabularies
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import TRAINING, refuse_existing, sha256_of, write_manifest
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.errors import InputError
from llmlite.evals.hf import load_tokenizer
from llmlite.formats.gguf.metadata import full_config
from llmlite.memory import give_freed_memory_back, keep_heap_small
from llmlite.run.students import check_room, made_student, write_trained
from llmlite.run.text import calibration_rows, opened
from llmlite.run.training import describe_model, training_device, training_directory

PICTURE = "loss.png"
WORK = f"{TRAINING}work"  # in the partial directory: the student as it was, the teacher's logits
HELD_ROWS, HELD_SHARE = 8, 8  # rows that judge, at most, and at most one of so many


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """What `distill` can be told."""

    teacher: str = field(metadata={"help": "whose predictions are learned: a directory, a GGUF file or a hub id"})
    student: str | None = field(default=None, metadata={"help": "a checkpoint to train (default: made from TEACHER)"})
    to: str | None = field(
        default=None,
        metadata={
            "help": "FORMAT:TYPE, as in gptq:w3g64: STUDENT is TEACHER on that grid, its codes and scales trained"
        },
    )
    layers: int | None = field(default=None, metadata={"help": "a student made from TEACHER: its decoder layers"})
    ffn: int | None = field(default=None, metadata={"help": "a student made from TEACHER: FFN channels of each layer"})
    kv_heads: int | None = field(
        default=None,
        metadata={"help": "a student made from TEACHER: key/value heads of each layer, with their queries"},
    )
    shrink: float | None = field(
        default=None, metadata={"help": "in place of counts: the share of TEACHER's parameters, as in 0.7"}
    )
    data: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text, JSON lines or chat files, or dataset names (default: a small mix that is packaged)"},
    )
    data_tokens: int = field(default=262144, metadata={"help": "tokens of the text in all"})
    row_length: int = field(default=512, metadata={"help": "tokens in one row"})
    loss: LossName = field(
        default="kl", metadata={"help": "divergence: kl from teacher to student, reverse, or skew: kl to a mix of both"}
    )
    temperature: float = field(default=1.0, metadata={"help": "what both sides' logits are divided by"})
    data_share: float = field(default=0.0, metadata={"help": "share of the text's own cross-entropy in the loss"})
    hidden: float = field(default=0.0, metadata={"help": "weight of the distance of what enters each layer"})
    attention: float = field(default=0.0, metadata={"help": "weight of the divergence of the last layer's attention"})
    on_policy: float = field(
        default=0.0, metadata={"help": "share of rows that end in the student's own words, judged by the teacher"}
    )
    teacher_logits: Literal["auto", "disk", "live"] = field(
        default="auto", metadata={"help": "auto: on disk where the rows are used more than once by STEPS"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    resume: bool = field(default=False, metadata={"help": "go on with the unfinished run that has the same -o"})
    steps: int = field(default=100, metadata={"help": "steps of the optimizer; 0: the student as it is made"})
    batch_rows: int = field(default=2, metadata={"help": "rows of the data in one forward pass"})
    rate: float = field(default=1e-4, metadata={"help": "learning rate at its highest"})
    judge_every: int = field(default=20, metadata={"help": "steps between two looks at the held-out rows"})
    save_every: int = field(default=50, metadata={"help": "steps after which the state for --resume is written"})


@dataclass(frozen=True)
class Distilled:
    """What was written: the student's directory, the divergence from its teacher, how it was trained, what it lost."""

    directory: Path
    before: Held
    after: Held
    trained: Trained | None
    made: dict[str, Any] | None
    parameters: tuple[int, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        its, mine = self.parameters
        lines = [
            f"{self.directory}: {mine / 1e6:,.1f} of the teacher's {its / 1e6:,.1f} million parameters",
            f"divergence from the teacher on held-out rows: {self.before.kl:.4f} before, {self.after.kl:.4f} now",
            f"the same likeliest token: {self.before.same_top:.1%} before, {self.after.same_top:.1%} now",
            f"cross-entropy of these rows: {self.before.cross_entropy:.4f} before, {self.after.cross_entropy:.4f} now",
        ]
        if self.trained is not None:
            lines.append(f"{self.trained.steps} steps in {self.trained.seconds:,.0f} seconds")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return {
            "student": str(self.directory),
            "parameters": {"teacher": self.parameters[0], "student": self.parameters[1]},
            "held_out": {"before": asdict(self.before), "after": asdict(self.after)},
            "training": None if self.trained is None else asdict(self.trained),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Job:
    """What is settled before work starts. ``student``: one that the user has, else ``shape`` of one to be made.

    ``own_text``: the rows are of text that the user gave; ``vocabulary``: the teacher's ids of the student's tokens;
    ``live``: the teacher itself judges each step.
    """

    teacher: Checkpoint
    student: Checkpoint | None
    shape: Shape
    rows: Rows
    own_text: bool
    vocabulary: torch.Tensor | None
    live: bool
    device: str
    dtype: torch.dtype

    @property
    def held(self) -> np.ndarray:
        """The numbers of the rows that judge, spread over the text."""
        count = len(self.rows.ids)
        return np.unique(np.linspace(0, count - 1, min(HELD_ROWS, count // HELD_SHARE) + 2).round().astype(int))[1:-1]

    @property
    def taught(self) -> np.ndarray:
        """The rows that are trained on, int64 [rows, length]."""
        return np.delete(self.rows.ids, self.held, axis=0)


def distill(out: str | Path, settings: DistillSettings) -> Distilled:
    """Train a student of ``settings.teacher`` into the new directory ``out``: a checkpoint like any other.

    The student is ``settings.student``, or made from the teacher. Beside it lie its losses as a picture and
    llmlite.json. A run that is killed is gone on with under ``settings.resume``, with the losses of an unbroken one.
    Raises `InputError` for what can't be done as asked, `OutsideError` for a loss that is not a number and a full disk.
    """
    out = Path(out)
    check_distill(settings)
    keep_heap_small()
    refuse_existing(out)
    device = training_device(settings.device, settings.threads)
    with opened(settings.teacher, settings.revision, out) as teacher:
        job = _job(teacher, settings, device)
        check_room(out, job, settings)
        with training_directory(out, _run(job, settings), settings.resume) as folder:
            return _train(folder, out, job, settings)


def check_distill(settings: DistillSettings) -> None:
    """`InputError` for settings that can't be followed, whatever the models."""
    check_training(replace(settings, steps=max(settings.steps, 1)) if settings.steps == 0 else settings)
    if settings.to is not None:
        raise InputError(f"--to {settings.to}: makes no smaller student; `run.qat.train_quantized` trains codes")
    made = (settings.layers, settings.ffn, settings.kv_heads, settings.shrink)
    if settings.student is None and made == (None,) * 4:
        raise InputError("--student, --layers, --ffn, --kv-heads or --shrink is missing: it says who is to be trained")
    if settings.student is not None and made != (None,) * 4:
        raise InputError("--student: is trained as it is; leave out --layers, --ffn, --kv-heads and --shrink")
    if not 0 < settings.temperature < math.inf:
        raise InputError(f"--temperature {settings.temperature}: above 0 is right")
    for option, value in (("--data-share", settings.data_share), ("--on-policy", settings.on_policy)):
        if not 0 <= value <= 1:
            raise InputError(f"{option} {value}: from 0 to 1 is right")
    for option, value in (("--hidden", settings.hidden), ("--attention", settings.attention)):
        if not 0 <= value < math.inf:
            raise InputError(f"{option} {value}: 0 or more is right")
    if settings.row_length < 2 or settings.data_tokens < settings.row_length * HELD_SHARE:
        raise InputError(
            f"--data-tokens {settings.data_tokens} with --row-length {settings.row_length}: at least {HELD_SHARE} rows "
            "of at least 2 tokens are right"
        )
    if _weights(settings).live and settings.teacher_logits == "disk":
        raise InputError(
            "--teacher-logits disk: has no hidden states, attention or other words; live is right for them"
        )


def _weights(settings: DistillSettings) -> Weights:
    return Weights(
        settings.loss,
        settings.temperature,
        settings.data_share,
        settings.hidden,
        settings.attention,
        settings.on_policy,
    )


def _job(teacher: Checkpoint, settings: DistillSettings, device: str) -> Job:
    student = open_checkpoint(settings.student, settings.revision) if settings.student is not None else None
    if student is None:
        shape = student_shape(teacher, settings.layers, settings.ffn, settings.kv_heads, settings.shrink)
    else:
        shape = shape_of(student.config)
    if settings.hidden and shape.layers == 1:
        raise InputError("--hidden: matches what enters every layer but the first, and the student has one layer")
    vocabulary = _vocabulary(teacher, student)
    source = student or teacher
    rows = calibration_rows(source, settings.data, settings.data_tokens, settings.row_length, settings.seed)
    if len(rows.ids) < HELD_SHARE:
        raise InputError(f"--data: has {len(rows.ids)} rows of {settings.row_length} tokens; {HELD_SHARE} are right")
    longest = min(full_config(c.config)["max_position_embeddings"] for c in (teacher, source))
    if rows.ids.shape[1] > longest:
        raise InputError(f"--row-length {rows.ids.shape[1]}: the models read {longest} tokens; at most that is right")
    dtype = computing_dtype(settings.dtype, torch.device(device))
    used = settings.steps * settings.batch_rows * settings.accumulate
    again = settings.minutes is None and used > len(rows.ids)
    live = settings.teacher_logits == "live" or _weights(settings).live
    live = live or (settings.teacher_logits == "auto" and not again)
    live = _weights(settings).live or (live and settings.data_share < 1)  # the text alone needs no teacher
    own_text = bool(settings.data) and not settings.data[0].endswith(".npy")
    return Job(teacher, student, shape, rows, own_text, vocabulary, live, device, dtype)


def _vocabulary(teacher: Checkpoint, student: Checkpoint | None) -> torch.Tensor | None:
    if student is None:
        return None
    try:
        found = match_vocabularies(load_tokenizer(teacher.directory), load_tokenizer(student.directory))
    except InputError as error:
        raise InputError(f"{student.source}: {error}") from None
    sizes = (teacher.config["vocab_size"], student.config["vocab_size"])
    return torch.arange(min(sizes)) if found is None and sizes[0] != sizes[1] else found


def _run(job: Job, settings: DistillSettings) -> dict[str, Any]:
    """All that decides what is trained."""
    lasting = {name: value for name, value in asdict(settings).items() if name not in ("resume", "threads")}
    models = {"teacher": describe_model(job.teacher.source, job.teacher.directory, job.teacher.gguf)}
    if job.student is not None:
        models["student"] = describe_model(job.student.source, job.student.directory)
    run = {"llmlite": __version__, **models, "data": list(job.rows.sources), "settings": lasting, "device": job.device}
    return json.loads(json.dumps(run))


def _train(folder: Path, out: Path, job: Job, settings: DistillSettings) -> Distilled:
    from accelerate import PartialState

    work = folder / WORK
    with PartialState().main_process_first():
        work.mkdir(exist_ok=True)
        student, made = (job.student, None) if job.student is not None else made_student(job, work)
        lessons = _lessons(job, settings, work, student.num_layers, made)
    give_freed_memory_back()
    model = load_model(student, torch.float32, settings.attention > 0)
    task = Distillation(model, lessons, _weights(settings), job.device)
    with torch.autocast(job.device, job.dtype, enabled=job.dtype != torch.float32):
        before = task.held()
    if not math.isfinite(before.kl):
        raise InputError(
            f"{(job.student or job.teacher).source}: the divergence on held-out rows is {before.kl} before any "
            "training; a teacher and a student with finite weights are right"
        )
    trained = train(task, settings, folder, "distill") if settings.steps else None
    with torch.autocast(job.device, job.dtype, enabled=job.dtype != torch.float32):
        after = task.held() if trained is not None else before
    count = (parameters(job.teacher, shape_of(job.teacher.config)), parameters(student, shape_of(student.config)))
    notes: tuple[str, ...] = (trained.note,) if trained is not None and trained.note else ()
    if count[1] > count[0]:
        notes += ("the student has more parameters than its teacher",)
    done = Distilled(out, before, after, trained, made, count, notes)
    if PartialState().is_main_process:
        weights = {name: p for name, p in task.parameters().items() if not name.startswith(PROJECTION)}
        write_trained(student, weights, folder)
        if trained is not None:
            loss_curve(trained, folder / PICTURE, f"{job.teacher.source} teaches {out.name}: {settings.loss}")
        write_manifest(folder, _manifest(job, settings, done))
    return done


def _lessons(job: Job, settings: DistillSettings, work: Path, layers: int, made: dict[str, Any] | None) -> Lessons:
    """What is taught, with the teacher's logits on disk as far as they are wanted there."""
    held = job.rows.ids[job.held]
    judge = keep_on_disk(job.teacher, held, work / "held", job.device, job.dtype, job.vocabulary)
    teacher: Any = judge
    if job.live:
        teacher = LiveTeacher(job.teacher, job.device, job.dtype, job.vocabulary, settings.attention > 0)
    elif settings.data_share < 1 and settings.steps:
        teacher = keep_on_disk(
            job.teacher, job.taught, work / "taught", job.device, job.dtype, job.vocabulary, settings.temperature
        )
    its = job.teacher.num_layers
    matched = [part["layer"] for part in made["kept"]] if made else [place * its // layers for place in range(layers)]
    tokens = None if job.vocabulary is None else len(job.vocabulary)
    return Lessons(job.taught, held, judge, teacher, tuple(matched), tokens)


def _manifest(job: Job, settings: DistillSettings, done: Distilled) -> dict[str, Any]:
    files = sorted({entry.file for entry in job.teacher.tensors.values()})
    return {
        "llmlite": __version__,
        "kind": "student",
        "base": {
            "source": job.teacher.source,
            "config_sha256": sha256_of(job.teacher.directory / "config.json"),
            "sha256": {file.name: sha256_of(file) for file in files},
        },
        "student": None if job.student is None else describe_model(job.student.source, job.student.directory),
        "settings": {name: value for name, value in asdict(settings).items() if name != "resume"},
        "teacher_logits": "live" if job.live else "none" if settings.data_share == 1 else "disk",
        "data": {"sources": list(job.rows.sources), "row_length": job.rows.ids.shape[1], "held_rows": len(job.held)},
        "made": done.made,
        **{key: value for key, value in done.to_json().items() if key != "student"},
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "accelerate")},
        "evals": {},
    }
