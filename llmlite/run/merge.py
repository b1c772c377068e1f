"""Merge an adapter into its base: a plain checkpoint, or one that is rounded again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmlite import __version__
from llmlite.adapt.merge import merged, stored_layout, write_checkpoint
from llmlite.checkpoint.artifact import (
    atomic_directory,
    refuse_existing,
    refuse_full_disk,
    sha256_of,
    write_manifest,
)
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.errors import InputError
from llmlite.formats.adapter_base import refuse_other_base
from llmlite.formats.dequantized import gguf_file
from llmlite.formats.peft import Adapter, read_adapter
from llmlite.memory import keep_heap_small
from llmlite.run.dense import opened_dense
from llmlite.run.quantize import Quantized, quantize_checkpoint
from llmlite.run.settings import QuantizeSettings, RoundingSettings, check
from llmlite.run.text import choose_device


@dataclass(frozen=True)
class MergeSettings(RoundingSettings):
    """What `merge` can be told; all but ``to``, ``device``, ``threads`` and ``revision`` go with ``to``."""

    to: str | None = field(
        default=None, metadata={"help": "FORMAT:TYPE to round the merged weights to (default: a 16-bit checkpoint)"}
    )


@dataclass(frozen=True)
class Merged:
    """What was written: the directory, how many weights changed, bytes of all tensors; ``quantized`` with ``to``."""

    directory: Path
    changed: int
    bytes: int
    quantized: Quantized | None = None

    def to_json(self) -> dict[str, Any]:
        form = "checkpoint" if self.quantized is None else str(self.quantized.plan.target)
        return {"artifact": str(self.directory), "format": form, "changed": self.changed, "bytes": self.bytes}


def merge(model: str | Path, adapter: str | Path, out: str | Path, settings: MergeSettings) -> Merged:
    """Merge the peft adapter in the directory ``adapter`` into ``model``, as the new directory ``out``.

    ``model``: a directory, a GGUF file or a hub id; the weights of a quantized artifact are multiplied out first. W +
    scale * B A is computed in float32, and stored in the base's dtype, of a GGUF file in bfloat16; or rounded again as
    `quantize` does. Raises `InputError` for an adapter of another base, and for what can't be done with either.
    """
    keep_heap_small()
    out = Path(out)
    refuse_existing(out)
    rounding = _rounding(settings)
    found = read_adapter(Path(adapter))
    refuse_other_base(found.directory, str(model), settings.revision)
    device = choose_device(settings.device, settings.threads)
    with opened_dense(str(model), settings.revision, out) as checkpoint:
        whole = merged(checkpoint, found)
        if rounding is not None:
            told = {"adapter": _told(found)}
            done = quantize_checkpoint(whole, out, rounding, device, told)
            return Merged(out, len(found.pairs), done.plan.bytes, done)
        layout = stored_layout(whole, torch.bfloat16 if gguf_file(Path(model)) else None)
        size = sum(spec.nbytes for spec in layout.values())
        refuse_full_disk(out, size)
        with atomic_directory(out) as directory:
            write_checkpoint(whole, layout, directory)
            write_manifest(directory, _manifest(checkpoint, found))
    return Merged(out, len(found.pairs), size)


def _rounding(settings: MergeSettings) -> QuantizeSettings | None:
    """How the merged weights are rounded; `InputError` for options that only rounding uses, where nothing is."""
    if settings.to is not None:
        rounding = QuantizeSettings(**asdict(settings))
        check(rounding)
        return rounding
    plain = MergeSettings(device=settings.device, threads=settings.threads, revision=settings.revision)
    given = [name for name, value in asdict(settings).items() if value != asdict(plain)[name]]
    if given == ["resume"]:
        raise InputError("--resume: goes with --to; without it nothing is done that a run could go on with")
    if given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option}: says how merged weights are rounded, and without --to nothing is; leave it out")
    return None


def _told(adapter: Adapter) -> dict[str, Any]:
    return {"source": str(adapter.directory), "sha256": adapter.sha256}


def _manifest(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Any]:
    return {
        "llmlite": __version__,
        "kind": "merge",
        "base": {
            "source": checkpoint.source,
            "config_sha256": sha256_of(checkpoint.directory / "config.json"),
        },
        "adapter": _told(adapter),
    }
