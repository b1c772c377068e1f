"""Types of the key and value cache, by llama.cpp's names: ``K:V``, as in q8_0:q4_0."""

from __future__ import annotations

from dataclasses import dataclass

from llmlite.errors import InputError

# Bits of one stored value, scales included: the types that llama.cpp's --cache-type-k and --cache-type-v know.
KV_BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5,
    "iq4_nl": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class KvTypes:
    """What a cache stores: ``keys`` and ``values``, each a name of `KV_BITS`."""

    keys: str
    values: str

    def __str__(self) -> str:
        return f"{self.keys}:{self.values}"

    def nbytes(self, keys: int, values: int) -> float:
        """Bytes of so many key and value elements."""
        return (keys * KV_BITS[self.keys] + values * KV_BITS[self.values]) / 8


F16, F32 = KvTypes("f16", "f16"), KvTypes("f32", "f32")


def parse_kv(text: str) -> KvTypes:
    """``K:V``, or one name for both; `InputError` for a type that is unknown."""
    keys, colon, values = text.partition(":")
    types = KvTypes(keys, values if colon else keys)
    for name in (types.keys, types.values):
        if name not in KV_BITS:
            raise InputError(f"kv {text!r}: {name!r} is no type of a cache; K:V is right, of {', '.join(KV_BITS)}")
    return types
