"""Prefixes that left their slot: keys and values in host memory, behind them on disk, each within a limit.

A file of the store holds, little endian: the letters ``LLKV``, uint32 length of a JSON header, the header (fingerprint,
adapter, number of tokens, SHA-256 of the rest), the token ids as int32, the state as the engine gave it. It is written
under another name and renamed when it is whole. The fingerprint stands for everything that the state depends on:
weights, positions' scaling, types of keys and values, the engine's version. Files of another fingerprint are not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import struct
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlite.errors import InputError

log = logging.getLogger("llmlite.serve")

LETTERS = b"LLKV"
ENDING = ".kv"
MOST_HEADER = 65536
HEADER = {"fingerprint": str, "adapter": str | None, "tokens": int, "sha256": str}
ON_DISK = 128
"""Fewer tokens than this are not worth a file."""

PENDING = 16
"""States that may wait, in memory, to be written; on a disk that is slower than that, others get no file."""

FORSAKEN = 3600.0
"""Seconds after which nobody is still writing a partial file."""


@dataclass(eq=False)
class Prefix:
    """A stored prefix: its token ids int32 [n]; ``state`` None: it is on disk alone; ``file`` None: it is not there.

    ``pending``: it is about to be written, and stays in memory until then.
    """

    tokens: np.ndarray
    adapter: str | None
    size: int
    state: bytes | None = None
    file: Path | None = None
    pending: bool = False


@dataclass(frozen=True)
class Match:
    """A prefix and how many of its tokens a prompt begins with."""

    prefix: Prefix
    length: int


class PrefixStore:
    """Used by the engine's thread alone, but for `close`; files are written by a thread of the store's own.

    ``memory`` and ``disk``: most bytes there, at the start with the files of other stores in the folder; ``folder``
    None: nothing goes to disk; ``whole``: a state is of use with all of its tokens or not at all, as nothing can be
    cut off.
    """

    def __init__(
        self, fingerprint: str, memory: int, folder: Path | None = None, disk: int = 0, whole: bool = False
    ) -> None:
        self.fingerprint = fingerprint
        self._use_whole = whole
        self.hits = 0
        self._most_memory = memory
        self._most_disk = disk if folder is not None else 0
        self._folder = folder
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()  # least used first
        self._lock = threading.Lock()
        self._to_write: queue.Queue[Prefix | None] = queue.Queue(PENDING)
        self._writer: threading.Thread | None = None
        if folder is not None and disk:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._read_folder(folder)
            except OSError as error:
                raise InputError(f"cache_dir {folder}: can't be used ({error.strerror or error})") from None
            self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
            self._writer.start()

    def find(self, ids: np.ndarray, adapter: str | None) -> Match | None:
        """The stored prefix that shares most tokens with a prompt.

        Where states are of use only whole, at least the prompt's last token is left over.
        """
        best: Match | None = None
        with self._lock:
            prefixes = [prefix for prefix in self._known.values() if prefix.adapter == adapter]
        for prefix in prefixes:
            if best is not None and len(prefix.tokens) <= best.length:
                continue
            length = common_length(prefix.tokens, ids)
            if self._use_whole and (length < len(prefix.tokens) or length == len(ids)):
                continue
            if length and (best is None or length > best.length):
                best = Match(prefix, length)
        return best

    def has(self, tokens: np.ndarray, adapter: str | None) -> bool:
        """Whether these tokens are stored, alone or as the beginning of a longer prefix that will do as well."""
        if self._use_whole:
            return _key(tokens, adapter) in self._known
        match = self.find(tokens, adapter)
        return match is not None and match.length == len(tokens)

    def take(self, match: Match) -> bytes | None:
        """The state of all of a found prefix's tokens, which counts as used; None where its file can't be read."""
        prefix = match.prefix
        with self._lock:
            state, file = prefix.state, prefix.file
        if state is None:
            state = None if file is None else _read_state(file, self.fingerprint)
            if state is None:
                self._forget(prefix)
                return None
            prefix.state = state
        with self._lock:
            key = _key(prefix.tokens, prefix.adapter)
            if key in self._known:
                self._known.move_to_end(key)
        self.hits += 1
        self._trim()
        return state

    def put(self, tokens: np.ndarray, adapter: str | None, state: bytes) -> None:
        """Keep a prefix. Shorter ones that it begins with are dropped, as the longer one has them, too."""
        if len(state) > max(self._most_memory, self._most_disk):
            return
        prefix = Prefix(np.array(tokens, np.int32), adapter, len(state), state)
        with self._lock:
            covered = [
                known
                for known in self._known.values()
                if not self._use_whole
                and known.adapter == adapter
                and common_length(known.tokens, prefix.tokens) == len(known.tokens)
            ]
            self._known[_key(prefix.tokens, adapter)] = prefix
        for known in covered:
            self._forget(known)
        if self._writer is not None and len(tokens) >= ON_DISK:
            prefix.pending = True
            try:
                self._to_write.put_nowait(prefix)
            except queue.Full:
                prefix.pending = False
        self._trim()

    def sizes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        with self._lock:
            known = list(self._known.values())
        return sum(p.size for p in known if p.state is not None), sum(p.size for p in known if p.file is not None)

    def close(self) -> None:
        """Wait until everything that is to be on disk is there."""
        if self._writer is not None:
            self._to_write.put(None)
            self._writer.join()
            self._writer = None

    def _trim(self) -> None:
        """Keep within the limits: states leave memory first, then prefixes are forgotten, least used ones first."""
        memory, disk = self.sizes()
        with self._lock:
            known = list(self._known.values())
        for prefix in known:
            if memory <= self._most_memory and disk <= self._most_disk:
                return
            if prefix.state is not None and memory > self._most_memory:
                if prefix.pending:
                    continue
                prefix.state = None
                memory -= prefix.size
            gone = prefix.state is None and prefix.file is None
            if gone or (prefix.file is not None and disk > self._most_disk):
                disk -= prefix.size if prefix.file is not None else 0
                self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        with self._lock:
            key = _key(prefix.tokens, prefix.adapter)
            if self._known.get(key) is prefix:
                del self._known[key]
            file, prefix.file, prefix.state = prefix.file, None, None
        if file is not None:
            _remove(file)

    def _read_folder(self, folder: Path) -> None:
        """Know what is there. Files of other stores are left alone as long as all of them keep to the limit."""
        taken, others = 0, []
        for file, facts in _by_age(folder, ENDING):
            taken += facts.st_size
            found = _read_prefix(file, self.fingerprint)
            if found is None:
                others.append((file, facts.st_size))
            else:
                self._known[_key(found.tokens, found.adapter)] = found
        for file, size in others:
            if taken > self._most_disk:
                _remove(file)
                taken -= size
        for partial, facts in _by_age(folder, ".partial"):
            if facts.st_mtime < time.time() - FORSAKEN:
                _remove(partial)
        self._trim()

    def _write_all(self) -> None:
        assert self._folder is not None
        while (prefix := self._to_write.get()) is not None:
            state = prefix.state
            if state is None:  # forgotten while it waited
                continue
            file = None
            try:
                file = _write(self._folder, self.fingerprint, prefix, state)
            except OSError as error:  # a full disk costs a later reuse, no answer
                log.warning("a prefix can't be kept on disk: %s", error)
            with self._lock:
                prefix.pending = False
                forgotten = prefix.state is None
                prefix.file = None if forgotten else file
            if forgotten and file is not None:
                _remove(file)
            self._trim()


def _key(tokens: np.ndarray, adapter: str | None) -> bytes:
    return hashlib.sha256(f"{adapter}\0".encode() + tokens.tobytes()).digest()


def _by_age(folder: Path, ending: str) -> list[tuple[Path, os.stat_result]]:
    """The folder's files, longest unused first. Other processes may take some away at any time."""
    found = []
    for file in folder.glob(f"*{ending}"):
        with suppress(FileNotFoundError):
            found.append((file, file.stat()))
    return sorted(found, key=lambda pair: pair[1].st_mtime)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # it costs room on the disk, no answer
        log.warning("%s can't be removed: %s", file, error)


def common_length(one: np.ndarray | list[int], other: np.ndarray | list[int]) -> int:
    """How many token ids two rows have in common from the start."""
    most = min(len(one), len(other))
    unequal = np.flatnonzero(np.asarray(one[:most], np.int32) != np.asarray(other[:most], np.int32))
    return int(unequal[0]) if len(unequal) else most


def _write(folder: Path, fingerprint: str, prefix: Prefix, state: bytes) -> Path:
    tokens = prefix.tokens.astype("<i4").tobytes()
    header = {
        "fingerprint": fingerprint,
        "adapter": prefix.adapter,
        "tokens": len(prefix.tokens),
        "sha256": hashlib.sha256(tokens + state).hexdigest(),
    }
    text = json.dumps(header).encode()
    name = hashlib.sha256(fingerprint.encode() + _key(prefix.tokens, prefix.adapter)).hexdigest()[:32]
    file = folder / f"{name}{ENDING}"
    partial = folder / f"{name}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as out:
            out.write(LETTERS + struct.pack("<I", len(text)) + text + tokens)
            out.write(state)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _read_header(file: Path, fingerprint: str) -> tuple[dict, int] | None:
    """The header of a file of this fingerprint and where it ends; None for any other file."""
    try:
        with open(file, "rb") as source:
            start = source.read(8)
            if len(start) < 8 or start[:4] != LETTERS:
                return None
            (length,) = struct.unpack("<I", start[4:])
            header = json.loads(source.read(length)) if length <= MOST_HEADER else None
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("fingerprint") != fingerprint or header.keys() != HEADER.keys():
        return None
    if not all(isinstance(header[name], kind) for name, kind in HEADER.items()) or header["tokens"] < 1:
        return None
    return header, 8 + length


def _read_prefix(file: Path, fingerprint: str) -> Prefix | None:
    found = _read_header(file, fingerprint)
    if found is None:
        return None
    header, place = found
    count = header["tokens"]
    try:
        size = file.stat().st_size - place - 4 * count
        with open(file, "rb") as source:
            source.seek(place)
            data = source.read(4 * count) if size > 0 else b""
    except OSError:
        return None
    if size <= 0:
        _remove(file)
        return None
    return Prefix(np.frombuffer(data, "<i4").astype(np.int32), header["adapter"], size, None, file)


def _read_state(file: Path, fingerprint: str) -> bytes | None:
    found = _read_header(file, fingerprint)
    if found is None:
        return None
    header, place = found
    try:
        data = file.read_bytes()[place:]
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != header["sha256"]:
        log.warning("%s is damaged and is not used", file.name)
        return None
    with suppress(OSError):  # it may be another user's file, or gone by now
        os.utime(file)
    return data[4 * header["tokens"] :]
