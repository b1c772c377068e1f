"""What the server needs of a tokenizer that transformers loads."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from llmlite.errors import InputError
from llmlite.evals.hf import prefix_token


class Vocabulary:
    """What the server needs of a tokenizer that transformers loads: ids of a text, bytes of an id."""

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise InputError(f"{path}: its tokenizer has no tokenizer.json, which the server needs to stream text")
        decoder = tokenizer.backend_tokenizer.decoder
        kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"Metaspace", "ByteFallback", "Replace"}:
            raise InputError(
                f"{path}: a tokenizer that decodes by {', '.join(sorted(kinds)) or 'nothing'} is unknown here"
            )
        self._added = tokenizer.added_tokens_decoder
        self.bos = prefix_token(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids; names of special tokens become them, nothing is added."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def token_bytes(self, token: int, special: bool) -> bytes:
        added = self._added.get(token)
        if added is not None and added.special:
            return added.content.encode() if special else b""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the embedding has more rows than the tokenizer has tokens
            return b""
        if self._byte_level:
            if added is not None:  # stands for its own letters, which may look like GPT-2's for bytes
                return added.content.encode()
            table = _byte_of_character()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def end_tokens(generation: int | list[int] | None, config: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a reply: generation_config's, config's and the tokenizer's (chat models differ in them)."""
    ends: set[int] = set()
    for source in (generation, config, tokenizer.eos_token_id):
        ends |= set(source) if isinstance(source, list) else {source} if source is not None else set()
    return frozenset(ends)


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    nested = (_decoder_kinds(inner) for inner in decoder.get("decoders", []))
    return {decoder["type"]}.union(*nested)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, every other byte for a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}
