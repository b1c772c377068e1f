"""llama.cpp through the low-level API of llama-cpp-python: load, tokenize, decode a batch, read its logits.

Knows nothing of torch. ``api`` is the module llama_cpp; ``model``, ``vocab`` and ``context`` are its raw handles,
for whoever needs a function that has no method here.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llmlite.errors import InputError, OutsideError
from llmlite.evals.kv import F16, F32, KvTypes
from llmlite.extras import need

LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
BF16 = 30  # GGML_TYPE_BF16 in ggml.h, which the module llama_cpp lacks
NO_ROOM = 1  # what llama_decode returns when the cache has no slot left; its state is then as before the call
# llama.cpp says how large its parts are only in its log: "CPU compute buffer size = 15.51 MiB", and of the cache, also
# where nothing is allocated, "llama_kv_cache: size = 45.00 MiB (2048 cells, ...".
BUFFER = re.compile(r"(\S+)\s+(compute|output) buffer size =\s*([\d.]+) MiB")
CACHE = re.compile(r"^llama_(?:kv_cache|memory_recurrent): size =\s*([\d.]+) MiB \(")

_log: deque[str] = deque(maxlen=20)
_sizes: list[str] = []


@cache
def library() -> tuple[ModuleType, object]:
    """The module llama_cpp, its log kept off the terminal, and the callback that must outlive it."""
    api = need("gguf", "llama_cpp")

    def keep(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == LOG_ERROR:
            _log.append(line)
        elif BUFFER.search(line) or CACHE.search(line):
            _sizes.append(line)

    callback = api.llama_log_callback(keep)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api, callback


@dataclass(frozen=True)
class LlamaSettings:
    """What a context is made for.

    ``context``: positions, all sequences together, None for as many as the model was trained for in each of them;
    ``batch``: most tokens of one decode; ``outputs``: most rows of logits of one decode (each takes vocabulary x 4
    bytes); ``threads``: None takes every core this process may use; ``mmap``: False reads the weights into memory
    of the process's own; ``as_trained``: True refuses a sequence longer than the model was trained for; ``kv``:
    what the cache stores; ``dry``: True reads the file's header only and allocates nothing: it tells sizes, and can't
    decode; ``windowed``: True keeps of a layer with a sliding window only the window, as llama.cpp's server does, False
    every position; ``unified``: True shares all positions among the sequences, False gives each its equal part;
    ``rope``: "linear" or "yarn" scales positions to a context ``rope_scale`` times longer than trained, None leaves it
    to the model.
    """

    context: int | None = 2048
    sequences: int = 1
    batch: int = 512
    outputs: int = 512
    threads: int | None = None
    mmap: bool = True
    as_trained: bool = False
    kv: KvTypes = F16
    dry: bool = False
    windowed: bool = False
    unified: bool = False
    rope: str | None = None
    rope_scale: float = 1.0


@dataclass(frozen=True)
class Buffers:
    """Bytes, to 0.01 MiB as llama.cpp tells them: the cache, and what computing takes (intermediates, one decode's
    logits)."""

    kv: int
    compute: int


class Llama:
    """A GGUF file loaded by llama.cpp, with one context on it. Not safe for use by two threads at once."""

    def __init__(self, file: Path, settings: LlamaSettings):
        self.api, _ = library()
        self.file = file
        self.settings = settings
        self.context: int | None = None
        self.model: int | None = self._load_model()
        self.vocab = self.api.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.api.llama_vocab_n_tokens(self.vocab)
        self._lora: Any = None
        self.context = self._new_context()
        self.batch = Batch(self.api, settings.batch)

    @property
    def bos(self) -> int | None:
        """The token that the vocabulary wants in front of every text, None where it wants none."""
        return self.api.llama_vocab_bos(self.vocab) if self.api.llama_vocab_get_add_bos(self.vocab) else None

    def _load_model(self) -> int:
        with _open(self.file) as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{self.file}: does not begin with GGUF: not a GGUF file")
        params = self.api.llama_model_default_params()
        mapped = self.settings.mmap and not self.settings.dry
        params.load_mode = self.api.LLAMA_LOAD_MODE_MMAP if mapped else self.api.LLAMA_LOAD_MODE_NONE
        params.no_alloc = self.settings.dry
        _log.clear()
        model = self.api.llama_model_load_from_file(os.fsencode(self.file), params)
        if not model:
            raise InputError(f"{self.file}: llama.cpp can't load it ({_reason()})")
        return model

    def _new_context(self) -> int:
        wanted = self.settings
        params = self.api.llama_context_default_params()
        trained = self.api.llama_model_n_ctx_train(self.model)
        positions = wanted.context or wanted.sequences * trained
        each = positions if wanted.unified else positions // wanted.sequences
        if wanted.as_trained and wanted.rope is None and each > trained:
            self.close()
            raise InputError(f"context {each}: this model was trained for {trained} tokens at most")
        params.n_ctx = positions
        params.n_seq_max = wanted.sequences
        params.n_batch = params.n_ubatch = min(wanted.batch, positions)
        params.n_outputs_max = min(wanted.outputs, wanted.batch, positions)
        params.type_k, params.type_v = (self._type(name) for name in (wanted.kv.keys, wanted.kv.values))
        if wanted.kv == F32:  # flash attention on a CPU computes in float16, whatever is stored
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = not wanted.windowed
        params.kv_unified = wanted.unified
        if wanted.rope is not None:
            params.rope_scaling_type = int(getattr(self.api, f"LLAMA_ROPE_SCALING_TYPE_{wanted.rope.upper()}"))
            params.rope_freq_scale = 1 / wanted.rope_scale
        params.n_threads = params.n_threads_batch = wanted.threads or len(os.sched_getaffinity(0))
        _log.clear()
        _sizes.clear()
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            self.close()
            raise OutsideError(
                f"{self.file}: llama.cpp can't make a context of {positions:,} positions ({_reason()}); "
                "a smaller context needs less memory"
            )
        self._sizes = tuple(_sizes)
        self._set_lora(context)
        return context

    def use_lora(self, file: Path) -> None:
        """Compute with a LoRA adapter from now on; `InputError` for a file that is no adapter of this model."""
        _log.clear()
        self._lora = self.api.llama_adapter_lora_init(self.model, os.fsencode(file))
        if not self._lora:
            raise InputError(f"{file}: llama.cpp can't load it as an adapter of {self.file} ({_reason()})")
        self._set_lora(self.context)

    def _set_lora(self, context: int | None) -> None:
        if self._lora:
            adapters = (self.api.llama_adapter_lora_p_ctypes * 1)(self._lora)
            self.api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def _type(self, name: str) -> int:
        return BF16 if name == "bf16" else int(getattr(self.api, f"GGML_TYPE_{name.upper()}"))

    def renew(self, positions: int, kv: KvTypes | None = None) -> None:
        """An empty context of another size, and perhaps other types of keys and values, in place of the present one."""
        if self.context:
            self.api.llama_free(self.context)
        self.context = None
        self.settings = replace(self.settings, context=positions, kv=kv or self.settings.kv)
        self.context = self._new_context()

    @property
    def positions(self) -> int:
        """How many positions the context holds, all sequences together."""
        return self.api.llama_n_ctx(self.context)

    @property
    def buffers(self) -> Buffers:
        """How large the context's parts are; `OutsideError` where the library's log does not tell it."""
        return read_buffers(self._sizes)

    def tokenize(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids int32 [n] without anything in front; ``special``: the names of control tokens become them."""
        raw = text.encode()
        out = np.empty(len(raw) + 8, np.int32)  # a token is a byte at least; a leading space may be added
        pointer = out.ctypes.data_as(ctypes.POINTER(self.api.llama_token))
        count = self.api.llama_tokenize(self.vocab, raw, len(raw), pointer, len(out), False, special)
        if count < 0:
            raise InputError(f"{self.file}: llama.cpp can't tokenize a text of {len(raw):,} bytes")
        return out[:count].copy()

    def text_of(self, tokens: np.ndarray) -> str:
        """The text of token ids int [n], control tokens by name; bytes that are no whole character become U+FFFD."""
        ids = np.ascontiguousarray(tokens, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(self.api.llama_token))
        room = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = self.api.llama_detokenize(self.vocab, pointer, len(ids), buffer, room, False, True)
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", "replace")
            room = -length

    def known_tokens(self) -> int:
        """How many ids the tokenizer can name: those at the end that are marked as unused only pad the vocabulary."""
        count = self.vocab_size
        while count and self.api.llama_vocab_get_attr(self.vocab, count - 1) & self.api.LLAMA_TOKEN_ATTR_UNUSED:
            count -= 1
        return count

    def decode(self, tokens: np.ndarray, start: int, wanted: np.ndarray) -> np.ndarray:
        """Append ``tokens`` int [n] to sequence 0 from position ``start``; logits of the rows where ``wanted`` [n].

        The result is float32 [rows, vocab] and lies in llama.cpp's own buffer until the next decode.
        """
        self.batch.fill(tokens, start, wanted)
        _log.clear()
        status = self.api.llama_decode(self.context, self.batch.struct)
        if status == NO_ROOM:
            raise InputError(f"{self.file}: position {start + len(tokens):,} is beyond the context: make it larger")
        if status != 0:
            raise OutsideError(f"{self.file}: llama.cpp failed while it computed (status {status}: {_reason()})")
        rows = int(np.count_nonzero(wanted))
        if rows == 0:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))

    def clear(self) -> None:
        """Forget every position of every sequence."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def cut(self, length: int) -> None:
        """Forget the positions of sequence 0 from ``length`` on. Not for sliding windows and recurrent states."""
        if not self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, length, -1):
            raise OutsideError(f"{self.file}: llama.cpp can't forget positions of this model's cache")

    def state(self) -> bytes:
        """The cache of sequence 0, for `restore`."""
        buffer = (ctypes.c_uint8 * self.api.llama_state_seq_get_size(self.context, 0))()
        return bytes(buffer[: self.api.llama_state_seq_get_data(self.context, buffer, len(buffer), 0)])

    def restore(self, state: bytes) -> None:
        """Put back what `state` gave, into a context that holds at least as many positions of the same types."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self.api.llama_state_seq_set_data(self.context, buffer, len(state), 0):
            raise OutsideError(f"{self.file}: llama.cpp can't take back a cache of {len(state):,} bytes")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; ``special``: those of a control token are its name, else nothing."""
        if self.model is None:
            raise OutsideError(f"{self.file}: the model was freed")
        buffer = ctypes.create_string_buffer(64)
        length = self.api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self.api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length]

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, ``{arch}`` in the key replaced by the architecture."""
        if "{arch}" in key:
            key = key.format(arch=self.metadata("general.architecture"))
        buffer = ctypes.create_string_buffer(1024)
        length = self.api.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one more position takes, all layers, in the types of the context."""
        heads = self.api.llama_model_n_head_kv(self.model)
        default = self.api.llama_model_n_embd(self.model) // self.api.llama_model_n_head(self.model)
        key = int(self.metadata("{arch}.attention.key_length") or default)
        value = int(self.metadata("{arch}.attention.value_length") or default)
        each = self.settings.kv.nbytes(heads * key, heads * value)
        return int(self.api.llama_model_n_layer(self.model) * each)

    def close(self) -> None:
        context, model = self.context, self.model
        self.context = self.model = None
        if context:
            self.api.llama_free(context)
        if model:
            self.api.llama_model_free(model)


def read_buffers(lines: Sequence[str]) -> Buffers:
    """What the log of making a context says; a buffer that was made anew counts as it was made last."""
    found = [match for line in lines if (match := BUFFER.search(line))]
    if not found:
        raise OutsideError("this version of llama.cpp does not log how large its buffers are")
    last = {(match[1], match[2]): float(match[3]) for match in found}
    kv = sum(float(match[1]) for line in lines if (match := CACHE.search(line)))
    return Buffers(round(kv * 2**20), round(sum(last.values()) * 2**20))


class Batch:
    """A llama_batch whose arrays are numpy's: filling 512 tokens takes microseconds, not a Python loop."""

    def __init__(self, api: ModuleType, capacity: int):
        self.token = np.zeros(capacity, np.int32)
        self.position = np.zeros(capacity, np.int32)
        self.sequence = np.zeros(capacity, np.int32)
        self.wanted = np.zeros(capacity, np.int8)
        self._counts = np.ones(capacity, np.int32)
        self._pointers = self.sequence.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self.struct = api.llama_batch(
            n_tokens=0,
            token=_pointer(self.token, api.llama_token),
            pos=_pointer(self.position, api.llama_pos),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(api.llama_seq_id)),
            logits=_pointer(self.wanted, ctypes.c_int8),
        )

    def fill(self, tokens: np.ndarray, start: int, wanted: np.ndarray) -> None:
        """One run of neighbouring positions in sequence 0."""
        n = len(tokens)
        self.token[:n] = tokens
        self.position[:n] = np.arange(start, start + n)
        self.sequence[:n] = 0
        self.wanted[:n] = wanted
        self.struct.n_tokens = n


def _pointer(array: np.ndarray, kind: type) -> object:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _open(file: Path):
    try:
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from None


def _reason() -> str:
    """The first error that llama.cpp logged since the log was cleared: later ones only repeat that it failed."""
    return _log[0].splitlines()[0].rstrip(".:") if _log else "it gives no reason"
