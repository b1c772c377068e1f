"""Which slots of an engine's cache are free, what each still holds, and how a new prompt makes use of that.

A sequence that ends leaves its tokens in its slot. A new prompt goes where most of it is: the idle slot whose tokens
agree longest, or a copy from a busy slot, or one that was moved to the prefix store (host memory, then disk). What a
slot loses by that is moved to the store first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmlite.serve.engines.base import NoRoom, Sequence
from llmlite.serve.prefixes import PrefixStore, common_length

WORTH = 32
"""Fewer tokens than this are computed again rather than copied or stored."""


class Memory(Protocol):
    """An engine's cache, slot by slot."""

    can_cut: bool

    def cut_slot(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from ``length`` on; 0 empties it, which every engine can."""

    def save_slot(self, slot: int) -> bytes:
        """All keys and values of a slot."""

    def load_slot(self, slot: int, state: bytes) -> None:
        """Put saved keys and values into an empty slot. Raises `NoRoom`."""

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Have the first ``length`` tokens of ``source`` in the empty slot ``target`` too. Raises `NoRoom`."""


@dataclass(eq=False)
class _Slot:
    number: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    adapter: str | None = None
    sequence: Sequence | None = None
    used: int = 0


class Slots:
    """``grain``: prefixes are taken over in multiples of so many tokens; ``store`` None: nothing outlives its slot."""

    def __init__(self, count: int, memory: Memory, store: PrefixStore | None, grain: int = 1) -> None:
        self._slots = [_Slot(number) for number in range(count)]
        self._memory = memory
        self._store = store
        self._grain = grain
        self._clock = 0

    @property
    def used(self) -> int:
        """Tokens of the sequences that run."""
        return sum(len(slot.sequence.tokens) for slot in self._slots if slot.sequence is not None)

    @property
    def kept(self) -> int:
        """Tokens in idle slots."""
        return sum(len(slot.tokens) for slot in self._slots if slot.sequence is None)

    def open(self, prompt: list[int], adapter: str | None, reuse: bool) -> Sequence:
        """A sequence in a free slot, as much of the prompt in it as can be had; there must be a free slot."""
        ids = np.array(prompt, np.int32)
        length, source = self._best(ids, adapter) if reuse else (0, None)
        in_place = source is not None and source.sequence is None
        slot = source if in_place and source is not None else self._free()
        stored = None
        if reuse and self._store is not None:
            stored = self._store.find(ids, adapter)
            if stored is not None and self._whole(stored.length, len(ids)) < length + WORTH:
                stored = None
        self._leave(slot, length if in_place and stored is None else 0)
        sequence = Sequence(slot.number, adapter)
        try:
            if stored is not None and self._store is not None:
                length = self._load(slot, self._store.take(stored), stored.length, len(ids))
            elif source is not None and not in_place:
                self._memory.copy_slot(source.number, slot.number, length)
        except NoRoom:  # then all of the prompt is computed, as there is room for it
            self._memory.cut_slot(slot.number, 0)
            length = 0
        sequence.tokens = prompt[:length]
        sequence.reused = length
        slot.sequence = sequence  # last: the slot stays free where anything above fails
        return sequence

    def close(self, sequence: Sequence, keep: bool) -> None:
        """Free the sequence's slot, if it has one."""
        if sequence.slot is None:
            sequence.state = None
            return
        slot = self._slots[sequence.slot]
        slot.sequence = None
        slot.adapter = sequence.adapter
        slot.tokens = np.array(sequence.tokens if keep else [], np.int32)
        if keep:
            self._clock += 1
            slot.used = self._clock
        else:
            self._memory.cut_slot(slot.number, 0)

    def checkpoint(self, sequence: Sequence) -> None:
        """See `Engine.checkpoint`."""
        tokens = np.array(sequence.tokens, np.int32)
        if self._memory.can_cut or self._store is None or sequence.slot is None or len(tokens) < WORTH:
            return
        if not self._store.has(tokens, sequence.adapter):
            self._store.put(tokens, sequence.adapter, self._memory.save_slot(sequence.slot))

    def suspend(self, sequence: Sequence) -> None:
        """See `Engine.suspend`."""
        assert sequence.slot is not None
        slot = self._slots[sequence.slot]
        sequence.state = self._memory.save_slot(slot.number)
        self._memory.cut_slot(slot.number, 0)
        slot.sequence, slot.tokens = None, np.empty(0, np.int32)
        sequence.slot = None

    def resume(self, sequence: Sequence) -> None:
        """See `Engine.resume`."""
        assert sequence.state is not None
        slot = self._free()
        self._leave(slot, 0)
        self._memory.load_slot(slot.number, sequence.state)
        slot.sequence, sequence.slot, sequence.state = sequence, slot.number, None

    def evict(self) -> bool:
        """Empty the idle slot that was not used for longest, to make room; False where none holds anything."""
        idle = [slot for slot in self._slots if slot.sequence is None and len(slot.tokens)]
        if not idle:
            return False
        self._leave(min(idle, key=lambda slot: slot.used), 0)
        return True

    def store_all(self) -> None:
        """Move what idle slots hold to the store, at the end of a server's life."""
        while self.evict():
            pass

    def _best(self, ids: np.ndarray, adapter: str | None) -> tuple[int, _Slot | None]:
        """The slot that has most of the prompt, an idle one if it has as much; (0, None) where none is worth it."""
        best, found = 0, None
        for slot in self._slots:
            if slot.sequence is None:
                length = self._agree(slot.tokens, slot.adapter, ids, adapter)
                worth = length > 0 and length >= best
            else:
                running = np.array(slot.sequence.tokens, np.int32)
                length = self._agree(running, slot.sequence.adapter, ids, adapter)
                worth = self._memory.can_cut and length >= WORTH and length > best
            if worth:
                best, found = length, slot
        return best, found

    def _agree(self, tokens: np.ndarray, theirs: str | None, ids: np.ndarray, adapter: str | None) -> int:
        if theirs != adapter:
            return 0
        length = self._whole(common_length(tokens, ids), len(ids))
        return length if self._memory.can_cut or length == len(tokens) else 0

    def _whole(self, length: int, prompt: int) -> int:
        """What of a common prefix can be taken over: not the prompt's last token, and whole grains."""
        length = min(length, prompt - 1)
        return length - length % self._grain

    def _load(self, slot: _Slot, state: bytes | None, length: int, prompt: int) -> int:
        """Put a stored prefix into the slot; how much of it is left of use."""
        if state is None:  # its file is gone or damaged
            return 0
        self._memory.load_slot(slot.number, state)
        kept = self._whole(length, prompt)
        if not self._memory.can_cut and kept < length:
            kept = 0
        self._memory.cut_slot(slot.number, kept)  # also what the state has behind the common tokens
        return kept

    def _free(self) -> _Slot:
        """The first idle slot: sequences that stand close together run faster, and what it holds is not lost."""
        return next(slot for slot in self._slots if slot.sequence is None)

    def _leave(self, slot: _Slot, keep: int) -> None:
        """Leave the first ``keep`` tokens in an idle slot; if much is lost by that, all of it is stored first."""
        lost = len(slot.tokens) - keep
        if lost >= WORTH and self._store is not None and not self._store.has(slot.tokens, slot.adapter):
            self._store.put(slot.tokens, slot.adapter, self._memory.save_slot(slot.number))
        if lost or not keep:
            self._memory.cut_slot(slot.number, keep)
        slot.tokens = slot.tokens[:keep]
