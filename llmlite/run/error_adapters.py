"""Make an adapter of what rounding cost an artifact: what `lora --init qera` does before any training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llmlite import __version__
from llmlite.adapt.error_adapters import ErrorAdapter, ErrorAdapterSettings, error_adapter
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import (
    atomic_directory,
    read_manifest,
    refuse_existing,
    refuse_full_disk,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import Checkpoint, locate, open_checkpoint, read_config
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError
from llmlite.formats.adapter_base import ERROR_ADAPTER, weights_sha256
from llmlite.formats.dequantized import dequantized_gguf, gguf_file, open_dequantized
from llmlite.formats.gguf.lora import GGUF_LORA, write_gguf_lora
from llmlite.formats.peft import read_adapter
from llmlite.memory import keep_heap_small
from llmlite.run.text import calibration_rows, check_row_length


@dataclass(frozen=True)
class Calibration:
    """The text whose tokens weigh the errors, as in `quantize`."""

    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 32768
    row_length: int = 512
    seed: int = 0


def make_error_adapter(
    artifact: str, base: str, out: Path, settings: ErrorAdapterSettings, text: Calibration
) -> ErrorAdapter:
    """`write_error_adapter` as the new directory ``out``, which is there when all is done."""
    keep_heap_small()
    refuse_existing(out)
    with atomic_directory(out) as directory:
        return write_error_adapter(artifact, base, directory, settings, text)


def write_error_adapter(
    artifact: str, base: str, directory: Path, settings: ErrorAdapterSettings, text: Calibration
) -> ErrorAdapter:
    """Write into ``directory`` the adapter that brings ``artifact`` nearer to ``base``, which it was made from.

    It is a peft adapter; for a GGUF artifact also adapter.gguf, which llama.cpp loads. The manifest says whose rounding
    it makes good. `InputError` where ``artifact`` is not rounded, or not ``base``'s.
    """
    check_row_length(text.calibration_tokens, text.row_length)
    whole = open_checkpoint(base)
    rounded = _rounded(artifact, whole)
    rows = None
    if settings.init != "loftq":
        rows = calibration_rows(whole, text.calibration, text.calibration_tokens, text.row_length, text.seed)
        refuse_full_disk(directory, *_disk_needed(whole, settings.rank, rows.ids.size))
    done = error_adapter(whole, rounded, rows, directory, settings)
    if gguf_file(Path(artifact)):
        write_gguf_lora(read_adapter(directory), whole.config, directory / GGUF_LORA)
    write_manifest(directory, _manifest(artifact, whole, done, settings, rows))
    return done


def _disk_needed(base: Checkpoint, rank: int, tokens: int) -> tuple[int, int]:
    """Bytes of the pairs, and of two networks' activations while a layer is worked on, at most."""
    shapes = [entry.shape for name, entry in base.tensors.items() if name.startswith(LAYER) and len(entry.shape) == 2]
    widest, hidden = max(max(shape) for shape in shapes), base.config["hidden_size"]
    return sum(2 * rank * sum(shape) for shape in shapes), 2 * tokens * 4 * (5 * hidden + widest)


def made_facts(out: Path, done: ErrorAdapter) -> dict[str, Any]:
    """What was made, as plain values."""
    return {"adapter": str(out), "bytes": done.bytes, "relative_error": _means(done)}


def made_sentence(out: Path, done: ErrorAdapter) -> str:
    """What was made, for the terminal."""
    mean = _means(done)
    return (
        f"{out}: {done.bytes / 1e6:,.1f} MB; mean relative error of the layers' outputs {mean['before']:.2e} -> "
        f"{mean['after']:.2e} ({mean['after'] / mean['before'] - 1:+.1%})"
    )


def _means(done: ErrorAdapter) -> dict[str, float]:
    return {"before": fmean(done.before.values()), "after": fmean(done.after.values())}


def _rounded(artifact: str, base: Checkpoint) -> Checkpoint:
    file = gguf_file(Path(artifact))
    folder = file.parent if file else locate(artifact)
    if not file and not read_config(folder).get("quantization_config"):
        raise InputError(f"{artifact}: is not quantized, so there is no rounding error to make good")
    told = ((read_manifest(folder) or {}).get("base") or {}).get("config_sha256")
    if told is not None and told != sha256_of(base.directory / "config.json"):
        raise InputError(f"{artifact}: its llmlite.json says that it was not made from {base.source}; name its base")
    return dequantized_gguf(base, file) if file else open_dequantized(folder)


def _manifest(
    artifact: str, base: Checkpoint, done: ErrorAdapter, settings: ErrorAdapterSettings, rows: Rows | None
) -> dict[str, Any]:
    return {
        "llmlite": __version__,
        "kind": ERROR_ADAPTER,
        "base": {
            "source": artifact,
            "weights_sha256": weights_sha256(artifact),
            "config_sha256": sha256_of(base.directory / "config.json"),
        },
        "settings": asdict(settings),
        "calibration": None if rows is None else {"sources": list(rows.sources), "row_length": rows.ids.shape[1]},
        "bytes": done.bytes,
        "relative_error": _means(done),
        "errors": {name: [done.before[name], done.after[name]] for name in done.before},
    }
