"""The model families that can be compressed, read from families.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from llmlite.errors import InputError

LAYER = "model.layers."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """What is known of one architecture; the fields are described in families.toml."""

    name: str
    model_types: tuple[str, ...]
    gguf: str
    stages: tuple[tuple[str, ...], ...]
    norms: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of one decoder layer in the order in which they run."""
        return tuple(name for stage in self.stages for name in stage)


def _load() -> dict[str, Family]:
    table = tomllib.loads(files("llmlite.checkpoint").joinpath("families.toml").read_text())
    axes = {name: tuple(of) for name, of in table.pop("axes").items()}
    return {
        name: Family(
            name=name,
            model_types=tuple(row["model_types"]),
            gguf=row["gguf"],
            stages=tuple(tuple(stage) for stage in row["stages"]),
            norms=tuple(row["norms"]),
            axes={key: axes[key] for key in _members(row)},
        )
        for name, row in table.items()
    }


def _members(row: dict) -> list[str]:
    return ["embed_tokens", "norm", "lm_head", *row["norms"], *(name for stage in row["stages"] for name in stage)]


FAMILIES = _load()


def family_of(config: dict, where: str) -> Family:
    """The family of a config.json; `InputError` names the ones that are known."""
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise InputError(f"{where}: unknown architecture {model_type!r}; known model types are {', '.join(known)}")


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file's general.architecture."""
    for family in FAMILIES.values():
        if family.gguf == architecture:
            return family
    known = sorted(family.gguf for family in FAMILIES.values())
    raise InputError(f"{where}: unknown architecture {architecture!r}; known are {', '.join(known)}")
