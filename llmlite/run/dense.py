"""Open whatever holds a model's weights as a checkpoint of real numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmlite.checkpoint.checkpoint import Checkpoint, locate
from llmlite.formats.dequantized import gguf_file, open_dequantized
from llmlite.run.text import opened


@contextmanager
def opened_dense(model: str, revision: str | None, out: Path) -> Iterator[Checkpoint]:
    """A checkpoint, or an artifact with its rounded weights multiplied out; a GGUF file's are imported beside ``out``.

    ``model``: a directory, a GGUF file or a hub id.
    """
    file = gguf_file(Path(model))
    if file is not None:
        with opened(str(file), None, out) as checkpoint:
            yield replace(checkpoint, source=model)
        return
    yield replace(open_dequantized(locate(model, revision)), source=model)
