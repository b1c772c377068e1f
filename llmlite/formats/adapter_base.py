"""Which model an adapter was made for, as its llmlite.json tells: another one's is refused, whatever its shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from llmlite.checkpoint.artifact import origin_sha256, read_manifest, sha256_of
from llmlite.checkpoint.checkpoint import locate
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError
from llmlite.formats.dequantized import gguf_file

# What the ``kind`` in an adapter's manifest is.
ADAPTER = "adapter"
ERROR_ADAPTER = "error adapter"  # makes good one artifact's rounding, and no other's


def weights_sha256(model: str, revision: str | None = None) -> dict[str, str]:
    """The digest of each of a model's weight files by its name."""
    file = gguf_file(Path(model))
    files = [file] if file else sorted({entry.file for entry in read_index(locate(model, revision)).values()})
    return {part.name: _digest(part, part.stat().st_size, part.stat().st_mtime_ns) for part in files}


@lru_cache(maxsize=1024)
def _digest(file: Path, _size: int, _changed: int) -> str:
    """Read once as long as the file stays as it is: each adapter that a server offers asks for the base's."""
    return sha256_of(file)


def refuse_other_base(
    adapter: Path, model: str, revision: str | None = None, doubt: Callable[[str], None] | None = None
) -> None:
    """`InputError` where an adapter's manifest names another base than ``model``; one without a manifest passes.

    ``model`` may be what the adapter was made on, an artifact of that, or what that is an artifact of; an adapter of
    rounding errors belongs to one artifact only. A GGUF file that lies alone does not tell what it is, and passes.
    ``doubt`` is told, in place of an error, where only the two config.json differ: they may be two words for one model.
    """
    manifest = read_manifest(adapter) or {}
    base, kind = manifest.get("base"), manifest.get("kind")
    if not isinstance(base, dict) or kind not in (ADAPTER, ERROR_ADAPTER):
        return
    source, weights, config = base.get("source"), base.get("weights_sha256"), base.get("config_sha256")
    own = _config_sha256(_folder(model, revision))
    if kind == ERROR_ADAPTER:
        if not _same(weights, model, revision):
            raise InputError(
                f"{adapter}: makes good what rounding cost {source}, and {model} has other weights: an adapter of "
                "another base"
            )
    elif config is not None and config == own:
        if weights is not None and gguf_file(Path(model)) is None and not _same(weights, model, revision):
            raise InputError(f"{adapter}: was made for {source}, and {model} has other weights: of another base")
    elif config is not None:
        wanted = {config, base.get("origin_config_sha256"), origin_sha256(Path(str(source)))}
        found = {own, origin_sha256(_folder(model, revision))} - {None}
        if found and not wanted & found:  # a GGUF file alone does not tell: it goes by the shapes
            said = f"{adapter}: was made for {source}, and {model} is another model by its config.json"
            if doubt is None:
                raise InputError(f"{said}: an adapter of another base")
            doubt(said)


def _same(weights: object, model: str, revision: str | None) -> bool:
    """The digests are those of the model's files, whatever these are called."""
    return isinstance(weights, dict) and sorted(weights.values()) == sorted(weights_sha256(model, revision).values())


def _folder(model: str, revision: str | None) -> Path:
    return Path(model).parent if model.endswith(".gguf") else locate(model, revision)


def _config_sha256(folder: Path) -> str | None:
    file = folder / "config.json"
    return sha256_of(file) if file.is_file() else None
