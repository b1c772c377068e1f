"""Open whatever holds a model's weights as a checkpoint of real numbers, and tell which model it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmlite.checkpoint.artifact import read_manifest, sha256_of
from llmlite.checkpoint.checkpoint import Checkpoint, locate
from llmlite.errors import InputError
from llmlite.formats.dequantized import gguf_file, open_dequantized
from llmlite.run.text import opened

ERROR_ADAPTER = "error adapter"  # the ``kind`` in its manifest: it makes good one artifact's rounding, and no other's


@contextmanager
def opened_dense(model: str, revision: str | None, out: Path) -> Iterator[Checkpoint]:
    """A checkpoint, or an artifact with its rounded weights multiplied out; a GGUF file's are imported beside ``out``.

    ``model``: a directory, a GGUF file or a hub id.
    """
    file = gguf_file(Path(model))
    if file is not None:
        with opened(str(file), None, out) as checkpoint:
            yield replace(checkpoint, source=model)
        return
    yield replace(open_dequantized(locate(model, revision)), source=model)


def weights_digest(model: str, revision: str | None = None) -> str:
    """Hexadecimal SHA-256 of a model's weight files, one behind the other by name."""
    file = gguf_file(Path(model))
    total = hashlib.sha256()
    for part in [file] if file else sorted(locate(model, revision).glob("*.safetensors")):
        total.update(sha256_of(part).encode())
    return total.hexdigest()


def config_digests(model: str, revision: str | None = None) -> set[str]:
    """SHA-256 of the config.json of a model, and of its base where its manifest tells it."""
    folder = Path(model).parent if model.endswith(".gguf") else locate(model, revision)
    manifest = read_manifest(folder) or {}
    config = folder / "config.json"
    return ({sha256_of(config)} if config.is_file() else set()) | _told(manifest)


def refuse_other_base(adapter: Path, model: str, revision: str | None = None) -> None:
    """`InputError` where an adapter's manifest names another base than ``model``; one without a manifest passes."""
    manifest = read_manifest(adapter)
    if manifest is None:
        return
    base = manifest.get("base") or {}
    if manifest.get("kind") == ERROR_ADAPTER and base.get("weights_sha256") != weights_digest(model, revision):
        raise InputError(
            f"{adapter}: makes good what rounding cost {base.get('source')}, and {model} has other weights: an adapter "
            "of another base"
        )
    wanted, found = _told(manifest), config_digests(model, revision)
    if wanted and found and not wanted & found:
        raise InputError(
            f"{adapter}: was made for {base.get('source')}, and the config.json of {model} is another: an adapter of "
            "another base"
        )


def _told(manifest: Mapping[str, Any]) -> set[str]:
    """The digests of config.json that a manifest gives its base, and that base's base."""
    found = set()
    base = manifest.get("base")
    while isinstance(base, dict):
        found |= {base["config_sha256"]} if "config_sha256" in base else set()
        base = base.get("base")
    return found
