"""Command-line options and recipe keys, both generated from frozen dataclasses."""

from __future__ import annotations

import argparse
import types
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from llmlite.errors import InputError, first_line

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str) -> Any:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field of the dataclass, with its help and default; unset ones stay out of the namespace."""
    hints = get_type_hints(settings)
    for item in fields(settings):
        if "help" not in item.metadata:
            continue
        parser.add_argument(_flag(item), **_argument(item, hints[item.name]))


def settings_from(
    settings: type[Settings], given: argparse.Namespace, recipe: Path | None, under: dict[str, Any] | None = None
) -> Settings:
    """The dataclass from the recipe file, overridden by the command line; ``under`` stands in for the defaults."""
    values = {**(under or {}), **(read_recipe(recipe, settings) if recipe else {})}
    names = {item.name for item in fields(settings) if "help" in item.metadata}  # type: ignore[arg-type]
    values.update({name: value for name, value in vars(given).items() if name in names})
    for item in fields(settings):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{_flag(item)} is missing: {item.metadata['help']}")
    return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def read_recipe(file: Path, settings: type) -> dict[str, Any]:
    """The settings in a YAML file; unknown keys and wrong types are refused."""
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"--recipe {file}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {file}: is not YAML ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"--recipe {file}: a list of 'key: value' lines is right")
    return check_values(values, settings, f"--recipe {file}")


def check_values(values: dict, settings: type, where: str) -> dict[str, Any]:
    """``values`` as the dataclass wants them; `InputError` that begins with ``where`` for unknown keys, wrong types."""
    hints = get_type_hints(settings)
    known = [item.name for item in fields(settings) if "help" in item.metadata]
    out = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")
        out[name] = _checked(value, hints[name], f"{where}: {key}")
    return out


def _checked(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_checked(item, get_args(hint)[0], where) for item in items)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
        return _checked(value, hint, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where}: {value!r} is not a value of type {hint.__name__}")
    return value


def _flag(item: Field) -> str:
    return "--" + item.name.replace("_", "-")


def _argument(item: Field, hint: Any) -> dict[str, Any]:
    text = item.metadata["help"].replace("%", "%%")
    out: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if hint is bool and item.name.startswith("no_"):
        return {**out, "action": "store_true"}
    if hint is bool:
        return {**out, "action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {**out, "nargs": "+", "type": _element(get_args(hint)[0]), "metavar": item.name.upper()}
    if get_origin(hint) is Literal:
        out["choices"] = get_args(hint)
    else:
        out["type"] = _element(hint)
        out["metavar"] = "N" if out["type"] in (int, float) else item.name.upper()
    if item.default not in (MISSING, None, ()):
        out["help"] += f" (default: {item.default})"
    return out


def _element(hint: Any) -> type:
    if get_origin(hint) in (Union, types.UnionType):
        return _element(next(kind for kind in get_args(hint) if kind is not type(None)))
    return hint
