"""What a verb that measures on text begins with: the device, the opened checkpoint, and rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llmlite.calibrate.corpus import default_corpora, read_corpus
from llmlite.calibrate.ids import read_ids
from llmlite.calibrate.rows import Rows, token_rows
from llmlite.checkpoint.artifact import scratch_directory
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.errors import InputError, first_line
from llmlite.progress import note


def choose_device(device: str, threads: int | None) -> str:
    """Where torch computes, "cpu" or "cuda", with its processor threads set; `InputError` for what is not there.

    ``device``: cpu, cuda, or auto for cuda where there is one; ``threads``: None leaves torch's choice.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: cpu, cuda or auto is right")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("--device cuda: torch sees no CUDA device here; cpu or auto is right")
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads {threads}: at least 1 is right")
        torch.set_num_threads(threads)
    return "cuda" if there and device != "cpu" else "cpu"


@contextmanager
def opened(model: str, revision: str | None, out: Path) -> Iterator[Checkpoint]:
    """The checkpoint of a directory or hub id; a GGUF file is imported beside ``out`` first, and that is gone after."""
    if not model.endswith(".gguf"):
        yield open_checkpoint(model, revision)
        return
    with scratch_directory(out) as folder:
        import_gguf(Path(model), folder / "base")
        yield replace(open_checkpoint(folder / "base"), source=model, gguf=Path(model))


def check_row_length(tokens: int, row_length: int, option: str = "--calibration-tokens") -> None:
    """`InputError` that names ``option`` unless ``tokens`` are at least one row of at least 2 tokens."""
    if tokens < row_length or row_length < 2:
        raise InputError(
            f"{option} {tokens} with --row-length {row_length}: at least one row of at least 2 tokens is right"
        )


def calibration_rows(checkpoint: Checkpoint, sources: tuple[str, ...], tokens: int, row_length: int, seed: int) -> Rows:
    """Token rows int64 [rows, row_length] of text files and datasets, or a .npy file's own [rows, length] as it is.

    Without ``sources`` the packaged mix. Says it when the text has fewer than ``tokens`` tokens. `InputError` for a
    source that can't be read, for a .npy file beside others, and for token ids that the model does not have.
    """
    given = [source for source in sources if source.endswith(".npy")]
    if given and len(sources) > 1:
        raise InputError(f"--calibration {given[0]}: token ids stand alone; give that file and no other")
    rows = read_ids(given[0]) if given else _text_rows(checkpoint, sources, tokens, row_length, seed)
    if not given and rows.ids.size < tokens - row_length:
        note(f"the text has {rows.ids.size:,} tokens in whole rows; up to {tokens:,} would be used")
    vocabulary = checkpoint.config["vocab_size"]
    if rows.ids.max() >= vocabulary:
        raise InputError(
            f"{checkpoint.source}: the calibration text has token id {rows.ids.max()}, the model {vocabulary} tokens"
        )
    return rows


def other_rows(checkpoint: Checkpoint, sources: tuple[str, ...], rows: Rows, tokens: int, seed: int) -> Rows:
    """About ``tokens`` tokens of the same text that are in none of ``rows``, which codes were fitted to.

    ``rows``: what `calibration_rows` gave for these ``sources`` and this ``seed``. On them an artifact is far nearer to
    its base than on any other text, so there is little to learn from them. Where the text has fewer others than half of
    what is asked for, all of it is taken, and a note says so.
    """
    length = rows.ids.shape[1]
    whole = rows
    if not any(source.endswith(".npy") for source in sources):
        whole = _text_rows(checkpoint, sources, rows.ids.size + tokens, length, seed)  # cut at the same places
    known = {row.tobytes() for row in rows.ids}
    others = [row for row in whole.ids if row.tobytes() not in known]
    if len(others) * length * 2 >= tokens:
        return replace(whole, ids=np.array(others))
    note(
        f"the text has {len(others)} rows beside the {len(rows.ids)} that the rounding is calibrated on, so training "
        "takes these too, and gains less from them; a longer text, or fewer --calibration-tokens, is right"
    )
    return whole


def _text_rows(checkpoint: Checkpoint, sources: tuple[str, ...], tokens: int, row_length: int, seed: int) -> Rows:
    from transformers import AutoTokenizer

    corpora = [read_corpus(source) for source in sources]
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{checkpoint.source}: its tokenizer can't be loaded, and calibration needs it ({first_line(error)})"
        ) from None
    if not corpora:
        corpora = default_corpora(chat=tokenizer.chat_template is not None)
    return token_rows(corpora, tokenizer, tokens, row_length, seed)
