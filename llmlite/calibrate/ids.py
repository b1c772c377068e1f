"""Calibration rows that are token ids already, in a .npy file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from llmlite.calibrate.rows import Rows
from llmlite.errors import InputError


def read_ids(file: str) -> Rows:
    """An integer array [rows, length] of token ids; `InputError` for anything else (no pickled objects are read)."""
    try:
        ids = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{file}: is not a .npy array of numbers ({error})") from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size or ids.min() < 0:
        raise InputError(f"{file}: token ids in rows, integers [rows, length] of at least 0, are right")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    source = {"source": file, "sha256": digest, "rows": len(ids), "tokens": ids.size}
    return Rows(ids.astype(np.int64), (source,))
