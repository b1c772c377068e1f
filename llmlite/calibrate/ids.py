"""Calibration rows that are token ids already, in a .npy file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from llmlite.calibrate.rows import Rows
from llmlite.errors import InputError


def read_ids(file: str) -> Rows:
    """An integer array [rows, length] of token ids; `InputError` for anything else (no pickled objects are read)."""
    try:
        ids = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (ValueError, EOFError, IsADirectoryError, BadZipFile) as error:
        raise InputError(f"{file}: is not a .npy array of numbers ({error})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise InputError(f"{file}: token ids in rows, integers [rows, length], are right")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise InputError(f"{file}: token ids in rows, integers [rows, length] of at least 0, are right")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    source = {"source": file, "sha256": digest, "rows": len(ids), "tokens": ids.size}
    return Rows(ids.astype(np.int64), (source,))
