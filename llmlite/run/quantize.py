"""Compress a checkpoint: one decoder layer in memory at a time, from the embedding to the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from llmlite import __version__
from llmlite.calibrate.corpus import default_corpora, read_corpus
from llmlite.calibrate.moments import collect_moments
from llmlite.calibrate.rows import Rows, token_rows
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.artifact import (
    atomic_directory,
    refuse_existing,
    refuse_full_disk,
    scratch_directory,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.errors import InputError, first_line
from llmlite.memory import give_freed_memory_back, keep_heap_small
from llmlite.plan.memory import working_memory
from llmlite.plan.plan import Plan, PlanRow, SolverName, make_plan, stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.progress import console, track
from llmlite.quantize.feedback import ActOrder, FeedbackSettings, error_feedback
from llmlite.quantize.lattice import share_on_low_bit_grid
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Moments
from llmlite.run.sinks import Sink, open_sink

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class QuantizeSettings:
    """What `quantize` can be told."""

    to: str = field(
        metadata={"help": "FORMAT:TYPE, as in gguf:q4_0, gptq:w4g128, compressed-tensors:w4a16g64, bnb:nf4"}
    )
    solver: SolverName = field(
        default="auto",
        metadata={"help": "rtn rounds to nearest, gptq with error feedback; auto: gptq below 8 bits, else rtn"},
    )
    calibration: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text, JSON lines or chat files, or dataset names (default: a small mix that is packaged)"},
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "tokens of calibration text in all"})
    row_length: int = field(default=512, metadata={"help": "tokens in one calibration row"})
    act_order: ActOrder = field(
        default="static",
        metadata={"help": "order of error feedback: none, static (groups stay in place), group (gptq only: desc_act)"},
    )
    damping: float = field(default=0.01, metadata={"help": "added to the moments' diagonal, as a share of its mean"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration rows"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})


@dataclass(frozen=True)
class Quantized:
    """What was written: the artifact's directory, its plan, and each rounded tensor's relative weighted error.

    ``on_low_bit_grid``: the share of sampled weights that lay on a grid of 4 bits or fewer before; ``notes``: known
    differences of the artifact from its base.
    """

    directory: Path
    plan: Plan
    errors: dict[str, float]
    on_low_bit_grid: float
    notes: tuple[str, ...]


def quantize(model: str | Path, out: str | Path, settings: QuantizeSettings) -> Quantized:
    """Compress ``model`` (directory, GGUF file or hub id) into the new directory ``out``.

    Everything is checked, and the plan complete, before the first byte is written; ``out`` appears when all is
    done. Raises `InputError` for input that can't be compressed as asked, `OutsideError` and OSError for the rest.
    """
    _check(settings)
    keep_heap_small()
    out = Path(out)
    refuse_existing(out)
    if out.suffix == ".gguf":
        raise InputError(f"-o {out}: name a directory; the GGUF file will be {out.with_suffix('')}/model.gguf")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with _opened(str(model), settings.revision, out) as checkpoint:
        target = parse_target(settings.to)
        types = type_table(target, stored_dtype(checkpoint, target), settings.act_order)
        plan = make_plan(checkpoint, target, types, settings.solver)
        _check_solver_options(settings, plan)
        flattered = _low_bit_share(checkpoint)
        if flattered > 0.5:
            console.print(
                f"warning: {flattered:.0%} of the sampled weights of {model} already lie on a grid of 4 bits or fewer; "
                "figures for what is made from them flatter the rounding",
                style="yellow",
            )
        rows = _calibration_rows(checkpoint, settings) if plan.calibrated else None
        _check_disk(out, checkpoint, plan, rows)
        _tell_memory(checkpoint, plan)
        with atomic_directory(out) as directory:
            sink = open_sink(directory, checkpoint, plan, types)
            for note in sink.notes:
                console.print(f"note: {note}", style="yellow", markup=False)
            try:
                job = _Job(checkpoint, plan, sink, settings, directory)
                errors = job.run(rows)
                sink.close()
            finally:
                sink.abandon()
            done = Quantized(out, plan, errors, flattered, sink.notes)
            write_manifest(directory, _manifest(checkpoint, done, rows, settings))
    return done


def _check(settings: QuantizeSettings) -> None:
    if settings.calibration_tokens < settings.row_length or settings.row_length < 2:
        raise InputError(
            f"--calibration-tokens {settings.calibration_tokens} with --row-length {settings.row_length}: at least one "
            "row of at least 2 tokens is right"
        )
    if not 0 < settings.damping <= 1:
        raise InputError(f"--damping {settings.damping}: above 0 and at most 1 is right")
    if settings.threads is not None and settings.threads < 1:
        raise InputError(f"--threads {settings.threads}: at least 1 is right")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {settings.device}: cpu, cuda or auto is right")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; cpu or auto is right")


def _check_solver_options(settings: QuantizeSettings, plan: Plan) -> None:
    if settings.act_order == "group" and plan.target.format != "gptq":
        raise InputError(f"--act-order group: only gptq files can say it, {plan.target} can't; static is right")
    if plan.calibrated:
        return
    for option, given in (("--calibration", settings.calibration), ("--act-order", settings.act_order != "static")):
        if given:
            raise InputError(f"{option}: only --solver gptq uses it, and --to {plan.target} is not solved by it here")


@contextmanager
def _opened(model: str, revision: str | None, out: Path) -> Iterator[Checkpoint]:
    """The checkpoint; a GGUF file is imported into a directory beside ``out`` that is gone afterwards."""
    if not model.endswith(".gguf"):
        yield open_checkpoint(model, revision)
        return
    with scratch_directory(out) as folder:
        import_gguf(Path(model), folder / "base")
        yield replace(open_checkpoint(folder / "base"), source=model)


def _low_bit_share(checkpoint: Checkpoint) -> float:
    """The largest share on a low-bit grid among the linear layers of the first and the middle decoder layer."""
    layers = {0, checkpoint.num_layers // 2}
    names = [f"{LAYER}{layer}.{name}.weight" for layer in layers for name in checkpoint.family.linears]
    shares = [share_on_low_bit_grid(checkpoint.read(name)) for name in names]
    return sum(shares) / len(shares)


def _calibration_rows(checkpoint: Checkpoint, settings: QuantizeSettings) -> Rows:
    from transformers import AutoTokenizer

    corpora = [read_corpus(source) for source in settings.calibration]
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{checkpoint.source}: its tokenizer can't be loaded, and calibration needs it ({first_line(error)})"
        ) from None
    if not corpora:
        corpora = default_corpora(chat=tokenizer.chat_template is not None)
    rows = token_rows(corpora, tokenizer, settings.calibration_tokens, settings.row_length, settings.seed)
    if rows.ids.size < settings.calibration_tokens - settings.row_length:
        console.print(
            f"note: the calibration text has {rows.ids.size:,} tokens in whole rows, "
            f"{settings.calibration_tokens:,} were asked for",
            style="yellow",
        )
    vocabulary = checkpoint.config["vocab_size"]
    if rows.ids.max() >= vocabulary:
        raise InputError(
            f"{checkpoint.source}: the tokenizer gives token id {rows.ids.max()}, the model has {vocabulary} tokens"
        )
    return rows


def _check_disk(out: Path, checkpoint: Checkpoint, plan: Plan, rows: Rows | None) -> None:
    scratch = 0 if rows is None else 2 * rows.ids.size * checkpoint.config["hidden_size"] * 4
    refuse_full_disk(out, plan.bytes, scratch)


def _tell_memory(checkpoint: Checkpoint, plan: Plan) -> None:
    """Say what the work needs, and warn where the machine does not have it."""
    needed = working_memory(checkpoint, plan, BATCH_TOKENS)
    console.print(f"memory: about {needed / 2**20:,.0f} MiB at the peak, beside the program itself", style="dim")
    free = psutil.virtual_memory().available
    if needed > free:
        console.print(f"warning: the machine has {free / 2**20:,.0f} MiB of memory free", style="yellow")


class _Job:
    """One pass over the checkpoint, row of the plan by row of the plan."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, sink: Sink, settings: QuantizeSettings, scratch: Path):
        self.checkpoint, self.plan, self.sink, self.settings, self.scratch = checkpoint, plan, sink, settings, scratch
        wants_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if wants_cuda else "cpu"
        self.dtype = torch.bfloat16 if wants_cuda else torch.float32
        self.feedback = FeedbackSettings(settings.act_order, settings.damping)
        self.errors: dict[str, float] = {}

    def run(self, rows: Rows | None) -> dict[str, float]:
        """Write every row; returns each rounded tensor's relative weighted error."""
        before, layers, after = self._parts()
        for row in before:
            self._whole(row)
        if rows is None:
            for layer in track(layers, "layers"):
                for row in layer:
                    self._whole(row)
                give_freed_memory_back()
        else:
            self._calibrated(layers, rows)
        for row in after:
            self._whole(row)
        return self.errors

    def _parts(self) -> tuple[list[PlanRow], list[list[PlanRow]], list[PlanRow]]:
        layers: list[list[PlanRow]] = [[] for _ in range(self.checkpoint.num_layers)]
        before: list[PlanRow] = []
        after: list[PlanRow] = []
        for row in self.plan.rows:
            if row.name.startswith(LAYER):
                layers[int(row.name.removeprefix(LAYER).split(".")[0])].append(row)
            else:
                (after if layers[0] else before).append(row)
        return before, layers, after

    def _read(self, row: PlanRow) -> torch.Tensor:
        tensor = self.checkpoint.read(row.name)
        if not torch.isfinite(tensor).all():
            raise InputError(f"{self.checkpoint.source}: tensor {row.name!r} holds NaN or infinite values")
        return tensor

    def _whole(self, row: PlanRow) -> None:
        """A row that needs no activations."""
        tensor = self._read(row)
        if row.solver == "cast":
            self.sink.cast(row, tensor)
        else:
            self._round(row, tensor.to(self.device), None)

    def _round(self, row: PlanRow, weight: torch.Tensor, moments: Moments | None) -> Callable[[], torch.Tensor]:
        """Round one weight and write it; returns what gives it as its reader will see it."""
        grid = self.sink.grid(row)
        if grid is None:
            seen = self.sink.encode(row, weight)
            return lambda: seen
        if row.solver == "gptq":
            assert moments is not None
            rounded = error_feedback(weight, moments, grid, self.feedback)
        else:
            rounded = round_to_nearest(weight, moments, grid)
        self.errors[row.name] = rounded.error
        self.sink.rounded(row, rounded.cpu())
        return rounded.dequantize

    def _calibrated(self, layers: list[list[PlanRow]], rows: Rows) -> None:
        """Layer by layer: gather moments with the layer as it was, round it, and pass on what it gives then."""
        stream = LayerStream(self.checkpoint, self.device, self.dtype)
        batch = max(BATCH_TOKENS // rows.ids.shape[1], 1)
        inputs = stream.embed(rows.ids, self.scratch / ".activations-0", batch)
        family = self.checkpoint.family
        for number, layer in enumerate(track(layers, "layers")):
            with stream.layer(number) as module:
                with collect_moments(module, family) as moments:
                    for _ in stream.run(number, module, inputs, batch):
                        pass
                for row in layer:
                    name = row.module.removeprefix(f"{LAYER}{number}.")
                    if name not in family.linears or row.solver == "cast":
                        self._whole(row)
                        continue
                    linear = module.get_submodule(name)
                    assert isinstance(linear, torch.nn.Linear)
                    weight = self._read(row).to(self.device)
                    linear.weight.data.copy_(self._round(row, weight, moments[name])())
                outputs = Activations(self.scratch / f".activations-{(number + 1) % 2}", inputs.shape)
                done = 0
                for part in stream.run(number, module, inputs, batch):
                    outputs.write(done, part)
                    done += len(part)
            inputs.remove()
            inputs = outputs
            give_freed_memory_back()
        inputs.remove()


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
        "settings": asdict(settings),
        "calibration": None if rows is None else {"sources": list(rows.sources), "row_length": rows.ids.shape[1]},
        "parameters": done.plan.parameters,
        "plan_sha256": done.plan.sha256,
        "plan": done.plan.to_json(),
        "errors": done.errors,
        "notes": list(done.notes),
        "versions": {name: version(name) for name in packages},
        "evals": {},
    }
