"""GGUF files, run by llama.cpp: each slot is one sequence id of its context, with cells of its own."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.serve.engines import chat_template
from llmlite.serve.engines.base import CHUNK, ChatTemplateError, EngineBroken, Sequence, Slots, with_bos
from llmlite.serve.settings import ServeSettings


class LlamaCppEngine:
    """See `Engine`. The context is the trained one unless the settings name one; it is allocated at once."""

    name = "llama.cpp"

    def __init__(self, file: Path, settings: ServeSettings) -> None:
        positions = None if settings.context is None else settings.context * settings.parallel
        wanted = LlamaSettings(
            positions, settings.parallel, batch=CHUNK, outputs=CHUNK, threads=settings.threads, as_trained=True
        )
        self._llama = Llama(file, wanted)
        self._api = api = self._llama.api
        if not api.llama_model_has_decoder(self._llama.model) or api.llama_model_has_encoder(self._llama.model):
            raise InputError(f"{file}: is not a decoder language model, so it can't be served")
        self.version = f"llama-cpp-python {api.__version__}"
        self.context = settings.context or api.llama_model_n_ctx_train(self._llama.model)
        self.vocab_size = self._llama.vocab_size
        self.slots = settings.parallel
        self.eos = frozenset(t for t in range(self.vocab_size) if api.llama_vocab_is_eog(self._llama.vocab, t))
        self._memory = api.llama_get_memory(self._llama.context)
        self._pool = Slots(self.slots, reusable=self._can_cut())
        self._template = self._chat_template(None)
        self.tool_template = self._chat_template(b"tool_use") or self._template
        self._special = {
            "bos_token": self._token_text(api.llama_vocab_bos(self._llama.vocab)),
            "eos_token": self._token_text(api.llama_vocab_eos(self._llama.vocab)),
        }

    def encode(self, text: str) -> list[int]:
        return with_bos(self._llama.tokenize(text, special=True).tolist(), self._llama.bos)

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        template = self.tool_template if tools else self._template
        if template is None:
            raise ChatTemplateError(chat_template.NO_TEMPLATE)
        text = chat_template.render(template, messages, self._special, tools)
        return self._llama.tokenize(text, special=True).tolist()

    def token_bytes(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = self._api.llama_token_to_piece(self._llama.vocab, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self._api.llama_token_to_piece(self._llama.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length]

    def open(self, prompt: list[int], reuse: bool = True) -> Sequence:
        sequence = self._pool.take(prompt, reuse)
        self._cut(sequence)
        return sequence

    def prefill(self, sequence: Sequence, tokens: list[int], every_row: bool) -> np.ndarray:
        batch, n, start = self._llama.batch, len(tokens), len(sequence.tokens)
        batch.token[:n] = tokens
        batch.position[:n] = np.arange(start, start + n)
        batch.sequence[:n] = sequence.slot
        batch.wanted[:n] = every_row
        batch.wanted[n - 1] = 1
        rows = self._decode(n, n if every_row else 1)
        sequence.tokens += tokens
        sequence.prefilled += n
        return rows

    def step(self, sequences: list[Sequence], tokens: list[int]) -> np.ndarray:
        batch, n = self._llama.batch, len(tokens)
        batch.token[:n] = tokens
        batch.position[:n] = [len(sequence.tokens) for sequence in sequences]
        batch.sequence[:n] = [sequence.slot for sequence in sequences]
        batch.wanted[:n] = 1
        rows = self._decode(n, n)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        return rows

    def close(self, sequence: Sequence, keep: bool) -> None:
        self._pool.put_back(sequence, keep)
        self._cut(sequence)

    def close_model(self) -> None:
        self._llama.close()

    def _decode(self, tokens: int, rows: int) -> np.ndarray:
        self._llama.batch.struct.n_tokens = tokens
        status = self._api.llama_decode(self._llama.context, self._llama.batch.struct)
        if status < -1:
            raise EngineBroken(f"llama.cpp failed while it computed (llama_decode gave {status})")
        if status != 0:  # -1: it refused the batch; 1: no room, which whole contexts for each slot rule out
            raise RuntimeError(f"llama_decode gave {status}")
        logits = self._api.llama_get_logits(self._llama.context)
        return np.ctypeslib.as_array(logits, shape=(rows, self.vocab_size)).copy()

    def _cut(self, sequence: Sequence) -> None:
        """Take the cells behind the sequence's tokens out of the cache."""
        if not self._api.llama_memory_seq_rm(self._memory, sequence.slot, len(sequence.tokens), -1):
            raise EngineBroken(f"llama.cpp could not take back sequence {sequence.slot}")

    def _can_cut(self) -> bool:
        """Not so with sliding windows and recurrent states, which forget, although seq_rm says yes all the same."""
        api, model = self._api, self._llama.model
        return not (
            api.llama_model_n_swa(model) or api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
        )

    def _chat_template(self, name: bytes | None) -> str | None:
        template = self._api.llama_model_chat_template(self._llama.model, name)
        return None if template is None else template.decode("utf-8", "replace")

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else self.token_bytes(token, special=True).decode("utf-8", "replace")
