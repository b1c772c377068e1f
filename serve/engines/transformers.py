"""Safetensors checkpoints, quantized or not, run by transformers: each slot has a cache of its own that grows."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmlite.errors import InputError
from llmlite.evals.hf import load_transformers, prefix_token
from llmlite.serve.engines import chat_template
from llmlite.serve.engines.base import ChatTemplateError, Sequence, Slots, with_bos
from llmlite.serve.settings import ServeSettings


class TransformersEngine:
    """See `Engine`. Steps run one sequence at a time, so a reply does not depend on what runs beside it."""

    name = "transformers"
    version = transformers.__version__

    def __init__(self, path: Path, settings: ServeSettings) -> None:
        self._model, self._tokenizer = load_transformers(path, settings.threads)
        self._vocabulary = Vocabulary(self._tokenizer, path)
        config = self._model.config.get_text_config(decoder=True)
        self.context = _context(path, config.to_dict().get("max_position_embeddings"), settings.context)
        self.vocab_size: int = config.vocab_size
        self.slots = settings.parallel
        self.eos = _end_tokens(self._model.generation_config.eos_token_id, config.eos_token_id, self._tokenizer)
        layers = DynamicCache(config=config).layers
        self._pool = Slots(self.slots, reusable=all(type(layer) is DynamicLayer for layer in layers))
        self._caches = [DynamicCache(config=config) for _ in range(self.slots)]
        self._config = config
        self._trims_head = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def encode(self, text: str) -> list[int]:
        return with_bos(self._vocabulary.encode(text), self._vocabulary.bos)

    @property
    def tool_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template.get("tool_use", template.get("default")) if isinstance(template, dict) else template

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise ChatTemplateError(chat_template.NO_TEMPLATE)
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise chat_template.refused(error) from error
        return self._vocabulary.encode(text)

    def token_bytes(self, token: int, special: bool) -> bytes:
        return self._vocabulary.token_bytes(token, special)

    def open(self, prompt: list[int], reuse: bool = True) -> Sequence:
        sequence = self._pool.take(prompt, reuse)
        self._cut(sequence)
        return sequence

    def prefill(self, sequence: Sequence, tokens: list[int], every_row: bool) -> np.ndarray:
        rows = self._forward(sequence, tokens, len(tokens) if every_row else 1)
        sequence.prefilled += len(tokens)
        return rows

    def step(self, sequences: list[Sequence], tokens: list[int]) -> np.ndarray:
        return np.concatenate([self._forward(s, [token], 1) for s, token in zip(sequences, tokens, strict=True)])

    def close(self, sequence: Sequence, keep: bool) -> None:
        self._pool.put_back(sequence, keep)
        self._cut(sequence)

    def close_model(self) -> None:
        del self._model, self._caches

    @torch.inference_mode()
    def _forward(self, sequence: Sequence, tokens: list[int], rows: int) -> np.ndarray:
        head = {"logits_to_keep": rows} if self._trims_head else {}
        ids = torch.tensor([tokens], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=self._caches[sequence.slot], use_cache=True, **head)
        sequence.tokens += tokens
        return out.logits[0, -rows:].float().cpu().numpy()

    def _cut(self, sequence: Sequence) -> None:
        """Leave in the slot's cache what the sequence has of tokens."""
        if not sequence.tokens:
            self._caches[sequence.slot] = DynamicCache(config=self._config)
            return
        extra = self._caches[sequence.slot].get_seq_length() - len(sequence.tokens)
        if extra:
            self._caches[sequence.slot].crop(-extra)


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


def _context(path: Path, trained: int | None, wanted: int | None) -> int:
    if trained is None and wanted is None:
        raise InputError(f"{path}: its config.json does not say how long a context it takes; name one")
    if trained is not None and wanted is not None and wanted > trained:
        raise InputError(f"context {wanted}: this model was trained for {trained} tokens at most")
    return wanted or trained or 0


def _end_tokens(generation: int | list[int] | None, config: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
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
