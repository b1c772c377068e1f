"""An artifact comes into being whole or not at all, and says in llmlite.json what it is."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmlite.errors import InputError, OutsideError

MANIFEST = "llmlite.json"
GGUF_FILE = "model.gguf"  # the weights of a GGUF artifact
DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SPARE_BYTES = 16 * 2**20  # for configs, tokenizer and the file system's own needs


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Every file is flushed to the disk before the rename. What a killed run left behind is removed by the next
    run with the same ``out``; a directory that a live process still holds is not. Raises `InputError` if ``out``
    exists and is not an empty directory, or if another process is writing it.
    """
    refuse_existing(out)
    out = out.resolve()
    with _hidden_directory(out, "partial") as partial:
        try:
            yield partial
            _flush(partial)
            partial.rename(out)  # an empty directory in its place is replaced
            _flush_directory(out.parent)
        except OSError as error:
            if error.errno in DISK_FAILED:
                raise OutsideError(f"{out}: can't be written ({error.strerror}); nothing of it was kept") from None
            raise


@contextmanager
def scratch_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` for as long as the block runs; a killed run's is removed by the next one."""
    with _hidden_directory(out.resolve(), "scratch") as scratch:
        yield scratch


@contextmanager
def _hidden_directory(out: Path, ending: str) -> Iterator[Path]:
    """.NAME.ending beside ``out``, locked while the block runs and gone after it, unless the block moved it away."""
    hidden = out.parent / f".{out.name}.{ending}"
    hidden.parent.mkdir(parents=True, exist_ok=True)
    if hidden.exists():
        _remove_stale(hidden, out)
    hidden.mkdir()
    lock = os.open(hidden, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def refuse_existing(out: Path) -> None:
    """`InputError` where ``out`` is a file or a directory with something in it."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is there already and not empty; remove it or name another directory with -o")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is a file or a link; -o names the directory to write")
    if out.resolve() == Path.cwd():
        raise InputError(f"{out}: is the directory this runs in; name a new one with -o")


def refuse_full_disk(out: Path, needed: int, scratch: int = 0) -> None:
    """`InputError` where the disk of ``out`` has less than ``needed`` + ``scratch`` bytes free."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free, total = shutil.disk_usage(folder).free, needed + scratch + SPARE_BYTES
    if total > free:
        raise InputError(
            f"{out}: the disk has {free / 2**20:,.0f} MiB free and {total / 2**20:,.0f} MiB are needed "
            f"({scratch / 2**20:,.0f} of them only while it runs); free some, or name another disk with -o"
        )


def _remove_stale(partial: Path, out: Path) -> None:
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial)
    except BlockingIOError:
        raise InputError(f"{out}: another process is writing it right now") from None
    finally:
        os.close(lock)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(path)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_manifest(directory: Path, manifest: dict) -> None:
    """Put llmlite.json into a directory, replacing one that is there in a single step."""
    temporary = directory / f".{MANIFEST}.new"
    with open(temporary, "w") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / MANIFEST)
    _flush_directory(directory)


def read_manifest(directory: Path) -> dict | None:
    """llmlite.json of a directory, None where there is none; `InputError` where it is not JSON."""
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: is not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{file}: is not a JSON object")
    return manifest


def sha256_of(file: Path) -> str:
    """The hexadecimal digest of a file's bytes."""
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
