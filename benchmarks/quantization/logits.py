"""The base's log-probabilities in the file that llama-perplexity reads with --kl-divergence-base.

llama-perplexity can write that file itself, but only of a text in which the names of special tokens are plain text,
which makes no chat. Here llama.cpp, through llama-cpp-python, computes the logits of given token rows.

The file, as tools/perplexity/perplexity.cpp of llama.cpp reads it, little endian: the letters ``_logits_``; uint32
row length n; int32 vocabulary v and rows r; int32 token ids [r, n]; for each row the n - 1 - n // 2 predictions that
are scored, those made from position n // 2 on: uint16 [2 * ((v + 1) // 2) + 4], the first four of them the two float32
step s and least log-probability m, then codes c with log p = s * c + m. Logits more than 16 below the best get code 0.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.progress import track

DEEPEST = np.float32(16)
CODES = 65535


def write_logits(file: Path, model: Path, rows: np.ndarray, threads: int) -> None:
    """Run ``model``, a GGUF file, over ``rows`` int64 [r, n] and write what it predicts."""
    count, length = rows.shape
    llama = Llama(model, LlamaSettings(length, batch=length, outputs=length, threads=threads))
    first = length // 2
    wanted = np.arange(length) >= first
    try:
        with open(file, "wb") as out:
            out.write(b"_logits_" + struct.pack("<Iii", length, llama.vocab_size, count))
            out.write(rows.astype("<i4").tobytes())
            for row in track(rows, file.name, count):
                llama.clear()
                logits = llama.decode(row, 0, wanted)[: length - 1 - first]
                out.write(encode(logits).tobytes())
    finally:
        llama.close()


def encode(logits: np.ndarray) -> np.ndarray:
    """The file's uint16 [rows, ...] of logits float32 [rows, vocab]."""
    rows, vocabulary = logits.shape
    most = logits.max(axis=1, keepdims=True)
    least = np.maximum(logits.min(axis=1, keepdims=True), most - DEEPEST)
    log_sum = np.log(np.exp(logits - most).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    step = (most - least) / np.float32(CODES)
    out = np.zeros((rows, 2 * ((vocabulary + 1) // 2) + 4), np.uint16)
    out[:, :2] = step.astype("<f4").view(np.uint16)
    out[:, 2:4] = (least - most - log_sum).astype("<f4").view(np.uint16)
    codes = np.rint((logits - least) * (np.float32(1) / np.where(step > 0, step, 1)))
    out[:, 4 : 4 + vocabulary] = np.clip(codes, 0, CODES)
    return out


def read_rows(file: Path) -> np.ndarray:
    """The token ids int64 [r, n] of such a file."""
    with open(file, "rb") as source:
        letters, length, _, count = struct.unpack("<8sIii", source.read(20))
        assert letters == b"_logits_", file
        return np.frombuffer(source.read(4 * length * count), "<i4").reshape(count, length).astype(np.int64)
