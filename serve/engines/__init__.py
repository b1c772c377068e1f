"""Which engine serves which artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.checkpoint.artifact import GGUF_FILE, read_manifest
from llmlite.errors import InputError, LlmliteError
from llmlite.evals.locate import find
from llmlite.serve.drafting import Drafts
from llmlite.serve.engines.base import Engine
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from llmlite.serve.engines.llama_cpp import LlamaCppEngine


@dataclass(frozen=True)
class Opened:
    """A loaded artifact: its engine, the name that clients use unless another is set, llmlite.json, a draft model."""

    engine: Engine
    name: str
    manifest: dict[str, Any] | None
    draft: Drafts | None = None


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
        engine = LlamaCppEngine(file, settings)
        try:
            return Opened(engine, name, manifest, _draft(engine, settings))
        except LlmliteError:
            engine.close_model()
            raise
    if settings.draft not in ("off", "lookup"):
        raise InputError("draft: a draft model needs a GGUF file that it drafts for; lookup works with safetensors")
    from llmlite.serve.engines.transformers import TransformersEngine

    name = location.path.resolve().name if Path(artifact).is_dir() else str(artifact)
    return Opened(TransformersEngine(location.path, settings), name, manifest)


def _draft(engine: LlamaCppEngine, settings: ServeSettings) -> Drafts | None:
    """The draft model that the settings name. Raises `InputError` where there is none or it can't draft for this."""
    if settings.draft in ("off", "lookup"):
        return None
    if not engine.can_cut:
        raise InputError("draft: guesses can't be taken back from this model's sliding windows or recurrent state")
    try:
        location = find(settings.draft)
    except InputError as error:
        raise InputError(f"draft: {error}") from None
    if location.engine != "llama.cpp":
        raise InputError(f"draft {settings.draft}: must be a GGUF file or a folder with one")
    return engine.open_draft(location.path, settings)
