"""Train an adapter of a model on chats: what `llmlite lora` does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmlite import __version__
from llmlite.adapt.bases import Base, load_base, method_of
from llmlite.adapt.conversations import Counts, Row, held_out, packed_rows, tokenized
from llmlite.adapt.curve import loss_curve
from llmlite.adapt.lora import (
    AdapterSettings,
    AdapterTask,
    check_adapter,
    load_peft,
    new_adapter,
    packing_holds,
    set_checkpointing,
)
from llmlite.adapt.training import Trained, check_training, computing_dtype, train
from llmlite.adapt.training_state import disk_needed
from llmlite.calibrate.corpus import read_corpus
from llmlite.checkpoint.artifact import refuse_existing, refuse_full_disk, sha256_of, write_manifest
from llmlite.checkpoint.checkpoint import locate, read_config
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError
from llmlite.evals.hf import load_tokenizer
from llmlite.progress import console
from llmlite.run.training import describe_model, training_device, training_directory

PICTURE = "loss.png"
LENGTH = 1024
ROUNDINGS = ("bnb:nf4", "bnb:int8")


@dataclass(frozen=True)
class LoraSettings(AdapterSettings):
    """What `lora` can be told."""

    data: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "chats: JSON lines with messages, with instruction and output, or with prompt and completion"
        },
    )
    quantize: str | None = field(
        default=None, metadata={"help": "bnb:nf4 or bnb:int8: round a 16-bit MODEL while loading it (QLoRA)"}
    )
    length: int | None = field(
        default=None,
        metadata={"help": "tokens in a row, and in a conversation, at most (default: 1024, or what the model reads)"},
    )
    held_out: float = field(default=0.1, metadata={"help": "share of the conversations that judge (256 at most)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    resume: bool = field(default=False, metadata={"help": "go on with the unfinished run that has the same -o"})


@dataclass(frozen=True)
class Adapted:
    """What was written: the adapter's directory, how it was trained, and what became of the data."""

    directory: Path
    trained: Trained
    counts: Counts
    base: str
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    rows: list[Row]
    held: list[Row]
    counts: Counts
    packed: bool
    sources: tuple[dict[str, Any], ...]


def lora(model: str | Path, out: str | Path, settings: LoraSettings) -> Adapted:
    """Train an adapter of ``model`` (directory or hub id, 16 bits or quantized) into the new directory ``out``.

    ``out`` gets a peft adapter, its losses as a picture, and llmlite.json. A run that is killed is gone on with under
    ``settings.resume``, with the losses of an unbroken one. Raises `InputError` for input that can't be trained on as
    asked, `OutsideError` for a loss that is not a number and a disk that is full.
    """
    out = Path(out)
    check_lora(settings)
    refuse_existing(out)
    device = training_device(settings.device, settings.threads)
    directory = _directory(str(model), settings)
    corpora = [read_corpus(source) for source in settings.data]
    tokenizer = load_tokenizer(directory)
    length = _length(directory, settings.length)
    settings = replace(settings, length=length)
    conversations, counts = tokenized(corpora, tokenizer, length)
    parts = held_out(conversations, settings.held_out, settings.seed)
    dtype = computing_dtype(settings.dtype, torch.device(device))
    base = load_base(directory, dtype, device, settings.quantize)  # type: ignore[arg-type]
    adapted = new_adapter(base.model, settings, _base_name(str(model), directory))
    packed = packing_holds(adapted)
    rows, held = (packed_rows(part, length, packed) for part in parts)
    data = _Data(rows, held, counts, packed, tuple({"source": c.source, "sha256": c.sha256} for c in corpora))
    notes = _notes(base, data, length)
    recomputing = set_checkpointing(adapted, settings.checkpointing, length * settings.batch_rows)
    task = AdapterTask(adapted, rows, held, settings.batch_rows)
    refuse_full_disk(out, 2 * _bytes(task), disk_needed(task.parameters()))
    _tell(base, data, task, settings, recomputing)
    with training_directory(out, _run(str(model), directory, data, settings, dtype), settings.resume) as folder:
        trained = train(task, settings, folder, "lora")
        notes += (trained.note,) if trained.note else ()
        done = Adapted(out, trained, counts, base.kept, _count(task), notes)
        if _writes():
            _write(folder, adapted, done, data, settings, directory, str(model))
    return done


def check_lora(settings: LoraSettings) -> None:
    """`InputError` for settings that can't be followed, whatever the model."""
    load_peft()
    check_training(settings)
    check_adapter(settings)
    if not settings.data:
        raise InputError("--data is missing: files of chats are right, as in --data chat.jsonl")
    if settings.quantize is not None and settings.quantize not in ROUNDINGS:
        raise InputError(f"--quantize {settings.quantize}: {' or '.join(ROUNDINGS)} is right")
    if settings.length is not None and settings.length < 8:
        raise InputError(f"--length {settings.length}: at least 8 tokens are right")


def _directory(model: str, settings: LoraSettings) -> Path:
    if model.endswith(".gguf") or (Path(model) / "model.gguf").is_file():
        raise InputError(
            f"{model}: GGUF files can't be trained on; give the checkpoint they were made from, or one that llmlite "
            "import makes of a GGUF file"
        )
    directory = locate(model, settings.revision)
    config = read_config(directory)
    if "auto_map" in config:
        raise InputError(f"{model}: its config asks for remote code (auto_map), which is refused; use a native model")
    if method_of(directory) and settings.quantize:
        raise InputError(f"--quantize {settings.quantize}: {model} is quantized already; leave it out")
    return directory


def _length(directory: Path, wanted: int | None) -> int:
    """The tokens of a row; `InputError` for more than the model reads."""
    longest = read_config(directory).get("max_position_embeddings", LENGTH)
    if wanted is not None and wanted > longest:
        raise InputError(f"--length {wanted}: the model reads {longest} tokens at most")
    return min(LENGTH, longest) if wanted is None else wanted


def _base_name(model: str, directory: Path) -> str:
    """What peft opens the base by: the hub id as given, or where it lies."""
    return str(directory.resolve()) if Path(model).is_dir() else model


def _notes(base: Base, data: _Data, length: int) -> tuple[str, ...]:
    notes = [*base.notes, *data.counts.notes(length)]
    if not data.packed:
        notes.append("this model does not keep conversations in one row apart, so each has a row of its own")
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    return tuple(notes)


def _tell(base: Base, data: _Data, task: AdapterTask, settings: LoraSettings, recomputing: bool) -> None:
    """Say before work what is trained on what."""
    tokens, counted = (sum(f(row) for row in data.rows) for f in (lambda r: len(r.ids), lambda r: r.counted))
    epochs = settings.steps * settings.batch_rows * settings.accumulate / len(data.rows)
    console.print(
        f"base: {base.kept}; adapter: {settings.kind}, rank {settings.rank}, {_count(task):,} parameters"
        + ("; activations are computed twice" if recomputing else "")
        + f"\ndata: {data.counts.used} conversations in {len(data.rows)} rows to train on ({tokens:,} tokens, "
        f"{counted:,} of them in answers) and {len(data.held)} to judge with"
        + ("" if settings.minutes else f"; {settings.steps} steps see each row {epochs:.1f} times"),
        style="dim", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _run(model: str, directory: Path, data: _Data, settings: LoraSettings, dtype: torch.dtype) -> dict[str, Any]:
    """All that decides what is trained."""
    return {
        "llmlite": __version__,
        "base": describe_model(model, directory),
        "data": {item["source"]: item["sha256"] for item in data.sources},
        "dtype": str(dtype),
        "settings": _lasting(settings),
    }


def _lasting(settings: LoraSettings) -> dict[str, Any]:
    """The settings as JSON has them, without those that bear on nothing that is written."""
    passing = ("resume", "threads", "revision", "device", "data")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items() if key not in passing}


def _count(task: AdapterTask) -> int:
    return sum(value.numel() for value in task.parameters().values())


def _bytes(task: AdapterTask) -> int:
    return sum(value.numel() * value.element_size() for value in task.parameters().values())


def _writes() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _write(
    folder: Path, adapted: Any, done: Adapted, data: _Data, settings: LoraSettings, directory: Path, model: str
) -> None:
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, not filled in
    loss_curve(done.trained, folder / PICTURE, f"{settings.kind} of {Path(model).name}, {done.base}")
    write_manifest(folder, _manifest(done, data, settings, directory, model))


def _manifest(done: Adapted, data: _Data, settings: LoraSettings, directory: Path, model: str) -> dict[str, Any]:
    weights = sorted({entry.file for entry in read_index(directory).values()})
    return {
        "llmlite": __version__,
        "kind": "adapter",
        "base": {
            "source": model,
            "config_sha256": sha256_of(directory / "config.json"),
            "weights_sha256": {file.name: sha256_of(file) for file in weights},
            "kept": done.base,
        },
        "settings": _lasting(settings),
        "data": {"sources": list(data.sources), "packed": data.packed, "conversations": asdict(data.counts),
                 "rows": len(data.rows), "held_out_rows": len(data.held)},
        "parameters": done.parameters,
        "training": asdict(done.trained),
        "notes": list(done.notes),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }  # fmt: skip


def adapted_facts(done: Adapted) -> dict[str, Any]:
    """What `lora` did, as plain values."""
    trained = done.trained
    return {
        "adapter": str(done.directory), "base": done.base, "parameters": done.parameters,
        "held_out_loss": {"before": trained.before, "after": trained.after,
                          "change": trained.after / trained.before - 1},
        "steps": trained.steps, "best_step": trained.best_step, "seconds": trained.seconds,
        "conversations": asdict(done.counts), "notes": list(done.notes), "losses": list(trained.losses),
        "judged": [list(pair) for pair in trained.judged],
    }  # fmt: skip


def adapted_sentence(done: Adapted) -> str:
    """What `lora` did, for the terminal."""
    trained = done.trained
    change = trained.after / trained.before - 1
    return (
        f"{done.directory}: {done.parameters:,} parameters; held-out loss {trained.before:.4f} -> {trained.after:.4f} "
        f"({change:+.1%}) at step {trained.best_step} of {trained.steps}, {trained.seconds:,.0f} seconds of training; "
        f"the losses are in {PICTURE}"
    )
