"""Imports point one way: checkpoint <- calibrate <- quantize <- formats <- adapt <- evals <- serve."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["checkpoint", "calibrate", "quantize", "formats", "adapt", "evals", "serve"]
ON_TOP = {"run", "cli"}
# The moments that calibration gathers are a type that the solvers own.
ALLOWED = {("calibrate", "llmlite.quantize.types")}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in ROOT.glob("llmlite/**/*.py"):
        parts = path.relative_to(ROOT / "llmlite").parts
        found.append((parts[0].removesuffix(".py"), path))
    found += [(room, path) for room in ("evals", "serve") for path in (ROOT / room).rglob("*.py")]
    return found


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_one_way(room: str, path: Path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "llmlite" or len(parts) < 2:
            continue
        target = parts[1]
        if any(room == where and name.startswith(what) for where, what in ALLOWED):
            continue
        if room in ORDER and target in ORDER:
            assert ORDER.index(target) <= ORDER.index(room), f"{room} imports {name}"
        if room not in ON_TOP:
            assert target not in ON_TOP, f"{room} imports {name}"
        if room == "serve":
            assert target not in ("quantize", "calibrate"), f"serve imports {name}"


def test_solvers_are_pure():
    for room, path in modules():
        if room == "quantize":
            outside = [n for n in imports(path) if not n.startswith(("torch", "llmlite.quantize", "__future__"))]
            assert all(n.startswith(("collections.abc", "dataclasses", "typing")) for n in outside), (
                f"{path.name} imports {outside}"
            )
