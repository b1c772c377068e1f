"""What a scheduler needs of an engine: sequences that grow together, one step after the other.

An engine belongs to one thread once it serves: only `encode`, `encode_chat` and `token_bytes` may be called from
another one. It knows nothing of sampling, stop strings or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmlite.errors import LlmliteError


class EngineBroken(LlmliteError):
    """The engine can't go on at all: the server must say so instead of failing request after request."""


class NoRoom(LlmliteError):
    """The cache holds no more tokens; everything is as it was before the call."""


class ChatTemplateError(LlmliteError):
    """The messages can't be put into words for this model: it has no template, or the template refused them."""


@dataclass(eq=False)
class Sequence:
    """One sequence in an engine's cache.

    ``tokens`` are the ids whose keys and values the cache holds, ``reused`` how many of them were there already when
    the sequence was opened. ``slot`` is its place, None while it is suspended: ``state`` then has its keys and values.
    """

    slot: int | None
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    reused: int = 0
    state: bytes | None = None


@dataclass(frozen=True)
class Piece:
    """What one step appends to a sequence: at least one token; logits are wanted of the last ``rows`` of them."""

    sequence: Sequence
    tokens: list[int]
    rows: int


@dataclass(frozen=True)
class Room:
    """How many tokens the cache holds of sequences that run, of ones kept for reuse, and how many it can hold.

    ``shared`` False: each slot has room of its own for a whole context, and never lacks any.
    """

    used: int
    kept: int
    total: int
    shared: bool

    def fits(self, tokens: int) -> bool:
        """Whether sequences can take so many more, those kept for reuse having made room."""
        return not self.shared or self.used + tokens <= self.total


class Engine(Protocol):
    """One model that runs up to ``slots`` sequences of up to ``context`` tokens at once.

    One step takes at most ``batch`` tokens and gives at most ``outputs`` rows of logits.
    """

    name: str
    version: str
    context: int
    vocab_size: int
    slots: int
    batch: int
    outputs: int
    eos: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the BOS token the model wants, once."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's own chat template, up to where the assistant speaks.

        Raises `ChatTemplateError` without a template, or with the template's own message where it refuses.
        """

    def token_bytes(self, token: int, special: bool) -> bytes:
        """The bytes a token adds to the text; control tokens add none unless ``special``."""

    def open(self, prompt: list[int], adapter: str | None = None, reuse: bool = True) -> Sequence:
        """A free slot, with as much of ``prompt`` already in it as is cached anywhere.

        At least the last token of the prompt is left to run. ``reuse=False``: nothing is there (to score a prompt).
        """

    def step(self, pieces: Items[Piece]) -> list[np.ndarray]:
        """Append the pieces, each to its own sequence, all with one adapter: float32 logits [rows, vocab] for each.

        The arrays are valid until the next step. Raises `NoRoom`; that and every other error but `EngineBroken`
        leave all sequences as they were.
        """

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens from ``length`` on. Only where ``can_cut``."""

    @property
    def can_cut(self) -> bool:
        """Whether positions can be taken back: not so with sliding windows and recurrent states."""

    def suspend(self, sequence: Sequence) -> None:
        """Move a sequence out of the cache, to host memory; its slot is free."""

    def resume(self, sequence: Sequence) -> None:
        """Bring a suspended sequence back, into a free slot. Raises `NoRoom`."""

    def checkpoint(self, sequence: Sequence) -> None:
        """Where positions can't be taken back: keep a copy of what the sequence holds now for later prompts."""

    def close(self, sequence: Sequence, keep: bool) -> None:
        """Free the slot; ``keep`` its tokens for a later `open`, or forget them (after an error)."""

    def room(self) -> Room:
        """How full the cache is."""

    def embed(self, prompts: list[list[int]]) -> Iterator[np.ndarray | None]:
        """Vectors of texts: None after each bounded piece of work, at last float32 [prompts, width], each of length 1.

        The mean of the last layer's hidden states, unless the model says another pooling. One text is embedded at a
        time: an iterator that has begun is finished or dropped before the next one begins. On the engine thread.
        """

    def close_model(self) -> None:
        """Free the weights and all sequences; nothing may be called after it."""


def with_bos(tokens: list[int], bos: int | None) -> list[int]:
    """``tokens`` behind ``bos``, unless the text began with it already or the model adds none (None)."""
    return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
