"""What a forward of a transformers model allocates, counted on the meta device: shapes only, no memory, no weights.

Every tensor that an operation makes is counted from when it is made until the last reference to its storage is gone,
which is what an allocator sees. Scaled dot-product attention is counted as the fused kernels of PyTorch work: its
output, the keys and values repeated for the query heads that share them, the mask in the dtype of the queries; no
scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Trace:
    """Bytes: ``kv`` of the whole cache; ``activations``: the peak beside weights and the finished cache."""

    kv: int
    activations: int


def trace_prompt(model: torch.nn.Module, positions: int, chunk: int) -> Trace:
    """The last chunk of a prompt that leaves ``positions`` in the cache.

    ``model``: a causal language model on the meta device; ``chunk``: tokens of one forward. Sizes grow with what is
    in the cache, so the last full chunk is the largest.
    """
    last = min(positions, chunk)
    with torch.inference_mode(), torch.device("meta"), _FusedAttention():
        cache = _forward(model, positions - last, None) if positions > last else None
        with counting(model, cache) as live:
            cache = _forward(model, last, cache)
    kv = sum(tensor.nbytes for tensor in _cached(cache))
    return Trace(kv, max(0, live.peak - kv))


def _forward(model: torch.nn.Module, tokens: int, cache: Any) -> Any:
    ids = torch.empty(1, tokens, dtype=torch.long)
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _cached(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)] if cache is not None else []


@contextmanager
def counting(model: torch.nn.Module, cache: Any) -> Iterator[LiveBytes]:
    """Count what lives beside the model's own tensors; ``cache``, a transformers cache or None, is counted too."""
    live = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.count(tensor.untyped_storage(), 0)
    for tensor in _cached(cache):
        live.count(tensor.untyped_storage())
    with live:
        yield live


class LiveBytes(TorchDispatchMode):
    """``peak``: most bytes of storages alive at once, each counted once, whatever views there are of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage, size: int | None = None) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes() if size is None else size
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Attention without its scores: on the meta device PyTorch would take the kernel that writes them down."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask")
        kept = [mask.to(query.dtype)] if mask is not None else []
        if kwargs.get("enable_gqa"):
            shared = query.shape[-3] // key.shape[-3]
            kept += [key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)]
        return query.new_empty(*query.shape[:-1], value.shape[-1])
