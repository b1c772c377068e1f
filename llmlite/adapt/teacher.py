"""What the base predicts for some rows of text, computed once and kept on disk, and the divergence from it.

Of every position the ``top`` likeliest tokens are kept by name and all others as one: the Kullback-Leibler divergence
over these top + 1 outcomes is at most the whole one (log sum inequality), and equal to it where the others' shares
among themselves are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.adapt.losses import soft_capped
from llmlite.calibrate.moments import HELD_EVERY
from llmlite.calibrate.stream import LayerStream
from llmlite.checkpoint.checkpoint import Checkpoint, meta_model
from llmlite.checkpoint.families import FINAL_NORM
from llmlite.progress import track

BATCH_TOKENS = 2048
LOGIT_ROWS = 128  # positions whose logits over the vocabulary are held at a time


def held_rows(rows: int, most: int) -> list[int]:
    """The rows that judge: every eighth, ``most`` of them spread over the text."""
    held = np.arange(HELD_EVERY - 1, rows, HELD_EVERY)
    return held[np.unique(np.linspace(0, len(held) - 1, min(len(held), most)).round().astype(int))].tolist()


def trained_rows(rows: int) -> list[int]:
    """The rows of which none ever judges."""
    return [row for row in range(rows) if row % HELD_EVERY != HELD_EVERY - 1]


class Teacher:
    """The base's predictions on disk: for each row int32 [length, top] token ids and float32 [length, top + 1] log-
    probabilities, that of all other tokens together last. ``reopen``: those that an earlier run has written.
    """

    def __init__(self, folder: Path, rows: int, length: int, top: int, *, reopen: bool = False):
        self.rows, self._shape = rows, (length, top)
        self._ids, self._logs = folder / ".teacher-ids", folder / ".teacher-logs"
        if not reopen:
            self._ids.write_bytes(b"")
            self._logs.write_bytes(b"")

    def add(self, ids: torch.Tensor, logs: torch.Tensor) -> None:
        """Append positions: token ids [n, top] and log-probabilities [n, top + 1]."""
        for file, part, dtype in ((self._ids, ids, np.int32), (self._logs, logs, np.float32)):
            with open(file, "ab") as sink:
                sink.write(part.cpu().numpy().astype(dtype).tobytes())

    def read(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 [length, top] and log-probabilities float32 [length, top + 1] of one row."""
        length, top = self._shape
        found = []
        for file, dtype, width in ((self._ids, np.int32, top), (self._logs, np.float32, top + 1)):
            count = length * width
            part = np.fromfile(file, dtype=dtype, count=count, offset=row * count * 4)
            found.append(torch.from_numpy(part.reshape(length, width)))
        return found[0].long(), found[1]


def disk_needed(rows: int, length: int, top: int, hidden: int) -> int:
    """Bytes that `teach` puts into its folder at most."""
    return rows * length * (2 * top + 1 + hidden) * 4


def teach(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    folder: Path,
    top: int,
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    vocabulary: torch.Tensor | None = None,
) -> Teacher:
    """The base's predictions for token rows int64 [rows, length], one decoder layer in memory at a time.

    ``dtype``: what the layers compute in; ``temperature``: what the logits are divided by; ``vocabulary`` int64
    [tokens]: the base's ids of the tokens that are predicted, renumbered in this order; all where None.
    """
    rows, length = ids.shape
    batch = max(BATCH_TOKENS // length, 1)
    stream = LayerStream(checkpoint, device, dtype)
    hidden = stream.through(ids, folder / ".teacher-hidden", batch, "base's predictions")
    logits = output_head(checkpoint, device, vocabulary, dtype)
    size = len(vocabulary) if vocabulary is not None else checkpoint.config["vocab_size"]
    teacher = Teacher(folder, rows, length, min(top, size - 1))
    with torch.no_grad():
        for row in track(range(rows), "base's likeliest tokens"):
            for part in hidden.read(row, 1)[0].split(LOGIT_ROWS):
                logs = torch.log_softmax(logits(part.to(device)) / temperature, -1)
                best = logs.topk(min(top, size - 1), -1, sorted=False)
                teacher.add(best.indices, with_rest(logs, best.indices))
    hidden.remove()
    return teacher


def output_head(
    checkpoint: Checkpoint, device: str, vocabulary: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits float32 [n, vocabulary] of the last layer's outputs [n, hidden]: the final norm and the head.

    ``vocabulary`` int64: the token ids whose logits are wanted, all where None. ``dtype``: what the product is
    computed in.
    """
    decoder: Any = meta_model(checkpoint.config, checkpoint.source).model
    norm = decoder.norm
    norm.load_state_dict({"weight": checkpoint.read(FINAL_NORM).to(device, torch.float32)}, assign=True)
    head = checkpoint.read(checkpoint.head).to(device, dtype)
    if vocabulary is not None:
        head = head[vocabulary.to(device)]
    return lambda states: logits_of(norm(states).to(dtype), head, checkpoint).float()


def logits_of(hidden: torch.Tensor, head: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """Logits [n, vocabulary] of final hidden states [n, hidden] after the last norm."""
    return soft_capped(hidden @ head.T, checkpoint.config)


def with_rest(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, top + 1] of the tokens ``ids`` [n, top], and of all others together."""
    rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, ids), rest], -1)
