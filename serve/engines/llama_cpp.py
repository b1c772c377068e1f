"""GGUF files, run by llama.cpp: each slot is one sequence id of its context.

Where the cells are enough for a whole context in every slot, each slot has its own part of them, and attention looks
at that alone. With fewer cells all slots share them, and a sequence may have to leave while others go on.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from llmlite.errors import InputError
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.serve.draft_model import DraftModel, open_draft
from llmlite.serve.engines import chat_template
from llmlite.serve.engines.base import ChatTemplateError, EngineBroken, NoRoom, Piece, Room, Sequence, with_bos
from llmlite.serve.engines.llama_embed import LlamaEmbedder
from llmlite.serve.engines.slots import Slots
from llmlite.serve.prefixes import PrefixStore
from llmlite.serve.settings import ServeSettings
from llmlite.serve.turns import EXACT_CHUNK

BATCH = 512
OUTPUTS_A_SLOT = 9
"""Rows of logits that one sequence may want in a step: of its last token and of eight guesses behind it."""

FULL = 1  # llama_decode's status where the cache has no cell left


@dataclass(frozen=True)
class Cells:
    """``context``: tokens of one sequence at most; ``total``: of all; ``shared``: in one pool."""

    context: int
    total: int
    shared: bool


class LlamaCppEngine:
    """See `Engine`. The context is the trained one, or as much of it as half the free memory holds."""

    name = "llama.cpp"

    def __init__(self, file: Path, settings: ServeSettings) -> None:
        self._cells = _cells(file, settings)
        self.slots = settings.parallel
        self.context = self._cells.context
        self.batch = min(BATCH, self._cells.total)
        self.outputs = min(self.batch, max(64, OUTPUTS_A_SLOT * self.slots))
        self._llama = Llama(file, _llama_settings(settings, self._cells, self.batch, self.outputs))
        self._api = api = self._llama.api
        if not api.llama_model_has_decoder(self._llama.model) or api.llama_model_has_encoder(self._llama.model):
            raise InputError(f"{file}: is not a decoder language model, so it can't be served")
        self.version = f"llama-cpp-python {api.__version__}"
        self.vocab_size = self._llama.vocab_size
        self.eos = frozenset(t for t in range(self.vocab_size) if api.llama_vocab_is_eog(self._llama.vocab, t))
        self.can_cut = self._can_cut()
        self._memory = api.llama_get_memory(self._llama.context)
        self._adapters = self._load_adapters(settings)
        self._adapter: str | None = None
        self._embedder: LlamaEmbedder | None = None
        self.store = self._open_store(file, settings)
        self._slots = Slots(self.slots, self, self.store, EXACT_CHUNK if settings.exact else 1)
        self._template = self._chat_template(None)
        self.tool_template = self._chat_template(b"tool_use") or self._template
        self._special = {
            "bos_token": self._token_text(api.llama_vocab_bos(self._llama.vocab)),
            "eos_token": self._token_text(api.llama_vocab_eos(self._llama.vocab)),
        }
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        return with_bos(self._llama.tokenize(text, special=True).tolist(), self._llama.bos)

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        template = self.tool_template if tools else self._template
        if template is None:
            raise ChatTemplateError(chat_template.NO_TEMPLATE)
        text = chat_template.render(template, messages, self._special, tools)
        return self._llama.tokenize(text, special=True).tolist()

    def token_bytes(self, token: int, special: bool) -> bytes:
        if special:
            return self._llama.piece(token, special=True)
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._llama.piece(token)
        return found

    def open(self, prompt: list[int], adapter: str | None = None, reuse: bool = True) -> Sequence:
        return self._slots.open(prompt, adapter, reuse)

    def step(self, pieces: Items[Piece]) -> list[np.ndarray]:
        self._use(pieces[0].sequence.adapter)
        batch, place, rows = self._llama.batch, 0, 0
        # llama.cpp runs slots of their own together only where their numbers follow each other in the batch.
        order = sorted(range(len(pieces)), key=lambda number: pieces[number].sequence.slot or 0)
        for piece in (pieces[number] for number in order):
            n, start = len(piece.tokens), len(piece.sequence.tokens)
            end = place + n
            batch.token[place:end] = piece.tokens
            batch.position[place:end] = np.arange(start, start + n)
            batch.sequence[place:end] = piece.sequence.slot
            batch.wanted[place:end] = 0
            batch.wanted[end - piece.rows : end] = 1
            place, rows = end, rows + piece.rows
        logits = self._decode(place, rows)
        out = [logits] * len(pieces)
        row = 0
        for number in order:
            piece = pieces[number]
            out[number] = logits[row : row + piece.rows]
            row += piece.rows
            piece.sequence.tokens += piece.tokens
        return out

    def cut(self, sequence: Sequence, length: int) -> None:
        assert sequence.slot is not None
        self.cut_slot(sequence.slot, length)
        del sequence.tokens[length:]

    def suspend(self, sequence: Sequence) -> None:
        self._slots.suspend(sequence)

    def resume(self, sequence: Sequence) -> None:
        self._slots.resume(sequence)

    def checkpoint(self, sequence: Sequence) -> None:
        self._slots.checkpoint(sequence)

    def close(self, sequence: Sequence, keep: bool) -> None:
        self._slots.close(sequence, keep)

    def room(self) -> Room:
        return Room(self._slots.used, self._slots.kept, self._cells.total, self._cells.shared)

    def embed(self, prompts: list[list[int]]) -> Iterator[np.ndarray | None]:
        if self._embedder is None:  # its memory is taken when it is first needed
            self._embedder = LlamaEmbedder(self._llama, self.context)
        return self._embedder.embed(prompts)

    def open_draft(self, file: Path, settings: ServeSettings) -> DraftModel:
        """A draft model with a sequence for each slot. Raises `InputError` for one with another vocabulary."""
        return open_draft(file, self._llama, self.context, self.slots, settings.threads)

    def close_model(self) -> None:
        self._slots.store_all()
        self.store.close()
        if self._embedder is not None:
            self._embedder.close()
        for adapter in self._adapters.values():
            self._api.llama_adapter_lora_free(adapter)
        self._llama.close()

    def cut_slot(self, slot: int, length: int) -> None:
        if not self._api.llama_memory_seq_rm(self._memory, slot, length, -1):
            raise EngineBroken(f"llama.cpp could not take back sequence {slot}")

    def save_slot(self, slot: int) -> bytes:
        size = self._api.llama_state_seq_get_size(self._llama.context, slot)
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = self._api.llama_state_seq_get_data(self._llama.context, pointer, size, slot)
        return data[:written].tobytes()

    def load_slot(self, slot: int, state: bytes) -> None:
        data = np.frombuffer(state, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        while not self._api.llama_state_seq_set_data(self._llama.context, pointer, len(state), slot):
            if not self._slots.evict():
                raise NoRoom(f"the cache has no room for {len(state):,} bytes of a sequence that comes back")

    def copy_slot(self, source: int, target: int, length: int) -> None:
        if self._cells.shared:  # then they are the same cells
            self._api.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return
        self.load_slot(target, self.save_slot(source))
        self.cut_slot(target, length)

    def _decode(self, tokens: int, rows: int) -> np.ndarray:
        self._llama.batch.struct.n_tokens = tokens
        while (status := self._api.llama_decode(self._llama.context, self._llama.batch.struct)) == FULL:
            if not self._slots.evict():
                raise NoRoom(f"the cache of {self._cells.total:,} tokens is full")
        if status < -1:
            raise EngineBroken(f"llama.cpp failed while it computed (llama_decode gave {status})")
        if status != 0:  # it refused the batch
            raise RuntimeError(f"llama_decode gave {status}")
        if rows == 0:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self._api.llama_get_logits(self._llama.context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))

    def _use(self, adapter: str | None) -> None:
        if adapter == self._adapter:
            return
        handles = [] if adapter is None else [self._adapters[adapter]]
        array = (self._api.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*[1.0] * len(handles))
        if self._api.llama_set_adapters_lora(self._llama.context, array, len(handles), scales):
            raise EngineBroken(f"llama.cpp could not change to the adapter {adapter}")
        self._adapter = adapter

    def _load_adapters(self, settings: ServeSettings) -> dict[str, int]:
        found = {}
        for name, file in settings.adapters:
            if not file.is_file():
                raise InputError(f"lora {name}: there is no file {file}")
            handle = self._api.llama_adapter_lora_init(self._llama.model, str(file).encode())
            if not handle:
                raise InputError(f"lora {name}: {file} is no GGUF adapter that fits this model")
            found[name] = handle
        return found

    def _open_store(self, file: Path, settings: ServeSettings) -> PrefixStore:
        return PrefixStore(
            _fingerprint(file, settings, self._long_or_short(), self.version),
            settings.cache_ram_bytes,
            settings.cache_dir,
            settings.cache_disk_bytes,
            whole=not self.can_cut,
        )

    def _long_or_short(self) -> int | None:
        """The context that rotary factors are chosen by, where a model has some for a long one, some for a short."""
        if self._llama.metadata("{arch}.rope.scaling.original_context_length") is None:
            return None
        return self._cells.total if self._cells.shared else self._cells.context

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
        return "" if token < 0 else self._llama.piece(token, special=True).decode("utf-8", "replace")


def _cells(file: Path, settings: ServeSettings) -> Cells:
    """How many cells to make; where neither they nor the context are named, what half the free memory holds."""
    dry = Llama(file, LlamaSettings(context=BATCH, kv=settings.kv_types, dry=True))
    try:
        trained = dry.api.llama_model_n_ctx_train(dry.model)
        affordable = (psutil.virtual_memory().available - file.stat().st_size) // 2 // max(1, dry.kv_bytes_per_token())
    finally:
        dry.close()
    most = int(trained * (settings.rope_scale or 1))
    if settings.context is not None and settings.context > most:
        raise InputError(f"context {settings.context}: this model was trained for {trained} tokens at most")
    context = settings.context or max(min(most, affordable), min(most, BATCH))
    total = settings.cells or context * settings.parallel
    if settings.cells is None and settings.context is None:
        total = max(context, min(total, affordable))
    if total < context:
        raise InputError(f"cells {total}: must be at least the context, {context}")
    return Cells(context, total, shared=total < context * settings.parallel)


def _llama_settings(settings: ServeSettings, cells: Cells, batch: int, outputs: int) -> LlamaSettings:
    total = cells.total if cells.shared else cells.context * settings.parallel
    return LlamaSettings(
        total,
        settings.parallel,
        batch=batch,
        outputs=outputs,
        threads=settings.threads,
        kv=settings.kv_types,
        windowed=True,
        unified=cells.shared,
        rope=None if settings.rope_scaling == "none" else settings.rope_scaling,
        rope_scale=settings.rope_scale or 1.0,
    )


def _fingerprint(file: Path, settings: ServeSettings, context: int | None, version: str) -> str:
    """What keys and values depend on. The file counts by its size, its time and its beginning, not to read it all."""
    facts = file.stat()
    with open(file, "rb") as source:
        start = hashlib.sha256(source.read(2**20)).hexdigest()
    adapters = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in settings.adapters]
    scaling = (settings.rope_scaling, settings.rope_scale, context)
    told = (version, start, facts.st_size, facts.st_mtime_ns, settings.kv, scaling, adapters)
    return hashlib.sha256(repr(told).encode()).hexdigest()
