"""Files that are made once and used again as long as what they were made from stays the same."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from llmlite.checkpoint.artifact import sha256_of

Settings = Mapping[str, object]


def piece(path: Path, settings: Settings, make: Callable[[Path], None]) -> Path:
    """``path``, a file or a directory, made anew unless it was made with the same ``settings`` (JSON values).

    ``make`` gets another name in the same folder; what it wrote there is renamed when it is whole. Where another
    process is making the same piece, this one waits for it.
    """
    if is_made(path, settings):
        return path
    stamp = _stamp(path)
    partial = path.with_name(f"unfinished-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_made(path, settings):
            return path
        for stale in (partial, path):
            _remove(stale)
        stamp.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
        stamp.write_text(json.dumps(dict(settings), indent=1) + "\n")
    return path


def is_made(path: Path, settings: Settings) -> bool:
    """Whether the piece is there, and was made with these settings."""
    stamp = _stamp(path)
    return path.exists() and stamp.is_file() and json.loads(stamp.read_text()) == json.loads(json.dumps(dict(settings)))


def made_from(path: Path) -> dict:
    """The settings of a finished piece."""
    return json.loads(_stamp(path).read_text())


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


@cache
def digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights and configuration in a directory, hexadecimal."""
    if path.is_file():
        return sha256_of(path)
    files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".gguf") or f.name == "config.json")
    return ",".join(sha256_of(file)[:16] for file in files)


def run(command: list[str], log: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Standard output and error of a program, also kept in ``log``; SystemExit with its last words where it fails."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        env=dict(environment) if environment is not None else None,
    )  # fmt: skip
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
