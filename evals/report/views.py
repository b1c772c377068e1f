"""The parts of a report, and how figures are written for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmlite.evals.gate import number


@dataclass(frozen=True)
class Table:
    """Rows of plain text; columns named in ``right`` hold figures, and those without any figure are left out."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        empty = [all(row[n] == "-" for row in self.rows) and name in self.right for n, name in enumerate(self.head)]
        object.__setattr__(self, "head", tuple(name for name, out in zip(self.head, empty, strict=True) if not out))
        rows = [tuple(cell for cell, out in zip(row, empty, strict=True) if not out) for row in self.rows]
        object.__setattr__(self, "rows", rows)


@dataclass(frozen=True)
class Picture:
    """``svg``: an element to stand inside a page, which gives its colours; ``caption``: plain text."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """``missing``: what to do where neither a table nor a picture is there."""

    anchor: str
    title: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    text: str = ""
    missing: str = field(default="")

    @property
    def measured(self) -> bool:
        return bool(self.tables or self.pictures)


def pick(facts: Mapping[str, Any], address: str) -> Any:
    """What stands under the keys of ``address``, None where one of them is not there."""
    value: Any = facts
    for key in address.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def size(value: Any) -> str:
    """Bytes in the unit that fits: B, KiB, MiB, GiB."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= bytes_:
            return f"{value / bytes_:,.2f} {unit}"
    return f"{value:,.0f} B"


def percent(value: Any, signed: bool = False) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:+.2%}" if signed else f"{value:.2%}"


def share(value: Any) -> str:
    """A change of a probability in percentage points."""
    return f"{100 * value:+.3f}" if isinstance(value, int | float) else "-"


def with_error(value: Any, stderr: Any) -> str:
    if not isinstance(value, int | float) or not isinstance(stderr, int | float):
        return number(value) if isinstance(value, int | float) else "-"
    return f"{value:.4g} ± {stderr:.2g}"


def spread(value: Any) -> str:
    """A figure, or a median with its least and most."""
    if isinstance(value, Mapping):
        return f"{value.get('median', 0):.4g} ({value.get('minimum', 0):.4g} to {value.get('maximum', 0):.4g})"
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Every figure and word below ``value`` with its address; lists of more than 16 members are left out.

    A key K_stderr goes to the figure K.
    """
    if isinstance(value, list):
        value = {str(n): member for n, member in enumerate(value)} if len(value) <= 16 else {}
    if not isinstance(value, Mapping):
        return [] if value is None else [(path[:-1], value if isinstance(value, str) else number(value))]
    if isinstance(value.get("value"), int | float) and "stderr" in value:
        rest = {key: of for key, of in value.items() if key not in ("value", "stderr")}
        return [(path[:-1], with_error(value["value"], value["stderr"])), *flat(rest, path)]
    out = []
    for key, member in value.items():
        if key.endswith("_stderr") and key.removesuffix("_stderr") in value:
            continue
        error = value.get(f"{key}_stderr")
        out += [(f"{path}{key}", with_error(member, error))] if error is not None else flat(member, f"{path}{key}.")
    return out
