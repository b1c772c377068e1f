"""Which engine serves which artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.checkpoint.artifact import GGUF_FILE, read_manifest
from llmlite.evals.locate import find
from llmlite.serve.engines.base import Engine
from llmlite.serve.settings import ServeSettings


@dataclass(frozen=True)
class Opened:
    """A loaded artifact: its engine, the name that clients use unless another is set, and llmlite.json."""

    engine: Engine
    name: str
    manifest: dict[str, Any] | None


def open_artifact(artifact: str | Path, settings: ServeSettings) -> Opened:
    """Load a safetensors directory, a GGUF file, a directory with one, or a hub id.

    Raises `InputError` for what can't be loaded, `OutsideError` where memory or the network fails.
    """
    location = find(artifact)
    manifest = read_manifest(location.directory)
    if location.engine == "llama.cpp":
        from llmlite.serve.engines.llama_cpp import LlamaCppEngine

        file = location.path
        name = file.stem if manifest is None or file.name != GGUF_FILE else file.parent.resolve().name
        return Opened(LlamaCppEngine(file, settings), name, manifest)
    from llmlite.serve.engines.transformers import TransformersEngine

    name = location.path.resolve().name if Path(artifact).is_dir() else str(artifact)
    return Opened(TransformersEngine(location.path, settings), name, manifest)
