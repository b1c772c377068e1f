"""Tell what an artifact is: a safetensors directory, a GGUF file, a directory with one, or a hub id.

Imports neither torch nor an engine, so that a process which measures memory holds nothing it does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmlite.errors import InputError


@dataclass(frozen=True)
class Location:
    """Which engine serves an artifact, and from where: ``path`` is a GGUF file or a checkpoint directory."""

    engine: Literal["llama.cpp", "transformers"]
    path: Path

    @property
    def directory(self) -> Path:
        return self.path.parent if self.engine == "llama.cpp" else self.path


def find(artifact: str | Path) -> Location:
    """Where the weights lie and who reads them; `InputError` when that is not clear.

    A directory with config.json and safetensors files goes to transformers, another one with a single GGUF
    file to llama.cpp, and a hub id is fetched, or taken from the cache.
    """
    path = Path(artifact)
    for folder in (path.resolve(), path.resolve().parent):
        if folder.name.startswith(".") and folder.name.endswith(".partial"):
            raise InputError(f"{folder}: was left by a run that did not finish, or is being written: not an artifact")
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: is not a .gguf file; give a directory, a GGUF file or a hub id")
        return Location("llama.cpp", path)
    if not path.is_dir():
        if path.suffix == ".gguf":
            raise InputError(f"{path}: there is no such file")
        from llmlite.checkpoint.checkpoint import locate  # needs torch: see above

        path = locate(str(artifact))
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Location("transformers", path)
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(
            f"{path}: has {len(files)} GGUF files ({files[0].name}, {files[1].name}, ...): name one of them"
        )
    if not files:
        raise InputError(f"{path}: has neither config.json with safetensors files nor a GGUF file: not an artifact")
    return Location("llama.cpp", files[0])
