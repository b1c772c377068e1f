"""An artifact that answers, one request at a time, and tells what memory that took: one class per engine.

Prompts are read in chunks of 512 tokens, as servers do it. Each object belongs in a process of its own, because a
process's peak is of everything in it. With a ``limit`` the run gets no more than that many bytes, and says so with
`NoRoomError`.
"""

from __future__ import annotations

import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmlite.errors import LlmliteError, OutsideError
from llmlite.evals.devices import gpu_memory
from llmlite.evals.memory import MemoryAt, NoRoomError, address_space_bytes, forget_peak, resident_bytes
from llmlite.evals.speed import ANSWER_TOKENS, PROMPT_TOKENS

M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Limit:
    """``budget``: bytes that the run may have, on a CPU the program included. ``untouched``: bytes of address space
    that the program and its threads reserve and never use (see `Prediction`); they don't count."""

    budget: int
    untouched: int


def give_back_freed() -> None:
    """Large blocks of memory go back to the system when they are freed, so that holes in the heap count for nothing.

    glibc moves its threshold for that up, from 128 KiB to 32 MiB, as a process frees blocks (mallopt(3),
    M_MMAP_THRESHOLD); this fixes it where it begins. In a heap with holes a growing cache takes up to 60% more.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)


def keep_freed() -> None:
    """Large blocks stay in the process when they are freed, as glibc does it in the long run: faster."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)


def limit_address_space(bytes_: int) -> None:
    """No more address space than this for the process from here on: an allocation beyond it fails."""
    resource.setrlimit(resource.RLIMIT_AS, (bytes_, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # no dump where it ends


class LlamaRunner:
    """llama.cpp, set up as a server would: logits of one position only; on a GPU where the library has one."""

    gpu: str | None = None  # its UUID, which llama.cpp does not tell

    def __init__(self, file: Path, threads: int | None, context: int, limit: Limit | None = None):
        from llmlite.evals.llama import Llama, LlamaSettings, library

        self.api, _ = library()
        before = gpu_memory(self.api)
        self.on_gpu, self.free_before = before is not None, before.free if before else 0
        self.program = 0 if self.on_gpu else resident_bytes()
        if limit is not None and not self.on_gpu:  # on a GPU another process holds the rest of it
            limit_address_space(limit.budget + limit.untouched)
        positions = context + ANSWER_TOKENS
        settings = LlamaSettings(
            context=positions, batch=PROMPT_TOKENS, outputs=1, threads=threads, mmap=False, windowed=True
        )
        try:
            self.llama = Llama(file, settings)
        except LlmliteError as error:
            if limit is not None and "alloc" in str(error):
                raise NoRoomError(str(error)) from None
            raise
        self.vocab_size = self.llama.vocab_size
        self.length = 0

    def prompt(self, tokens: np.ndarray) -> int:
        self.llama.clear()
        self.length = 0
        for start in range(0, len(tokens), PROMPT_TOKENS):
            token = self._read(tokens[start : start + PROMPT_TOKENS])
        return token

    def step(self, token: int) -> int:
        return self._read(np.array([token]))

    def _read(self, tokens: np.ndarray) -> int:
        wanted = np.zeros(len(tokens), np.int8)
        wanted[-1] = 1
        logits = self.llama.decode(tokens, self.length, wanted)
        self.length += len(tokens)
        return int(logits[0].argmax())

    def weights(self) -> tuple[int, int]:
        """Bytes of the tensors, and bytes of cache per position."""
        return self.llama.api.llama_model_size(self.llama.model), self.llama.kv_bytes_per_token()

    def memory(self, context: int) -> MemoryAt:
        sizes, now = self.llama.buffers, gpu_memory(self.api)
        if now is not None:  # llama.cpp allocates all of it beforehand, so what is taken at the end is the peak
            driver = self.free_before - now.free
            return MemoryAt(context, sizes.kv, sizes.compute, driver, driver=driver)
        peak, space = resident_bytes(peak=True), address_space_bytes(peak=True)
        return MemoryAt(context, sizes.kv, sizes.compute, peak, address_space=space)

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"


class TransformersRunner:
    """transformers, greedy by hand with its own cache."""

    def __init__(self, path: Path, threads: int | None, context: int, limit: Limit | None = None):
        import torch
        import transformers  # noqa: F401 (counts as the program)

        from llmlite.evals.hf import load_transformers

        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        self.program = 0 if self.on_gpu else resident_bytes()
        give_back_freed()
        self.gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if self.on_gpu else None
        self.free_before = torch.cuda.mem_get_info()[0] if self.on_gpu else 0
        if limit is not None and self.on_gpu:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit.budget / torch.cuda.mem_get_info()[1]))
        try:
            self.model, _ = load_transformers(path, threads)
        except OutsideError as error:  # it does not fit
            if limit is not None:
                raise NoRoomError(str(error)) from None
            raise
        self.vocab_size = self.model.config.get_text_config().vocab_size
        self.cache: Any = None
        self.loaded = self.loading_peak = 0
        if not self.on_gpu:
            self._settle(limit)

    def _settle(self, limit: Limit | None) -> None:
        """Bring all of the model into memory, so that what comes next is the run's own, and set the limit on that.

        Loading itself has no limit: transformers maps the files twice and touches each page once, so its address
        space says nothing. What loading took is compared afterwards.
        """
        for storage in self._storages():
            self.torch.empty(0, dtype=self.torch.uint8).set_(storage)[::4096].sum()
        self.prompt(np.zeros(1, np.int64))  # starts the threads, which reserve address space
        self.cache = None
        # the system may have taken back pages of the weights, which are only mapped
        self.loaded = max(resident_bytes(), self.program + self.weights()[0])
        self.loading_peak = resident_bytes(peak=True)
        forget_peak()
        if limit is not None:
            if self.loading_peak > limit.budget:
                raise NoRoomError(f"to load it takes {self.loading_peak:,} bytes")
            limit_address_space(address_space_bytes() + limit.budget - self.loaded)

    def _storages(self) -> list[Any]:
        """Each piece of memory of the weights once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return list({tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors}.values())

    def prompt(self, tokens: np.ndarray) -> int:
        self.cache = None
        for start in range(0, len(tokens), PROMPT_TOKENS):
            token = self._read(tokens[start : start + PROMPT_TOKENS])
        return token

    def step(self, token: int) -> int:
        return self._read(np.array([token]))

    def _read(self, tokens: np.ndarray) -> int:
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens)[None].to(self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def weights(self) -> tuple[int, int]:
        """Bytes of the tensors as loaded, tied ones once, and bytes of cache per position."""
        from llmlite.evals.hf import kv_bytes_per_token

        tensors = [*self.model.parameters(), *self.model.buffers()]
        weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        return weights, kv_bytes_per_token(self.model)

    def memory(self, context: int) -> MemoryAt:
        kv = sum(tensor.nbytes for layer in self.cache.layers for tensor in (layer.keys, layer.values))
        if self.on_gpu:
            cuda = self.torch.cuda
            peak, reserved = cuda.max_memory_allocated(), cuda.max_memory_reserved()
            driver = self.free_before - cuda.mem_get_info()[0]
            return MemoryAt(context, kv, peak - self.weights()[0] - kv, peak, reserved=reserved, driver=driver)
        run = resident_bytes(peak=True)
        activations = max(0, run - self.loaded - kv)
        peak = max(run, self.loading_peak)
        return MemoryAt(context, kv, activations, peak, address_space=address_space_bytes(peak=True))

    @property
    def device(self) -> str:
        return self.model.device.type
