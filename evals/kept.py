"""A base's predictions on disk: computed once, and used for every artifact that was made from it.

A directory per base, text, protocol and engine (see `key_of`) holds ``facts.json`` and ``rows.bin``, the scored
positions of all windows one after another. Two encodings:

- ``hidden``: what the output head takes in, [width] of the model's dtype per position; the head's weights are read
  from the base again. Nothing is lost: the log-probabilities are the same bits, the floor added to KL is 0. A
  position of a model of width 576 in float32 takes 2.3 kB where float16 rows of its 49,152 tokens take 98 kB.
- ``codes``: log-probabilities as 16-bit codes, for engines that give no hidden states (llama.cpp) and for heads that
  are more than one stored matrix. With the best token's log-probability m and the range r down to the worst one's,
  code c stands for m - r (c / 65535)**2, and the row is normalized again: steps are finest where probability lies.
  At r = 40 the error of ln p is at most 3e-4 for a token of probability 0.01. The error of KL is of first order in
  it and changes its sign from token to token: below 1% of a position's KL and below 0.1% of the mean at a mean KL of
  0.001; what it adds to two equal models is below 1e-6 (both held by tests). 8 bytes + 2 per token of the vocabulary
  and position; no token is left out or clipped, unless its ln p is more than 80 below the best one's.

A directory appears under its name when it is complete and flushed; a run that was killed leaves a hidden partial
one, which the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch

from llmlite.checkpoint.artifact import SPARE_BYTES, atomic_directory, write_json
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import OutsideError
from llmlite.evals.engines import ROWS, Head
from llmlite.evals.perplexity import Window

FORMAT = 1  # of the files; another one is never read
FACTS, BODY = "facts.json", "rows.bin"
CODES = 65535
DEEPEST = 80.0
ROW_HEAD = 8  # bytes: float32 log-probability of code 0, float32 factor of c**2


@dataclass(frozen=True)
class Facts:
    """What must be known to read the rows back.

    ``width``: numbers of a row; ``dtype``: theirs ("uint16" for codes); ``head``: the stored tensor that makes
    log-probabilities of hidden states, with its ``softcap``.
    """

    encoding: Literal["hidden", "codes"]
    width: int
    dtype: str
    vocab_size: int
    known_tokens: int
    head: str | None = None
    softcap: float | None = None

    @property
    def row_bytes(self) -> int:
        return ROW_HEAD + 2 * self.width if self.encoding == "codes" else self.width * _dtype(self.dtype).itemsize


def key_of(base: str, engine: str, windows: Sequence[Window]) -> str:
    """What the predictions depend on, hexadecimal: the base's digest, the engine with its version and device, the
    token ids, and which of them are scored."""
    total = hashlib.sha256(json.dumps([FORMAT, ROWS, base, engine, len(windows)]).encode())
    for window in windows:
        total.update(np.array([len(window.tokens), window.first], "<i8").tobytes())
        total.update(window.tokens.astype("<i8").tobytes())
    return total.hexdigest()[:40]


class Store:
    """A directory of kept predictions. It may be deleted at any time."""

    def __init__(self, directory: Path):
        self.directory = directory

    def find(self, key: str, windows: Sequence[Window], base: Path) -> Kept | None:
        """The predictions of that key, None where there are none; ``base``: where the head's weights lie."""
        folder = self.directory / key
        if not (folder / FACTS).is_file():
            return None
        try:
            facts = Facts(**json.loads((folder / FACTS).read_text()))
        except (ValueError, TypeError):
            raise OutsideError(f"{folder / FACTS}: can't be read (file system damaged?): delete {folder}") from None
        needed = facts.row_bytes * sum(window.scored for window in windows)
        if not (folder / BODY).is_file() or (folder / BODY).stat().st_size != needed:
            raise OutsideError(f"{folder}: is not what was written there (file system damaged?): delete it")
        return Kept(folder / BODY, facts, windows, base)

    @contextmanager
    def writing(self, key: str, facts: Facts, windows: Sequence[Window]) -> Iterator[Writer]:
        """Take in the rows of all windows in order; they are kept if the block ends well.

        `OutsideError` where the disk is too small or fails, `InputError` where another process writes the same.
        """
        needed = facts.row_bytes * sum(window.scored for window in windows)
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if needed + SPARE_BYTES > free:
            raise OutsideError(
                f"{self.directory}: the base's predictions take {needed / 2**20:,.0f} MiB and the disk has "
                f"{free / 2**20:,.0f} MiB free; name another directory with --cache, or go without by --no-cache"
            )
        with atomic_directory(self.directory / key) as partial:
            with open(partial / BODY, "wb") as file:
                yield Writer(file)
                written = file.tell()
            assert written == needed, f"{written} bytes where {needed} were expected"
            write_json(partial / FACTS, asdict(facts))


class Writer:
    """Appends rows to a file that is being made."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def hidden(self, rows: torch.Tensor) -> None:
        """Hidden states [n, width], in their dtype."""
        self._file.write(rows.cpu().contiguous().view(torch.uint8).numpy().data)

    def codes(self, log_probs: torch.Tensor) -> None:
        """One chunk of log-probabilities float32 [n, vocab]."""
        heads, codes = encode(log_probs)
        self._file.write(heads.data)
        self._file.write(codes.data)


class Kept:
    """Predictions read back, window by window."""

    def __init__(self, file: Path, facts: Facts, windows: Sequence[Window], base: Path):
        self.facts, self.windows = facts, windows
        self.vocab_size, self.known_tokens = facts.vocab_size, facts.known_tokens
        self._file = open(file, "rb")  # noqa: SIM115 - closed by close()
        self._starts = np.cumsum([0, *(window.scored for window in windows)]) * facts.row_bytes
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._head = self._open_head(base) if facts.encoding == "hidden" else None

    def _open_head(self, base: Path) -> Head:
        assert self.facts.head is not None
        weight = read_index(base)[self.facts.head].read().to(self._device, _dtype(self.facts.dtype))
        return Head(lambda hidden: torch.nn.functional.linear(hidden, weight), self.facts.softcap)

    def rows(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The scored predictions of a window, as `engines.Engine.log_probs` gives them."""
        window = self.windows[number]
        self._file.seek(int(self._starts[number]))
        if self._head is not None:
            data = np.fromfile(self._file, np.uint8, window.scored * self.facts.row_bytes)
            hidden = torch.from_numpy(data).view(_dtype(self.facts.dtype)).view(-1, self.facts.width)
            yield from self._head.log_probs(hidden.to(self._device), window.first)
            return
        for start in range(0, window.scored, ROWS):
            count = min(ROWS, window.scored - start)
            heads = np.fromfile(self._file, np.float32, 2 * count).reshape(count, 2)
            codes = np.fromfile(self._file, np.uint16, count * self.facts.width).reshape(count, -1)
            yield window.first + start, decode(heads, codes).to(self._device)

    def close(self) -> None:
        self._file.close()


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@torch.inference_mode()
def encode(log_probs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, vocab] as (float32 [n, 2], uint16 codes [n, vocab]) by the module's text."""
    best = log_probs.amax(dim=-1, keepdim=True)
    depth = best - log_probs
    span = depth.clamp_(max=DEEPEST).amax(dim=-1, keepdim=True)
    codes = depth.mul_(torch.where(span > 0, CODES**2 / span, 0)).sqrt_().round_()
    factor = span / CODES**2
    whole = codes.to(torch.uint16)
    log_sum = torch.logsumexp(codes.square_().mul_(-factor), dim=-1, keepdim=True)
    return torch.cat([-log_sum, factor], -1).cpu().numpy(), whole.cpu().numpy()


def decode(heads: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """float32 [n, vocab]: the log-probabilities that `encode` was given, as exact as its codes are."""
    scale = torch.from_numpy(heads)
    return torch.addcmul(scale[:, :1], torch.from_numpy(codes).float().square_(), scale[:, 1:], value=-1)
