"""Embeddings by llama.cpp: a second context on the weights that are loaded, with its outputs the hidden states.

The states are taken token by token and pooled here, so a text of any length runs in chunks between which others have
their turn; llama.cpp's own pooling wants a whole text in one micro-batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from llmlite.errors import InputError, OutsideError
from llmlite.evals.llama import Batch, Llama
from llmlite.serve.engines.base import EngineBroken
from llmlite.serve.engines.pooling import CHUNK, Pool, Pooling

POOLING: dict[str | None, Pooling] = {None: "mean", "0": "mean", "1": "mean", "2": "cls", "3": "last"}
"""By the file's ``{arch}.pooling_type``; a language model's has none."""


class LlamaEmbedder:
    """A context of ``positions`` tokens for one text at a time. Used on the engine thread alone."""

    def __init__(self, llama: Llama, positions: int) -> None:
        self._api = api = llama.api
        kind = llama.metadata("{arch}.pooling_type")
        if kind not in POOLING:
            raise InputError(f"this model ranks texts (pooling type {kind}); it makes no embeddings")
        self._pooling = POOLING[kind]
        self.width: int = api.llama_model_n_embd(llama.model)
        params = api.llama_context_default_params()
        params.n_ctx = positions
        params.n_seq_max = 1
        params.n_batch = params.n_ubatch = params.n_outputs_max = min(CHUNK, positions)
        params.embeddings = True
        params.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        threads = api.llama_n_threads(llama.context)
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(llama.model, params)
        if not self._context:
            raise OutsideError(f"{llama.file}: llama.cpp can't make a second context of {positions:,} positions")
        self._batch = Batch(api, CHUNK)

    def embed(self, prompts: list[list[int]]) -> Iterator[np.ndarray | None]:
        """See `Engine.embed`."""
        rows = []
        for prompt in prompts:
            pool = Pool(self._pooling, self.width)
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
            for begin in range(0, len(prompt), CHUNK):
                pool.take(self._states(prompt[begin : begin + CHUNK], begin))
                yield None
            rows.append(pool.vector())
        yield np.stack(rows)

    def close(self) -> None:
        self._api.llama_free(self._context)

    def _states(self, tokens: list[int], begin: int) -> np.ndarray:
        self._batch.fill(np.asarray(tokens, np.int32), begin, np.ones(len(tokens), np.int8))
        status = self._api.llama_decode(self._context, self._batch.struct)
        if status < -1:
            raise EngineBroken(f"llama.cpp failed while it computed (llama_decode gave {status})")
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        states = self._api.llama_get_embeddings(self._context)
        if not ctypes.cast(states, ctypes.c_void_p):
            raise EngineBroken("llama.cpp gave no hidden states")
        return np.ctypeslib.as_array(states, shape=(len(tokens), self.width))
