"""Run a checkpoint one decoder layer at a time, with the activations between two layers on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, LAYER
from llmlite.errors import InputError
from llmlite.memory import give_freed_memory_back
from llmlite.progress import track


class Activations:
    """Hidden states on disk, float32 [rows, length, width], read and written a few rows at a time.

    ``reopen``: those that an earlier run has written; `InputError` if they are not there.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], *, reopen: bool = False):
        self.file, self.shape = file, shape
        self._row_bytes = shape[1] * shape[2] * 4
        if reopen and not (file.is_file() and file.stat().st_size == shape[0] * self._row_bytes):
            raise InputError(f"{file}: does not hold the unfinished run's activations; begin again without --resume")
        self._handle = open(file, "r+b" if reopen else "w+b", buffering=0)  # noqa: SIM115 - closed by remove()

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Put rows [n, length, width] at ``start``."""
        data = rows.float().cpu().contiguous().numpy().data.cast("B")
        self._handle.seek(start * self._row_bytes)
        done = 0
        while done < len(data):
            done += self._handle.write(data[done:])

    def read(self, start: int, count: int) -> torch.Tensor:
        """``count`` rows from ``start``."""
        count = min(count, self.shape[0] - start)
        out = torch.empty((count, *self.shape[1:]))  # aligned alike in every run, so that sums round alike
        self._handle.seek(start * self._row_bytes)
        view = out.numpy().data.cast("B")
        done = 0
        while done < len(view):
            got = self._handle.readinto(view[done:])
            assert got, f"{self.file} is shorter than the activations it should hold"
            done += got
        return out

    def flush(self) -> None:
        """What is written so far is on the disk when this returns."""
        os.fsync(self._handle.fileno())

    def remove(self) -> None:
        """Close and delete the file."""
        self._handle.close()
        self.file.unlink(missing_ok=True)


class Arrived(Exception):
    """Carries what a layer is called with out of a forward."""


class _Catcher(torch.nn.Module):
    """Stands where a decoder layer stands: notes what it is called with and passes the hidden states on."""

    def __init__(self, original: torch.nn.Module, last: bool):
        super().__init__()
        self.last = last
        self.kwargs: dict[str, Any] = {}
        if "attention_type" in original.__dict__:  # qwen2's and qwen3's forward reads it off the layer
            self.attention_type = original.__dict__["attention_type"]

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kwargs = kwargs
        if self.last:
            raise Arrived(hidden)
        return hidden


class LayerStream:
    """A transformers model of which one decoder layer at a time has its weights in memory.

    The skeleton is built on the meta device; masks and rotary embeddings are the model's own, caught from its
    forward. ``dtype`` is what it computes in. At most the embedding or one decoder layer is held at a time.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        config = AutoConfig.for_model(**checkpoint.config)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):  # buffers are small, and hold rotary frequencies and scales
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().model
        for buffer in self._model.buffers():
            buffer.data = buffer.data.to(device)
        self._layers = list(self._model.layers)
        self._kwargs: list[dict[str, Any]] = []

    @torch.no_grad()
    def embed(self, ids: np.ndarray, file: Path, batch: int) -> Activations:
        """The first layer's inputs for token rows [rows, length]; also learns what each layer is called with."""
        rows, length = ids.shape
        out = Activations(file, (rows, length, self.checkpoint.config["hidden_size"]))
        embedding = self._model.embed_tokens
        embedding.load_state_dict({"weight": self._cast(EMBEDDING)}, strict=False, assign=True)
        catchers = [_Catcher(layer, last=layer is self._layers[-1]) for layer in self._layers]
        self._model.layers = torch.nn.ModuleList(catchers)
        for start in range(0, rows, batch):
            part = torch.from_numpy(ids[start : start + batch]).to(self.device)
            try:
                self._model(input_ids=part, use_cache=False)
            except Arrived as arrived:
                out.write(start, arrived.args[0])
            if start == 0:  # masks and positions depend on the length of a row only
                self._kwargs = [catcher.kwargs for catcher in catchers]
        _forget_weights(embedding)
        self._model.layers = torch.nn.ModuleList(self._layers)
        return out

    def _cast(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)

    @contextmanager
    def layer(self, number: int, *, copy: bool = False) -> Iterator[torch.nn.Module]:
        """One decoder layer with its weights; they are gone again after the block. ``copy``: a second one beside it."""
        module = deepcopy(self._layers[number]) if copy else self._layers[number]
        prefix = f"{LAYER}{number}."
        state = {name.removeprefix(prefix): self._cast(name) for name in self.checkpoint.layer_tensors(number)}
        module.load_state_dict(
            {k: v for k, v in state.items() if not k.endswith("inv_freq")}, strict=False, assign=True
        )
        try:
            yield module
        finally:
            _forget_weights(module)

    @torch.no_grad()
    def forward(self, number: int, module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The outputs of layer ``number`` for hidden states, both [rows, length, width]."""
        hidden = hidden.to(self.device, self.dtype)
        out = module(hidden, **self._for_batch(number, len(hidden)))
        return out[0] if isinstance(out, tuple) else out

    def advance(self, number: int, module: torch.nn.Module, hidden: Activations, batch: int) -> None:
        """The outputs of layer ``number`` take the place of its inputs in ``hidden``, ``batch`` rows at a time."""
        for start in range(0, hidden.shape[0], batch):
            hidden.write(start, self.forward(number, module, hidden.read(start, batch)))

    @torch.no_grad()
    def through(self, ids: np.ndarray, file: Path, batch: int, what: str) -> Activations:
        """What the last layer gives for token rows [rows, length], the weights as they are; ``what`` is shown."""
        hidden = self.embed(ids, file, batch)
        for number in track(range(len(self._layers)), what):
            with self.layer(number) as module:
                self.advance(number, module, hidden, batch)
            give_freed_memory_back()
        return hidden

    @contextmanager
    def final_norm(self) -> Iterator[torch.nn.Module]:
        """What stands between the last layer and the head, with its weights; they are gone again after the block."""
        norm = self._model.norm
        norm.load_state_dict({"weight": self._cast(FINAL_NORM)}, assign=True)
        try:
            yield norm
        finally:
            _forget_weights(norm)

    def _for_batch(self, number: int, rows: int) -> dict[str, Any]:
        """The caught arguments, cut or widened to the batch: only the first dimension can differ."""
        return {key: _fit_rows(value, rows) for key, value in self._kwargs[number].items()}


def _forget_weights(module: torch.nn.Module) -> None:
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(weight.to("meta"), requires_grad=False)


def _fit_rows(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        return value[:1].expand(rows, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(_fit_rows(part, rows) for part in value)
    return value
