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

from llmlite.errors import InputError, WriteError

MANIFEST = "llmlite.json"
JOURNAL = ".journal.json"  # in a partial directory that another run can go on with
TRAINING = ".training-"  # begins the names of what a trainer goes on from, files and folders; no artifact has them
GGUF_FILE = "model.gguf"  # the weights of a GGUF artifact
DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SPARE_BYTES = 16 * 2**20  # for configs, tokenizer and the file system's own needs


@contextmanager
def atomic_directory(out: Path, resume: bool = False) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Every file is flushed to the disk before the rename. What a killed run left behind is removed by the next
    run with the same ``out``, or with ``resume`` handed to it as it is; a directory that a live process still holds is
    neither. An interrupt or a full disk (`WriteError`) leaves a directory with a journal (`JOURNAL`) where it is.
    Raises `InputError` if ``out`` exists and is not an empty directory, or if another process is writing it.
    """
    refuse_existing(out)
    out = out.resolve()
    with _hidden_directory(out, "partial", resume) as partial:
        try:
            yield partial
            _flush(partial)
            (partial / JOURNAL).unlink(missing_ok=True)
            for left in partial.glob(f"{TRAINING}*"):
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            partial.rename(out)  # an empty directory in its place is replaced
            flush_directory(out.parent)
        except WriteError as error:  # of what is written inside this directory; the user knows this one
            raise _cannot_write(out, error.reason, partial) from None
        except OSError as error:
            if error.errno in DISK_FAILED:
                raise _cannot_write(out, str(error.strerror), partial) from None
            raise


def _cannot_write(out: Path, reason: str, partial: Path) -> WriteError:
    """What ends a run that the disk has no room for; the directory ``partial`` stays if there is a journal in it."""
    kept = (partial / JOURNAL).is_file()
    left = "what is done is kept, and --resume goes on with it" if kept else "nothing of it was kept"
    return WriteError(reason, f"{out}: can't be written ({reason}); {left}")


def partial_of(out: Path) -> Path:
    """Where `atomic_directory` keeps what is to become ``out``."""
    return _hidden(out.resolve(), "partial")


@contextmanager
def scratch_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` for as long as the block runs; a killed run's is removed by the next one."""
    with _hidden_directory(out.resolve(), "scratch") as scratch:
        yield scratch


def _hidden(out: Path, ending: str) -> Path:
    return out.parent / f".{out.name}.{ending}"


@contextmanager
def _hidden_directory(out: Path, ending: str, resume: bool = False) -> Iterator[Path]:
    """.NAME.ending beside ``out``, locked while the block runs and gone after it, unless the block moved it away."""
    hidden = _hidden(out, ending)
    hidden.parent.mkdir(parents=True, exist_ok=True)
    if hidden.exists() and not resume:
        _remove_stale(hidden, out)
    hidden.mkdir(exist_ok=resume)
    lock = os.open(hidden, os.O_RDONLY)
    try:
        _lock(lock, out)
        try:
            yield hidden
        except (KeyboardInterrupt, WriteError):
            if not (hidden / JOURNAL).is_file():
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        shutil.rmtree(hidden, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another process is writing it right now") from None


def refuse_existing(out: Path) -> None:
    """`InputError` where ``out`` is a file or a directory with something in it."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is there already and not empty; remove it or name another directory with -o")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is a file or a link; -o names the directory to write")
    if out.resolve() == Path.cwd():
        raise InputError(f"{out}: is the directory this runs in; name a new one with -o")


def refuse_full_disk(out: Path, needed: int, scratch: int = 0) -> None:
    """`InputError` where the disk of ``out`` has less than ``needed`` + ``scratch`` bytes free.

    What an unfinished run with the same ``out`` holds counts as free: it is removed, or gone on with.
    """
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    left = sum(file.stat().st_blocks * 512 for file in partial_of(out).rglob("*") if file.is_file())
    free, total = shutil.disk_usage(folder).free + left, needed + scratch + SPARE_BYTES
    if total > free:
        raise InputError(
            f"{out}: the disk has {free / 2**20:,.0f} MiB free and {total / 2**20:,.0f} MiB are needed "
            f"({scratch / 2**20:,.0f} of them only while it runs); free some, or name another disk with -o"
        )


def _remove_stale(partial: Path, out: Path) -> None:
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, out)
        shutil.rmtree(partial)
    finally:
        os.close(lock)


def _flush(directory: Path) -> None:
    """Put on the disk for good what stays in the artifact."""
    for path in directory.iterdir():
        if path.is_dir() and not path.name.startswith(TRAINING):
            _flush(path)
        elif path.is_file() and not path.name.startswith(TRAINING):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    flush_directory(directory)


def flush_directory(directory: Path) -> None:
    """What was renamed into or out of a directory is on the disk when this returns."""
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_manifest(directory: Path, manifest: dict) -> None:
    """Put llmlite.json into a directory, replacing one that is there in a single step."""
    write_json(directory / MANIFEST, manifest)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, or replace it, in a single step that is on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    flush_directory(path.parent)


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


def origin_sha256(directory: Path) -> str | None:
    """The digest of the config.json of the model that an artifact was made from by rounding alone, or None.

    An import of an artifact's GGUF file is told by it what that one was made from. A merge and a student are models of
    their own.
    """
    manifest = read_manifest(directory) or {}
    base, kind = manifest.get("base"), manifest.get("kind")
    if not isinstance(base, dict):
        return None
    if kind == "artifact" and "adapter" not in manifest:
        return base.get("config_sha256")
    return base.get("origin_config_sha256") if kind == "import" else None


def sha256_of(file: Path) -> str:
    """The hexadecimal digest of a file's bytes."""
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
