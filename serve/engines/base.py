"""What a scheduler needs of an engine: sequences that are prefilled in chunks and stepped token by token.

An engine belongs to one thread once it serves: only `encode`, `encode_chat` and `token_bytes` may be called from
another one. It knows nothing of sampling, stop strings or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llmlite.errors import LlmliteError

CHUNK = 128
"""Prompt tokens per prefill call: what one cancelled request may still cost, and the grain of prefix reuse."""


class EngineBroken(LlmliteError):
    """The engine can't go on at all: the server must say so instead of failing request after request."""


class ChatTemplateError(LlmliteError):
    """The messages can't be put into words for this model: it has no template, or the template refused them."""


@dataclass(eq=False)
class Sequence:
    """One sequence in an engine's cache.

    ``tokens`` are the ids whose keys and values the cache holds, ``prefilled`` how many of them came in as prompt,
    ``reused`` how many were there already when the sequence was opened.
    """

    slot: int
    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    reused: int = 0


class Engine(Protocol):
    """One model, ready to run ``slots`` sequences of up to ``context`` tokens each."""

    name: str
    version: str
    context: int
    vocab_size: int
    slots: int
    eos: frozenset[int]
    tool_template: str | None
    """The chat template that is rendered where there are tools; None without any."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the BOS token the model wants, once."""

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation by the model's own chat template, up to where the assistant speaks.

        ``messages`` have role and content, and where they apply tool_calls (their arguments as objects), tool_call_id
        and name; ``tools`` are OpenAI's tool objects.
        Raises `ChatTemplateError` without a template, or with the template's own message where it refuses.
        """

    def token_bytes(self, token: int, special: bool) -> bytes:
        """The bytes a token adds to the text; control tokens add none unless ``special``."""

    def open(self, prompt: list[int], reuse: bool = True) -> Sequence:
        """A free slot, with as much of ``prompt`` already in it as an earlier sequence left there.

        At least the last token of the prompt is left to run. ``reuse=False``: nothing is there (to score a prompt).
        """

    def prefill(self, sequence: Sequence, tokens: list[int], every_row: bool) -> np.ndarray:
        """Run the next at most `CHUNK` prompt tokens: float32 logits [1, vocab], or one row per token."""

    def step(self, sequences: list[Sequence], tokens: list[int]) -> np.ndarray:
        """Append one token to each sequence: float32 logits [sequences, vocab]."""

    def close(self, sequence: Sequence, keep: bool) -> None:
        """Free the slot; ``keep`` its prompt for a later `open`, or forget it (after an error)."""

    def close_model(self) -> None:
        """Free the weights and all sequences; nothing may be called after it."""


class Slots:
    """Which slots are free and which prompt each still holds.

    Only whole prefill chunks are taken over. Each chunk then runs in the same shape as in a fresh sequence, so
    reuse changes no bit of the logits, and the same seed gives the same text whether or not the cache was warm.
    """

    def __init__(self, count: int, reusable: bool) -> None:
        self._free = [Sequence(slot) for slot in range(count)]
        self._reusable = reusable

    def take(self, prompt: list[int], reuse: bool) -> Sequence:
        """The free slot whose prompt agrees longest with this one (else the longest unused), cut to what agrees."""
        lengths = [self._agree(slot, prompt) if reuse and self._reusable else 0 for slot in self._free]
        sequence = self._free.pop(lengths.index(max(lengths)))
        kept = max(lengths)
        sequence.tokens = prompt[:kept]
        sequence.prefilled = sequence.reused = kept
        return sequence

    def put_back(self, sequence: Sequence, keep: bool) -> None:
        """Free again. Its tokens are cut to its whole prompt chunks, to none without ``keep``."""
        whole = sequence.prefilled - sequence.prefilled % CHUNK
        sequence.prefilled = whole if keep and self._reusable else 0
        sequence.tokens = sequence.tokens[: sequence.prefilled]
        self._free.append(sequence)

    @staticmethod
    def _agree(sequence: Sequence, prompt: list[int]) -> int:
        limit = min(sequence.prefilled, len(prompt) - 1)
        same = next((i for i in range(limit) if sequence.tokens[i] != prompt[i]), limit)
        return same - same % CHUNK


def with_bos(tokens: list[int], bos: int | None) -> list[int]:
    """``tokens`` behind ``bos``, unless the text began with it already or the model adds none (None)."""
    return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
