"""Train an adapter of a model on chats: what `llmlite lora` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from llmlite import __version__
from llmlite.adapt.bases import Base, load_base, method_of
from llmlite.adapt.conversations import Counts, Row, Tokens, held_out, packed_rows, tokenized
from llmlite.adapt.curve import loss_curve
from llmlite.adapt.error_adapters import ErrorAdapter, ErrorAdapterSettings
from llmlite.adapt.lora import (
    AdapterSettings,
    AdapterTask,
    check_adapter,
    new_adapter,
    packing_holds,
    refuse_other_head,
    set_checkpointing,
)
from llmlite.adapt.training import Trained, check_training, computing_dtype, train
from llmlite.adapt.training_state import disk_needed
from llmlite.calibrate.corpus import read_corpus
from llmlite.checkpoint.artifact import (
    origin_sha256,
    refuse_existing,
    refuse_full_disk,
    scratch_directory,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import locate, read_config
from llmlite.checkpoint.families import family_of
from llmlite.errors import InputError, WriteError, first_line
from llmlite.evals.hf import load_tokenizer
from llmlite.extras import need
from llmlite.formats.adapter_base import ADAPTER, ERROR_ADAPTER, weights_sha256
from llmlite.formats.gguf.lora import GGUF_LORA, write_gguf_lora
from llmlite.formats.peft import read_adapter
from llmlite.formats.reading import unquantized
from llmlite.memory import keep_heap_small
from llmlite.progress import console, note
from llmlite.run.error_adapters import Calibration, make_error_adapter, write_error_adapter
from llmlite.run.text import choose_device
from llmlite.run.training import describe_model, is_first_process, training_device, training_directory

PICTURE = "loss.png"
LENGTH = 1024
ROUNDINGS = ("bnb:nf4", "bnb:int8")
InitName = Literal["random", "qera", "eora", "loftq"]


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
    gguf: bool = field(
        default=False, metadata={"help": "also write adapter.gguf, which llama.cpp loads on a GGUF file"}
    )
    init: InitName = field(
        default="random",
        metadata={
            "help": "qera (eora is the same) or loftq: begin with what rounding cost a quantized MODEL; with --steps 0 "
            "that is all"
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "--init: the full-precision checkpoint that MODEL was made from"}
    )
    calibration: tuple[str, ...] = field(
        default=(), metadata={"help": "--init: text that weighs the errors (default: a small mix that is packaged)"}
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "--init: tokens of calibration text in all"})
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
    keep_heap_small()
    refuse_existing(out)
    device = training_device(settings.device, settings.threads)
    directory = _directory(str(model), settings)
    if settings.gguf:
        family_of(read_config(directory), str(model))
    corpora = [read_corpus(source) for source in settings.data]
    tokenizer = load_tokenizer(directory)
    length = _length(directory, settings.length)
    settings = replace(settings, length=length)
    conversations, counts = tokenized(corpora, tokenizer, length)
    parts = held_out(conversations, settings.held_out, settings.seed)
    dtype = computing_dtype(settings.dtype, torch.device(device))
    with ExitStack() as stack:
        errors = None if settings.init == "random" else stack.enter_context(_errors(str(model), out, settings, device))
        base = load_base(directory, dtype, device, settings.quantize)  # type: ignore[arg-type]
        _refuse_unknown_tokens(base, conversations, str(model))
        adapted = new_adapter(base.model, settings, _base_name(str(model), directory), errors)
    refuse_other_head(adapted, str(model))
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
        if is_first_process():
            _write(folder, adapted, done, data, settings, directory, str(model))
    return done


@contextmanager
def _errors(model: str, out: Path, settings: LoraSettings, device: str) -> Iterator[Path]:
    """The adapter of what rounding cost ``model``, beside ``out`` while the block runs."""
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        raise InputError(f"--init {settings.init}: is made by one process, not by several; run it without a launcher")
    with scratch_directory(out) as folder:
        write_error_adapter(model, base_of(settings), folder, *error_settings(settings, device))
        yield folder


def untrained(model: str, out: Path, settings: LoraSettings) -> ErrorAdapter:
    """What --steps 0 asks for: the adapter of what rounding cost ``model`` as the new directory ``out``."""
    check_init(settings)
    for option, given in (("--data", settings.data), ("--gguf", settings.gguf), ("--resume", settings.resume)):
        if given:
            raise InputError(f"{option}: with --steps 0 nothing is trained; leave it out")
    device = choose_device(settings.device, settings.threads)
    return make_error_adapter(model, base_of(settings), out, *error_settings(settings, device))


def base_of(settings: LoraSettings) -> str:
    """The checkpoint that --base names; `InputError` where it is missing."""
    if settings.base is None:
        raise InputError(f"--init {settings.init}: --base is missing, the checkpoint that the model was made from")
    return settings.base


def error_settings(settings: LoraSettings, device: str) -> tuple[ErrorAdapterSettings, Calibration]:
    """How the adapter of rounding errors is made."""
    assert settings.init != "random"
    text = Calibration(settings.calibration, settings.calibration_tokens, seed=settings.seed)
    return ErrorAdapterSettings(settings.init, settings.rank, device=device), text


def check_init(settings: LoraSettings) -> None:
    """`InputError` for options that do not go with --init, or that only go with it."""
    plain = LoraSettings()
    others: tuple[str, ...]
    if settings.init == "random":
        others = ("base", "calibration", "calibration_tokens")
        said = "says what --init qera, eora or loftq begins with"
    else:
        base_of(settings)
        others, said = ("kind", "alpha", "targets", "quantize", "revision"), f"does not go with --init {settings.init}"
        if settings.init == "loftq":  # goes by the weights alone
            others += ("calibration", "calibration_tokens")
    values, defaults = asdict(settings), asdict(plain)
    for name in others:
        if values[name] != defaults[name]:
            raise InputError(f"--{name.replace('_', '-')}: {said}; leave it out")


def check_lora(settings: LoraSettings) -> None:
    """`InputError` for settings that can't be followed, whatever the model."""
    need("lora", "peft")
    check_training(settings)
    check_adapter(settings)
    check_init(settings)
    if not settings.data:
        raise InputError("--data is missing: files of chats are right, as in --data chat.jsonl")
    if settings.gguf and settings.kind == "dora":
        raise InputError(
            "--gguf: llama.cpp only adds an adapter's product, and DoRA does more; leave --gguf or --kind out"
        )
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


def _refuse_unknown_tokens(base: Base, conversations: Sequence[Tokens], model: str) -> None:
    largest, known = max(max(c.ids) for c in conversations), base.model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise InputError(f"{model}: its tokenizer gives the data token id {largest}, and the model has {known} tokens")


def _base_name(model: str, directory: Path) -> str:
    """What peft opens the base by: the hub id as given, or where it lies."""
    return str(directory.resolve()) if Path(model).is_dir() else model


def _notes(base: Base, data: _Data, length: int) -> tuple[str, ...]:
    notes = [*base.notes, *data.counts.notes(length)]
    if not data.packed:
        notes.append("this model does not keep conversations in one row apart, so each has a row of its own")
    if is_first_process():
        for sentence in notes:
            note(sentence)
    return tuple(notes)


def _tell(base: Base, data: _Data, task: AdapterTask, settings: LoraSettings, recomputing: bool) -> None:
    """Say before work what is trained on what."""
    if not is_first_process():
        return
    tokens, counted = (sum(f(row) for row in data.rows) for f in (lambda r: len(r.ids), lambda r: r.counted))
    epochs = settings.steps * settings.batch_rows * settings.accumulate / len(data.rows)
    console.print(
        f"base: {base.kept}; adapter: {settings.kind}, rank {settings.rank}, {_count(task):,} parameters"
        + ("; activations are computed twice" if recomputing else "")
        + f"\ndata: {data.counts.used} conversations: {len(data.rows)} rows to train on ({tokens:,} tokens, "
        f"{counted:,} of them in answers), {len(data.held)} to judge with"
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


def _write(
    folder: Path, adapted: Any, done: Adapted, data: _Data, settings: LoraSettings, directory: Path, model: str
) -> None:
    try:
        adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    except SafetensorError as error:  # the library's word for a full disk too
        raise WriteError(first_line(error)) from None
    if settings.gguf:
        write_gguf_lora(read_adapter(folder), unquantized(read_config(directory)), folder / GGUF_LORA)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, not filled in
    loss_curve(done.trained, folder / PICTURE, f"{settings.kind} of {Path(model).name}, {done.base}")
    write_manifest(folder, _manifest(done, data, settings, directory, model))


def _manifest(done: Adapted, data: _Data, settings: LoraSettings, directory: Path, model: str) -> dict[str, Any]:
    return {
        "llmlite": __version__,
        "kind": ADAPTER if settings.init == "random" else ERROR_ADAPTER,
        "base": {
            "source": model,
            "config_sha256": sha256_of(directory / "config.json"),
            "weights_sha256": weights_sha256(str(directory)),
            "origin_config_sha256": origin_sha256(directory),
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
