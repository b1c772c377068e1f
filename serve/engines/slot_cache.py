"""A cache of keys and values for many sequences of unequal lengths, which the models of transformers take as theirs.

Each layer has one tensor for all slots and is written in place. A forward works on some of the slots; `Rows` says
which, and where each goes on. Layers with a sliding window keep everything, so that any position can be taken back,
and read no more than their window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmlite.serve.engines.base import NoRoom
from llmlite.serve.engines.stored import Codec, Store

RAGGED = 1.5
"""Sequences share one call of attention unless that reads so many times what they need; then each has its own."""


@dataclass(frozen=True)
class Rows:
    """The sequences of one forward: slot and first position of each, ascending by slot.

    All have ``width`` places; what a row does not need of them is written past its end, where nothing reads it.
    ``split``: each row has an attention of its own over its own slot, not padded to the longest. On the device are
    ``index``, the slots int64 [rows], and ``positions`` int64 [rows, width].
    """

    slots: list[int]
    starts: list[int]
    width: int
    split: bool
    index: Tensor
    positions: Tensor

    @staticmethod
    def of(slots: list[int], starts: list[int], width: int, device: torch.device, may_split: bool) -> Rows:
        needed = sum(starts) + width * len(starts)
        apart = slots[-1] - slots[0] >= len(slots)
        uneven = len(slots) * (max(starts) + width) > RAGGED * needed
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        index = torch.tensor(slots, device=device)
        return Rows(slots, starts, width, may_split and (apart or uneven), index, positions)

    @property
    def alone(self) -> bool:
        return len(self.slots) == 1

    @property
    def end(self) -> int:
        """One past the last position that any row writes."""
        return max(self.starts) + self.width

    def begin(self, window: int | None) -> int:
        """The first position that any row reads."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def causal(self, window: int | None) -> bool:
        """Whether each new token sees all the keys up to its own, so that attention needs no mask."""
        if self.width == 1:
            return self.split or self.alone
        return self.alone and self.starts[0] == 0 and (window is None or self.width <= window)

    def mask(self, window: int | None) -> Tensor:
        """Which of the keys that are read each new token sees, bool [rows, 1, width, keys]."""
        keys = torch.arange(self.begin(window), self.end, device=self.positions.device)
        places = self.positions[:, None, :, None]
        seen = keys <= places
        return seen if window is None else seen & (keys > places - window)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values; ``window`` None: each token sees all before it."""

    def __init__(self, stores: tuple[Store, Store], window: int | None) -> None:
        super().__init__()
        self.stores = stores
        self.window = window
        self.is_sliding = window is not None
        self.rows: Rows | None = None
        self.device = torch.device("cpu")
        self._places: tuple[Tensor | int, Tensor | slice] = (0, slice(0))
        self._slots: slice | Tensor = slice(0)

    def use(self, rows: Rows) -> None:
        """The next update is of these rows."""
        self.rows = rows
        first, low, high = rows.starts[0], rows.slots[0], rows.slots[-1] + 1
        self._places = (low, slice(first, first + rows.width)) if rows.alone else (rows.index, rows.positions)
        self._slots = slice(low, high) if high - low == len(rows.slots) else rows.index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.shape_like(states[:1])
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions; keys and values [rows, heads, positions, head_dim] that are to be seen.

        Where attention is split, what can be read in place has all slots for rows.
        """
        assert self.rows is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.reserve(self.rows.end, [])
        begin, end = self.rows.begin(self.window), self.rows.end
        found = []
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.write(*self._places, states)
            everything = self.rows.split and store.in_place(states.dtype)
            found.append(store.read(slice(None) if everything else self._slots, begin, end, states.dtype))
        return found[0], found[1]

    def reserve(self, positions: int, lengths: list[int]) -> None:
        if self.is_initialized:
            for store in self.stores:
                store.reserve(positions, lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.rows is not None
        begin = self.rows.begin(self.window)
        return self.rows.end - begin, begin

    def get_seq_length(self) -> int:
        return 0 if self.rows is None else max(self.rows.starts)

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of all layers. ``windows``: each layer's sliding window; ``limit``: most positions of a slot.

    ``spare``: how far past a row's own tokens a forward may write.
    """

    def __init__(
        self, windows: list[int | None], codecs: tuple[Codec, Codec], slots: int, limit: int, spare: int
    ) -> None:
        limit += spare
        keys, values = codecs
        self._own = [SlotLayer((Store(keys, slots, limit), Store(values, slots, limit)), window) for window in windows]
        super().__init__(layers=list(self._own))
        self.windows = windows
        self.lengths = [0] * slots
        self._spare = spare

    def affordable(self) -> tuple[int, int]:
        """How many positions half of the free memory holds: of one slot, and of all.

        On a CPU only what is written to takes memory; on a GPU all slots are as long as the longest one.
        """
        device, slots = self._own[0].device, len(self.lengths)
        size = sum(store.position_bytes for layer in self._own for store in layer.stores)
        if device.type == "cuda":
            each = torch.cuda.mem_get_info(device)[0] // 2 // (size * slots)
            return each, each * slots
        each = psutil.virtual_memory().available // 2 // size
        return each, each

    @torch.inference_mode()
    def reserve(self, positions: int) -> None:
        """Memory for so many positions in each slot. What was written past the lengths is lost. Raises `NoRoom`."""
        try:
            for layer in self._own:
                layer.reserve(positions, self.lengths)
        except torch.OutOfMemoryError as error:
            raise NoRoom(f"the device has no memory for a cache of {positions} positions a slot") from error

    def use(self, rows: Rows) -> None:
        """The next forward is of these rows."""
        for layer in self._own:
            layer.use(rows)

    @torch.inference_mode()
    def cut_slot(self, slot: int, length: int) -> None:
        """Forget a slot's positions from ``length`` on."""
        if length == 0:  # what overflowed in it must not reach a neighbour that is padded to its length
            for layer in self._own:
                for store in layer.stores:
                    for part in store.parts(slot, self.lengths[slot] + self._spare):
                        part.zero_()
        self.lengths[slot] = length

    def save_slot(self, slot: int) -> bytes:
        """What a slot holds, as a safetensors file with tensors LAYER.k.PART and LAYER.v.PART [heads, length, ...]."""
        length = self.lengths[slot]
        tensors = {
            f"{number}.{kind}.{part}": values.contiguous()
            for number, layer in enumerate(self._own)
            for kind, store in zip("kv", layer.stores, strict=True)
            for part, values in enumerate(store.parts(slot, length))
        }
        return save_tensors(tensors)

    @torch.inference_mode()
    def load_slot(self, slot: int, state: bytes, make_room: Callable[[int], None]) -> None:
        """Put what `save_slot` gave into a slot, ``make_room`` having found place for its positions."""
        tensors = load_tensors(state)
        length = tensors["0.k.0"].shape[1]
        make_room(length)
        self.reserve(length)
        for number, layer in enumerate(self._own):
            for kind, store in zip("kv", layer.stores, strict=True):
                for part, place in enumerate(store.parts(slot, length)):
                    place.copy_(tensors[f"{number}.{kind}.{part}"])
        self.lengths[slot] = length

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int, length: int) -> None:
        """The first positions of one slot to another one."""
        for layer in self._own:
            for store in layer.stores:
                for old, new in zip(store.parts(source, length), store.parts(target, length), strict=True):
                    new.copy_(old)
        self.lengths[target] = length


def split_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' own attention by PyTorch, row by row where the rows of this forward are to be split.

    query [rows, heads, width, head_dim]; returns [rows, width, heads, head_dim].
    """
    rows, windows = options.pop("rows", None), options.pop("windows", None)
    if rows is None or not rows.split:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = windows[module.layer_idx]
    begin = rows.begin(window)
    out = []
    for row, (slot, start) in enumerate(zip(rows.slots, rows.starts, strict=True)):
        place = row if key.shape[0] == len(rows.slots) else slot
        low = 0 if window is None else max(0, start - window + 1) - begin
        seen = slice(low, start + rows.width - begin)
        mask = None if attention_mask is None or rows.width == 1 else attention_mask[row : row + 1, :, :, seen]
        keys, values = key[place : place + 1, :, seen], value[place : place + 1, :, seen]
        out.append(sdpa_attention_forward(module, query[row : row + 1], keys, values, mask, **options)[0])
    return torch.cat(out), None
