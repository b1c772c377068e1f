"""The predictions of a checkpoint that does not fit into memory, one decoder layer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.calibrate.stream import LayerStream
from llmlite.checkpoint.artifact import SPARE_BYTES, scratch_directory
from llmlite.checkpoint.checkpoint import Checkpoint, meta_model, open_checkpoint
from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD
from llmlite.errors import OutsideError
from llmlite.evals.engines import ROWS, softcap_of, token_ids
from llmlite.evals.hf import load_tokenizer, prefix_token
from llmlite.evals.kept import Facts, Writer
from llmlite.evals.perplexity import Window
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track

FLOAT = 4


class StreamedModel:
    """A full-precision checkpoint and its tokenizer; at most the embedding or one decoder layer is in memory.

    It computes in the dtype that transformers would load it in, and gives the hidden states that the loaded model
    gives. Raises `InputError` for a checkpoint that is quantized, or of a family that is not known.
    """

    def __init__(self, path: Path):
        self.checkpoint = open_checkpoint(path)
        self.tokenizer = load_tokenizer(path)
        self.vocab_size: int = self.checkpoint.config["vocab_size"]
        self.known_tokens = len(self.tokenizer)
        self.bos = prefix_token(self.tokenizer)
        self.dtype = dtype_of(self.checkpoint)

    def tokenize(self, text: str) -> np.ndarray:
        return token_ids(self.tokenizer, text)

    @property
    def facts(self) -> Facts:
        config = self.checkpoint.config
        return Facts(
            encoding="hidden",
            width=config["hidden_size"],
            dtype=str(self.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            known_tokens=self.known_tokens,
            head=EMBEDDING if self.checkpoint.tied else HEAD,
            softcap=softcap_of(config),
        )

    def run(self, windows: Sequence[Window], writer: Writer, scratch: Path) -> None:
        """Write the final hidden states of all windows' scored positions.

        ``scratch``: the name of a directory to be, on a disk with room for float32 [windows, length, width].
        `OutsideError` where there is too little.
        """
        longest = max(len(window.tokens) for window in windows) - 1
        ids = np.zeros((len(windows), longest), np.int64)  # what stands behind a short window changes nothing before it
        for line, window in zip(ids, windows, strict=True):
            line[: len(window.tokens) - 1] = window.tokens[:-1]
        _refuse_small_disk(scratch, ids.size * self.checkpoint.config["hidden_size"] * FLOAT)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stream = LayerStream(self.checkpoint, device, self.dtype)
        with scratch_directory(scratch) as folder:
            hidden = stream.embed(ids, folder / "hidden", batch=1)
            for number in track(range(self.checkpoint.num_layers), "base, layer by layer"):
                with stream.layer(number) as module:
                    for row in range(len(ids)):
                        hidden.write(row, stream.forward(number, module, hidden.read(row, 1)))
                give_freed_memory_back()
            norm = self._norm().to(device)
            with torch.inference_mode():
                for row, window in enumerate(windows):
                    states = hidden.read(row, 1)[0, window.first : len(window.tokens) - 1]
                    writer.hidden(norm(states.to(device, self.dtype)))
            hidden.remove()

    def _norm(self) -> torch.nn.Module:
        decoder: Any = meta_model(self.checkpoint.config, self.checkpoint.source).model
        decoder.norm.load_state_dict({"weight": self.checkpoint.read(FINAL_NORM).to(self.dtype)}, assign=True)
        return decoder.norm


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What transformers computes in where nothing else is asked for: the config's dtype, or the weights'."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else checkpoint.dtype


def streaming_memory(checkpoint: Checkpoint, length: int) -> int:
    """Bytes that `StreamedModel` and the chunked head need at most, for windows of ``length`` tokens."""
    config, size = checkpoint.config, dtype_of(checkpoint).itemsize
    outer = config["vocab_size"] * config["hidden_size"] * 2 * size  # as stored, and as computed with
    layer = max(
        sum(checkpoint.tensors[name].nbytes for name in checkpoint.layer_tensors(number))
        for number in range(checkpoint.num_layers)
    )
    return max(outer + chunk_memory(config), 2 * layer + running_memory(config, length))


def chunk_memory(config: dict) -> int:
    """Bytes of the chunked head: logits, log-probabilities of both models, and what compares them."""
    return 5 * ROWS * config["vocab_size"] * FLOAT


def running_memory(config: dict, length: int) -> int:
    """Bytes of one window's activations inside a decoder layer."""
    wide = max(config.get("intermediate_size") or 0, 4 * config["hidden_size"])
    heads = config.get("num_attention_heads") or 1
    return length * (3 * wide + 6 * config["hidden_size"]) * FLOAT + heads * length * length * FLOAT


def _refuse_small_disk(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch.parent).free
    if needed + SPARE_BYTES > free:
        raise OutsideError(
            f"{scratch.parent}: streaming the base needs {needed / 2**20:,.0f} MiB of scratch space and the disk has "
            f"{free / 2**20:,.0f} MiB free; name another directory with --cache, or score less with --windows"
        )
