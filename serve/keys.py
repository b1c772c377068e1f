"""API keys: a file with a line for each, which holds no key but its hash."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from llmlite.errors import InputError
from llmlite.serve.limits import Caller, Limits

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LINE = re.compile(rf"({NAME.pattern}):sha256:([0-9a-f]{{32}}):([0-9a-f]{{64}})")
SHORTEST = 24
"""Characters of a key that somebody brings along; one made here has 256 bits in 43 characters and a prefix."""


@dataclass(frozen=True)
class StoredKey:
    """One line of the file.

    The hash is a single salted SHA-256: a key is a long random string, so there is no dictionary to try and a slow
    hash would protect nothing, but cost every request its time and give strangers a way to keep the server busy.
    """

    name: str
    salt: bytes
    digest: bytes
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, name: str, key: str, limits: Limits) -> StoredKey:
        """Raises `InputError` for a name or a key that won't do."""
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name for a key: up to 64 letters, digits and . _ @ - are right")
        if len(key) < SHORTEST or not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(f"the key must have at least {SHORTEST} printable ASCII characters and no space")
        salt = secrets.token_bytes(16)
        return cls(name, salt, _digest(salt, key.encode()), limits)

    @classmethod
    def read(cls, line: str, where: str) -> StoredKey:
        """Raises `InputError` that begins with ``where``."""
        head, *words = line.split()
        match = LINE.fullmatch(head)
        if match is None:
            # The line may be a key in plain text, so it is not repeated: this sentence ends up in logs.
            raise InputError(
                f"{where}: is not NAME:sha256:SALT:HASH; `llmlite key NAME -o FILE` makes such a line, and with "
                "--from-stdin of a key that you have: plain keys are not taken, for this file gets into backups"
            )
        return cls(match[1], bytes.fromhex(match[2]), bytes.fromhex(match[3]), _read_limits(words, where))

    def __str__(self) -> str:
        limits = [f"{_word(name)}={value}" for name, value in vars(self.limits).items() if value is not None]
        return " ".join([f"{self.name}:sha256:{self.salt.hex()}:{self.digest.hex()}", *limits])

    def fits(self, offered: bytes) -> bool:
        return hmac.compare_digest(_digest(self.salt, offered), self.digest)


class Keyring:
    """The keys that a server knows and their callers. Used on the event loop."""

    def __init__(self, stored: Sequence[StoredKey], file: Path | None = None) -> None:
        self._file = file
        self._stored = list(stored)
        self._callers = {key.name: Caller(key.name, key.limits) for key in stored}

    @classmethod
    def read(cls, file: Path) -> Keyring:
        """Raises `InputError` for a file that can't be used."""
        return cls(read_keys(file), file)

    def __len__(self) -> int:
        return len(self._stored)

    def find(self, offered: Iterable[str]) -> Caller | None:
        """Whose key is among those offered. Every key is compared with each, whichever fits: time tells nothing."""
        found: StoredKey | None = None
        for text in offered:
            data = text.encode()
            for key in self._stored:
                if key.fits(data):
                    found = key
        return None if found is None else self._callers[found.name]

    def reload(self) -> None:
        """Read the file again. Raises `InputError` where it is broken; the old keys then stay.

        Requests that run with a key that is gone go on. Callers keep what they have used.
        """
        if self._file is None:
            return
        stored = read_keys(self._file)
        callers = {}
        for key in stored:
            caller = callers[key.name] = self._callers.get(key.name) or Caller(key.name, key.limits)
            caller.change(key.limits)
        self._stored, self._callers = stored, callers


def new_key() -> str:
    """256 random bits, behind a prefix by which scanners of leaked secrets can know it."""
    return f"llmlite-{secrets.token_urlsafe(32)}"


def read_keys(file: Path) -> list[StoredKey]:
    """The keys of a file, of which there is one at least. Raises `InputError`."""
    keys = _lines(file)
    if not keys:
        raise InputError(f"{file}: holds no API key; `llmlite key NAME -o {file}` adds one")
    return keys


def _lines(file: Path) -> list[StoredKey]:
    """Empty lines and those that begin with # are passed over."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read as a file of API keys ({error})") from None
    keys: list[StoredKey] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            keys.append(StoredKey.read(line, f"{file}, line {number}"))
            if keys[-1].name in [key.name for key in keys[:-1]]:
                raise InputError(f"{file}, line {number}: there is a key of the name {keys[-1].name!r} already")
    return keys


def add_key(file: Path, key: StoredKey) -> None:
    """Append a line. A new file is its owner's alone to read. Raises `InputError` for a name that is there."""
    text = file.read_bytes() if file.exists() else b""
    if text and key.name in [old.name for old in _lines(file)]:
        raise InputError(f"{file}: there is a key of the name {key.name!r} already; delete its line to replace it")
    before = "" if text.endswith(b"\n") or not text else "\n"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as out:
        out.write(f"{before}{key}\n")


def _digest(salt: bytes, key: bytes) -> bytes:
    return hashlib.sha256(salt + key).digest()


def _word(name: str) -> str:
    return name.replace("_", "-")


def _read_limits(words: list[str], where: str) -> Limits:
    known = {_word(item.name): item.name for item in fields(Limits)}
    limits: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known or not (value.isascii() and value.isdigit() and 0 < int(value) < 10**12):
            right = ", ".join(f"{name}=N" for name in known)
            raise InputError(f"{where}: {word!r} is no limit; {right} are right, N at least 1")
        limits[known[name]] = int(value)
    return Limits(**limits)
