"""Safetensors checkpoints, quantized or not, run by transformers: all sequences of a step in one batched forward."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmlite.errors import InputError
from llmlite.evals.hf import load_transformers
from llmlite.serve.engines import chat_template
from llmlite.serve.engines.adapters import Adapters
from llmlite.serve.engines.base import ChatTemplateError, EngineBroken, NoRoom, Piece, Room, Sequence, with_bos
from llmlite.serve.engines.slot_cache import Rows, SlotCache, split_attention
from llmlite.serve.engines.slots import Slots
from llmlite.serve.engines.stored import codec
from llmlite.serve.engines.transformers_embed import TransformersEmbedder
from llmlite.serve.engines.vocabulary import Vocabulary, end_tokens
from llmlite.serve.prefixes import PrefixStore
from llmlite.serve.settings import ServeSettings
from llmlite.serve.turns import EXACT_CHUNK

ATTENTION = "llmlite"
FEW = 16
"""Pieces of up to so many tokens share a forward, padded to the longest; a longer one has its own."""

SERVED = "transformers models are served with full and sliding attention alone, others as GGUF files, by llama.cpp"
KEPT = (".safetensors", ".json")

DEVICE_LOST: Any = getattr(torch, "AcceleratorError", ())  # younger than the oldest torch that will do

ALL_ATTENTION_FUNCTIONS.register(ATTENTION, split_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


class TransformersEngine:
    """See `Engine`. With ``settings.exact`` each piece has a forward of its own, so that it depends on nothing else."""

    name = "transformers"
    version = transformers.__version__
    batch = 512
    outputs = 128
    can_cut = True

    def __init__(self, path: Path, settings: ServeSettings) -> None:
        if settings.rope_scaling != "none":
            raise InputError("rope_scaling: of a safetensors artifact it is set by rope_parameters in its config.json")
        self._model, self._tokenizer = load_transformers(path, settings.threads)
        self._vocabulary = Vocabulary(self._tokenizer, path)
        config = self._model.config.get_text_config(decoder=True)
        facts = config.to_dict()
        self.context = _context(path, facts.get("max_position_embeddings"), settings.context)
        self._layer_types: list[str] | None = facts.get("layer_types")
        self.vocab_size: int = config.vocab_size
        self.slots = settings.parallel
        self.eos = end_tokens(self._model.generation_config.eos_token_id, config.eos_token_id, self._tokenizer)
        self._total = _total(settings.cells, self.context, self.slots)
        self._exact = settings.exact
        self._one_by_one = settings.exact or _turns_by_length(facts)
        self._adapters = Adapters(self._model, settings.adapters)
        self._embedder = TransformersEmbedder(self._model, config, path, self._adapters)
        self._trims_head = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._splits = config._attn_implementation == "sdpa"
        if self._splits:
            self._model.set_attn_implementation(ATTENTION)
        kv = (None, None) if settings.kv is None else (settings.kv_types.keys, settings.kv_types.values)
        self._cache = SlotCache(_windows(path, config), (codec(kv[0]), codec(kv[1])), self.slots, self.context, FEW)
        self._prefilled: dict[Sequence, int] = {}
        self.store = PrefixStore(
            _fingerprint(path, settings, self.version),
            settings.cache_ram_bytes,
            settings.cache_dir,
            settings.cache_disk_bytes,
        )
        self._pool = Slots(self.slots, self, self.store, EXACT_CHUNK if self._exact else 1)
        self._probe(path)
        if settings.context is None and settings.cells is None:
            self._fit_memory()

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

    def open(self, prompt: list[int], adapter: str | None = None, reuse: bool = True) -> Sequence:
        return self._pool.open(prompt, adapter, reuse)

    def step(self, pieces: Items[Piece]) -> list[np.ndarray]:
        self._make_room(sum(len(piece.tokens) for piece in pieces))
        forwards = [(group, self._rows([pieces[place] for place in group])) for group in self._groups(pieces)]
        self._cache.reserve(max(rows.end for _, rows in forwards))
        self._adapters.use(pieces[0].sequence.adapter)
        found: dict[int, np.ndarray] = {}
        for group, rows in forwards:
            found |= zip(group, self._forward([pieces[place] for place in group], rows), strict=True)
        for piece in pieces:  # from here on nothing fails: what was written past the sequences' ends is theirs
            sequence = piece.sequence
            assert sequence.slot is not None
            if self._exact and (len(piece.tokens) > 1 or sequence not in self._prefilled):
                self._prefilled[sequence] = len(sequence.tokens) + len(piece.tokens)
            sequence.tokens += piece.tokens
            self._cache.lengths[sequence.slot] = len(sequence.tokens)
        return [found[place] for place in range(len(pieces))]

    def cut(self, sequence: Sequence, length: int) -> None:
        assert sequence.slot is not None
        del sequence.tokens[length:]
        self.cut_slot(sequence.slot, length)

    def suspend(self, sequence: Sequence) -> None:
        self._pool.suspend(sequence)

    def resume(self, sequence: Sequence) -> None:
        self._pool.resume(sequence)

    def checkpoint(self, sequence: Sequence) -> None:
        self._pool.checkpoint(sequence)

    def close(self, sequence: Sequence, keep: bool) -> None:
        prefilled = self._prefilled.pop(sequence, 0)
        if self._exact and sequence.slot is not None:  # a generated token's bits differ from those of a prompt's
            self.cut(sequence, min(len(sequence.tokens), prefilled))
        self._pool.close(sequence, keep)

    def room(self) -> Room:
        return Room(self._pool.used, self._pool.kept, self._total, self._total < self.slots * self.context)

    def embed(self, prompts: list[list[int]]) -> Iterator[np.ndarray | None]:
        return self._embedder.embed(prompts)

    def close_model(self) -> None:
        self._pool.store_all()
        self.store.close()
        del self._model, self._cache, self._adapters, self._embedder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def cut_slot(self, slot: int, length: int) -> None:
        """See `Memory`, as of the next three."""
        self._cache.cut_slot(slot, length)

    def save_slot(self, slot: int) -> bytes:
        return self._cache.save_slot(slot)

    def load_slot(self, slot: int, state: bytes) -> None:
        self._cache.load_slot(slot, state, self._make_room)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._make_room(length)
        self._cache.copy_slot(source, target, length)

    def _make_room(self, tokens: int) -> None:
        while self._pool.used + self._pool.kept + tokens > self._total:
            if not self._pool.evict():
                raise NoRoom(f"the cache holds {self._total} tokens, {self._pool.used} of them in use")

    def _groups(self, pieces: Items[Piece]) -> Iterator[list[int]]:
        """The places of the pieces that share a forward, ascending by slot: those of one token, those of few."""
        groups: dict[int, list[int]] = {}
        for place, piece in enumerate(pieces):
            count = len(piece.tokens)
            alone = self._one_by_one or count > FEW
            groups.setdefault(-place - 1 if alone else min(count, 2), []).append(place)
        for group in groups.values():
            yield sorted(group, key=lambda place: pieces[place].sequence.slot or 0)

    def _rows(self, pieces: list[Piece]) -> Rows:
        slots = [piece.sequence.slot for piece in pieces if piece.sequence.slot is not None]
        starts = [len(piece.sequence.tokens) for piece in pieces]
        width = max(len(piece.tokens) for piece in pieces)
        return Rows.of(slots, starts, width, self._model.device, self._splits)

    @torch.inference_mode()
    def _forward(self, pieces: list[Piece], rows: Rows) -> list[np.ndarray]:
        """One forward: each piece's rows of logits."""
        ids = torch.tensor([piece.tokens + [0] * (rows.width - len(piece.tokens)) for piece in pieces])
        unused = [rows.width - len(piece.tokens) for piece in pieces]
        last = max(1, *(padding + piece.rows for padding, piece in zip(unused, pieces, strict=True)))
        head = {"logits_to_keep": last} if self._trims_head else {}
        try:
            self._cache.use(rows)
            out = self._model(
                input_ids=ids.to(rows.index.device),
                position_ids=rows.positions.clamp(max=self.context - 1),
                attention_mask=self._masks(rows),
                past_key_values=self._cache,
                use_cache=True,
                **self._to_attention(rows),
                **head,
            )
            logits = out.logits[:, -last:].float().cpu().numpy()
        except DEVICE_LOST as error:
            raise EngineBroken(f"the device failed while it computed: {error}") from error
        ends = [last - padding for padding in unused]
        return [row[end - piece.rows : end] for row, end, piece in zip(logits, ends, pieces, strict=True)]

    def _to_attention(self, rows: Rows) -> dict[str, Any]:
        return {"rows": rows, "windows": self._cache.windows} if self._splits else {}

    def _masks(self, rows: Rows) -> Any:
        """As the model wants them: one, or one for each type of layer."""
        masks = {window: self._mask(rows, window) for window in set(self._cache.windows)}
        if self._layer_types is None:
            return masks[self._cache.windows[0]]
        return {kind: masks[window] for kind, window in zip(self._layer_types, self._cache.windows, strict=False)}

    def _mask(self, rows: Rows, window: int | None) -> torch.Tensor | None:
        if self._splits:
            return None if rows.causal(window) else rows.mask(window)
        hidden = ~rows.mask(window)  # eager attention adds it to the scores
        zeros = torch.zeros(hidden.shape, dtype=self._model.dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, torch.finfo(self._model.dtype).min)

    def _probe(self, path: Path) -> None:
        """One token, so that a model that can't run so fails now, and the cache knows the sizes of its heads."""
        sequence = self._pool.open([0], None, reuse=False)
        self.step([Piece(sequence, [0], 1)])
        self.close(sequence, keep=False)
        if not all(layer.is_initialized for layer in self._cache.layers):
            raise InputError(f"{path}: has layers that keep no keys and values of the text; {SERVED}")

    def _fit_memory(self) -> None:
        """Where neither context nor cells are named: no more of them than half of the free memory holds."""
        each, together = self._cache.affordable()
        self.context = max(min(self.context, each), min(self.context, self.batch))
        self._total = max(self.context, min(self.context * self.slots, together))


def _windows(path: Path, config: Any) -> list[int | None]:
    """The sliding window of each layer, None for full attention. `InputError` for a layer of another kind."""
    kinds = sorted(set(config.to_dict().get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    layers: list[Any] = [] if kinds else DynamicCache(config=config).layers
    kinds += sorted({type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    if kinds:
        raise InputError(f"{path}: has layers with {', '.join(kinds)}; {SERVED}")
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


def _turns_by_length(facts: dict[str, Any]) -> bool:
    """Whether rotary embeddings turn otherwise once any sequence of a forward is long, so that each needs its own."""
    told = json.dumps(facts.get("rope_parameters"), default=str)
    return '"dynamic"' in told or '"longrope"' in told


def _context(path: Path, trained: int | None, wanted: int | None) -> int:
    if trained is None and wanted is None:
        raise InputError(f"{path}: its config.json does not say how long a context it takes; name one")
    if trained is not None and wanted is not None and wanted > trained:
        raise InputError(f"context {wanted}: this model was trained for {trained} tokens at most")
    return wanted or trained or 0


def _total(cells: int | None, context: int, slots: int) -> int:
    """Tokens of all sequences. `InputError` where not even one context fits."""
    if cells is not None and cells < context:
        raise InputError(f"cells {cells}: must be at least the context, {context}")
    return min(cells or context * slots, context * slots)


def _fingerprint(path: Path, settings: ServeSettings, version: str) -> str:
    """What keys and values depend on. Files count by size and time, not to read them all."""
    directories = [path, *(directory for _, directory in settings.adapters)]
    files = sorted(file for directory in directories for file in directory.iterdir() if file.suffix in KEPT)
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = (version, torch.__version__, str(path.resolve()), settings.kv, settings.exact, settings.lora, facts)
    return hashlib.sha256(repr(told).encode()).hexdigest()
