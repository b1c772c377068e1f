"""How far a run has come: what `--resume` needs to know, beside the partial artifact and the activations in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmlite import __version__
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.artifact import JOURNAL, partial_of, sha256_of, write_json
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.errors import InputError
from llmlite.plan.plan import Plan


@dataclass
class Journal:
    """What a run is, how far it has come, and the relative weighted errors of the weights that are done.

    ``layers``: decoder layers that are done; ``head``: so is a head that is rounded by what the last of them gives.
    """

    run: dict[str, Any]
    layers: int = 0
    head: bool = False
    errors: dict[str, float] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Put it into the partial artifact in one step. What it tells of must be on the disk by then."""
        write_json(directory / JOURNAL, asdict(self))

    def differences(self, other: Journal) -> list[str]:
        """What is not alike in what the two runs are: settings by their names, "settings.damping"."""
        mine, its = _flat(self.run), _flat(other.run)
        return sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))


def read_journal(out: Path) -> Journal | None:
    """The journal of the unfinished run that would have become ``out``; None where there is none, or none to read."""
    file = partial_of(out) / JOURNAL
    try:
        found = json.loads(file.read_text())
        return Journal(found["run"], found["layers"], found["head"], found["errors"])
    except (OSError, ValueError, KeyError, TypeError):  # it is written in one step, so this is no journal of ours
        return None


def begin(out: Path, run: dict[str, Any], resume: bool) -> Journal:
    """The journal to go on with: the unfinished run's with ``resume`` where there is one, else an empty one.

    `InputError` where the unfinished run is another one.
    """
    fresh, left = Journal(run), read_journal(out)
    if not resume or left is None:
        return fresh
    different = left.differences(fresh)
    if different:
        raise InputError(
            f"--resume: the unfinished run of {out} differs in {', '.join(different)}; give it what it was started "
            "with, or leave --resume out to begin again"
        )
    return left


def describe_run(
    checkpoint: Checkpoint, plan: Plan, rows: Rows | None, settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """All that decides what a run writes; two runs alike in it write the same bytes.

    ``settings``: those of the command that bear on the result. Weights are known by size and time of change: reading
    them all would take longer than some runs.
    """
    calibration = None
    if rows is not None:
        calibration = f"{list(rows.ids.shape)} " + hashlib.sha256(rows.ids.tobytes()).hexdigest()
    files = {file for entry in checkpoint.tensors.values() for file in entry.files}
    return {
        "llmlite": __version__,
        "base": describe_files(checkpoint.source, checkpoint.directory, files, checkpoint.gguf),
        "plan": plan.sha256,
        "calibration": calibration,
        "device": device,
        "settings": json.loads(json.dumps(settings)),
    }


def describe_files(source: str, directory: Path, weights: Iterable[Path], gguf: Path | None = None) -> dict[str, Any]:
    """What tells one model from another without reading all of it: its config, and its files' sizes and times.

    The file ``gguf`` stands for the ``directory`` that it is imported into, which is made anew by each run.
    """
    files = set(weights)
    if gguf is not None:
        files = {file for file in files if file.parent != directory} | {gguf}
    told = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return {"source": source, "config.json": sha256_of(directory / "config.json"), **told}


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat
