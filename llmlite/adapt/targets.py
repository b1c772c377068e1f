"""What a student is to predict: its teacher's likeliest tokens read from disk, or the live teacher's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmlite.adapt.losses import outcomes
from llmlite.adapt.teacher import Teacher, logits_of, teach
from llmlite.checkpoint.checkpoint import Checkpoint

TOP = 256  # tokens of each position that are kept by name
Pair = tuple[torch.Tensor, torch.Tensor]  # log-probabilities of the same outcomes: the teacher's, the student's


class Target(Protocol):
    """The teacher's view of some positions."""

    def compare(self, logits: torch.Tensor, part: slice) -> Pair:
        """Both sides' log-probabilities [n, outcomes] where ``logits`` [n, tokens] are the student's."""


@dataclass(frozen=True)
class Kept:
    """Token ids int64 [positions, top] and log-probabilities float32 [positions, top + 1], the others' last."""

    ids: torch.Tensor
    logs: torch.Tensor
    temperature: float = 1.0

    def compare(self, logits: torch.Tensor, part: slice) -> Pair:
        if self.temperature != 1:
            logits = logits / self.temperature
        return self.logs[part], outcomes(logits, self.ids[part])


@dataclass(frozen=True)
class Live:
    """The teacher's final hidden states [positions, width] and its head [tokens, width]."""

    states: torch.Tensor
    head: torch.Tensor
    checkpoint: Checkpoint
    temperature: float

    def compare(self, logits: torch.Tensor, part: slice) -> Pair:
        with torch.no_grad():
            its = logits_of(self.states[part].to(self.head.dtype), self.head, self.checkpoint).float()
            known = torch.log_softmax(its if self.temperature == 1 else its / self.temperature, -1)
        return known, torch.log_softmax(logits if self.temperature == 1 else logits / self.temperature, -1)


def kept_targets(teacher: Teacher, rows: Sequence[int], temperature: float, device: str) -> Kept:
    """What is on disk of some rows, one behind the other."""
    ids, logs = zip(*(teacher.read(row) for row in rows), strict=True)
    return Kept(torch.cat(ids).to(device), torch.cat(logs).to(device), temperature)


@dataclass(frozen=True)
class Seen:
    """What a forward of the teacher gave for rows: final states [rows, length, width], each layer's inputs, and the
    last layer's attention [rows, heads, length, length], as far as they were asked for.
    """

    states: torch.Tensor
    inputs: tuple[torch.Tensor, ...] = ()
    attention: torch.Tensor | None = None


class LiveTeacher:
    """The teacher in memory, in ``dtype``. ``vocabulary`` int64: its ids of the student's tokens, None: the same."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        dtype: torch.dtype,
        vocabulary: torch.Tensor | None = None,
        attention: bool = False,
    ):
        model = load_model(checkpoint, dtype, attention).to(device).requires_grad_(False)
        self.checkpoint, self.device, self.decoder = checkpoint, device, model.model
        self.head = model.get_output_embeddings().weight
        self.vocabulary = None if vocabulary is None else vocabulary.to(device)
        if self.vocabulary is not None:
            self.head = self.head[self.vocabulary]

    @torch.no_grad()
    def see(self, ids: torch.Tensor, inputs: bool = False, attention: bool = False) -> Seen:
        """Run rows of the student's token ids int64 [rows, length]."""
        return see(self.decoder, ids if self.vocabulary is None else self.vocabulary[ids], inputs, attention)

    def target(self, seen: Seen, temperature: float) -> Live:
        """What the student is compared with, position by position."""
        return Live(seen.states.flatten(0, 1), self.head, self.checkpoint, temperature)


def see(decoder: Any, ids: torch.Tensor, inputs: bool = False, attention: bool = False) -> Seen:
    """Run a decoder on token ids int64 [rows, length]."""
    out = decoder(input_ids=ids, use_cache=False, output_hidden_states=inputs, output_attentions=attention)
    return Seen(
        out.last_hidden_state,
        tuple(out.hidden_states[:-1]) if inputs else (),  # the last is the final state, behind the norm
        out.attentions[-1] if attention else None,
    )


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, attention: bool = False) -> Any:
    """The transformers model; ``attention``: one that can show its attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = {"attn_implementation": "eager"} if attention else {}
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=dtype, trust_remote_code=False, **kind
    ).eval()


def keep_on_disk(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    folder: Path,
    device: str,
    dtype: torch.dtype,
    vocabulary: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> Teacher:
    """The teacher's likeliest tokens for rows of the student's ids int64 [rows, length], in the directory ``folder``.

    What an earlier run has finished there is taken as it is.
    """
    rows, length = ids.shape
    size = checkpoint.config["vocab_size"] if vocabulary is None else len(vocabulary)
    if (folder / "whole").is_file():
        return Teacher(folder, rows, length, min(TOP, size - 1), reopen=True)
    folder.mkdir(exist_ok=True)
    own = ids if vocabulary is None else vocabulary.numpy()[ids]
    teacher = teach(checkpoint, own, folder, TOP, device, dtype=dtype, temperature=temperature, vocabulary=vocabulary)
    (folder / "whole").touch()
    return teacher
