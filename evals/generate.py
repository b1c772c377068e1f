"""A loaded model that reads a text once and answers many questions about it.

`reader_of` gives an engine's `Reader`. It keeps the positions that were read last, so whatever two calls have in
common in front is computed once: a long context under many questions, the examples in front of every item of a
task, an answer that grows token by token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.evals.engines import ROWS, Engine, LlamaCppEngine, TransformersEngine
from llmlite.evals.kv import F16, KvTypes
from llmlite.evals.kv_rounding import Rounding, rounding
from llmlite.evals.rows import log_softmax

CHUNK = 512  # tokens of one forward pass
GROWTH = 1024  # llama.cpp's context grows in steps of so many positions


class Reader(ABC):
    """One sequence and its cache.

    ``engine``: whose cache it takes over; ``longest``: positions that the model was trained for; ``ends``: the
    tokens that end an answer, ``eot`` the tokenizer's own among them; ``start``: the token in front of a text that
    has none (beginning of text, else end of text); ``can_cut``: the cache can forget its last positions, which
    sliding windows and recurrent states can't.
    """

    longest: int
    ends: frozenset[int]
    eot: int
    start: int
    can_cut: bool

    def __init__(self, engine: Engine):
        self.engine = engine
        self.past = np.empty(0, np.int64)
        self.held = np.empty(0, np.int64)

    def predict(self, tokens: np.ndarray, rows: int) -> torch.Tensor:
        """Log-probabilities float32 [rows, vocab] of the token after each of the last ``rows`` of ``tokens`` int [n].

        Only what the cache does not hold yet is computed. 1 <= rows <= n.
        """
        tokens = np.asarray(tokens, np.int64)
        if len(tokens) > self.longest:
            raise InputError(f"{len(tokens):,} tokens in a model that was trained for {self.longest:,}")
        self._keep(tokens, len(tokens) - rows)
        return torch.cat(list(self._append(tokens[len(self.past) :], rows)))

    def hold(self, tokens: np.ndarray) -> None:
        """Read ``tokens`` int [n] and keep that state until the next hold, whatever is read after it."""
        tokens = np.asarray(tokens, np.int64)
        self._keep(tokens, len(tokens))
        for _ in self._append(tokens[len(self.past) :], 0):
            pass
        self.held = tokens
        if not self.can_cut:
            self._save()

    def losses(self, tokens: np.ndarray, rows: int = CHUNK) -> np.ndarray:
        """Negative log-likelihood float64 [n - 1] of the second to last of ``tokens``, each given all before it."""
        out = []
        for first in range(0, len(tokens) - 1, rows):
            last = min(first + rows, len(tokens) - 1)
            found = self.predict(tokens[:last], last - first)
            out.append(-_picked(found, tokens[first + 1 : last + 1]).numpy())
        return np.concatenate(out)

    def _keep(self, tokens: np.ndarray, most: int) -> None:
        """Bring the cache to a beginning of ``tokens``, as long as can be, of at most ``most`` positions."""
        shared = min(common_start(self.past, tokens), most)
        if shared < len(self.past):
            if self.can_cut:
                self._cut(shared)
            elif len(self.held) and common_start(self.held, tokens) == len(self.held) <= most:
                self._restore()
                shared = len(self.held)
            else:
                self._clear()
                shared = 0
        self.past = tokens[:shared]

    def _append(self, tokens: np.ndarray, rows: int) -> Iterator[torch.Tensor]:
        """Read more tokens; log-probabilities of the last ``rows`` of them, in chunks."""
        first, step = len(tokens) - rows, self.step
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            yield from self._forward(part, max(0, first - start))
            self.past = np.concatenate([self.past, part])

    @property
    def step(self) -> int:
        return CHUNK

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids int64 [n]; nothing is put in front, names of control tokens become them."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's ids, control tokens left out."""

    @abstractmethod
    def name(self, token: int) -> str:
        """Text of one id, a control token by its name."""

    @abstractmethod
    def _forward(self, tokens: np.ndarray, first: int) -> Iterator[torch.Tensor]:
        """Append tokens (`step` at most); log-probabilities float32 [?, vocab] of those from ``first`` on."""

    @abstractmethod
    def _cut(self, length: int) -> None: ...

    @abstractmethod
    def _clear(self) -> None: ...

    @abstractmethod
    def _save(self) -> None: ...

    @abstractmethod
    def _restore(self) -> None: ...


def reader_of(engine: Engine, kv: KvTypes | None = None, context: int = GROWTH) -> Reader:
    """A reader that takes over the engine's cache; ``context``: positions to set aside at first (it grows).

    ``kv``: what the cache stores. llama.cpp keeps float16 unless told; transformers keeps the model's dtype, and a
    type given here rounds each key and value as that type would store it, without saving memory.
    """
    if isinstance(engine, LlamaCppEngine):
        return LlamaReader(engine, kv or F16, context)
    if isinstance(engine, TransformersEngine):
        return TransformersReader(engine, rounding(kv) if kv else None)
    raise TypeError(f"no reader for {type(engine).__name__}")


class TransformersReader(Reader):
    """A copied or cut transformers cache; ``rounding`` is applied to keys and values [1, heads, n, head_dim]."""

    engine: TransformersEngine

    def __init__(self, engine: TransformersEngine, rounding: Rounding | None = None):
        super().__init__(engine)
        config = engine.model.config.get_text_config()
        self.longest = int(config.to_dict().get("max_position_embeddings") or 1 << 30)
        self.rounding = rounding
        self.ends = _transformers_ends(engine)
        first, self.eot = engine.tokenizer.bos_token_id, engine.tokenizer.eos_token_id
        self.start = self.eot if first is None else first
        self._clear()
        kinds = set(config.to_dict().get("layer_types") or ["full_attention"])
        window = config.to_dict().get("sliding_window") if config.to_dict().get("layer_types") is None else None
        self.can_cut = kinds == {"full_attention"} and not window
        self._saved: object = None

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.engine.tokenizer(text, add_special_tokens=False, verbose=False).input_ids, np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.engine.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def name(self, token: int) -> str:
        return self.engine.tokenizer.decode([token])

    @torch.inference_mode()
    def _forward(self, tokens: np.ndarray, first: int) -> Iterator[torch.Tensor]:
        ids = torch.from_numpy(tokens)[None].to(self.engine.model.device)
        hidden = self.engine.model.base_model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        states = hidden.last_hidden_state[0]
        for start in range(first, len(tokens), ROWS):
            yield log_softmax(self.engine.head.logits(states[start : start + ROWS])).cpu()

    def _cut(self, length: int) -> None:
        self.cache.crop(length - len(self.past))

    def _clear(self) -> None:
        self.cache = _cache(self.engine.model.config, self.rounding)

    def _save(self) -> None:
        self._saved = copy.deepcopy(self.cache.layers)

    def _restore(self) -> None:
        self.cache.layers = copy.deepcopy(self._saved)


def _cache(config: Any, rounding: Rounding | None) -> Any:
    from transformers import DynamicCache

    if rounding is None:
        return DynamicCache(config=config)
    chosen = rounding

    class RoundedCache(DynamicCache):
        def update(self, key_states, value_states, *args, **kwargs):
            return super().update(*chosen(key_states, value_states), *args, **kwargs)

    return RoundedCache(config=config)


def _transformers_ends(engine: TransformersEngine) -> frozenset[int]:
    said = engine.model.generation_config.eos_token_id
    ends = [said] if isinstance(said, int) else list(said or [])
    own = engine.tokenizer.eos_token_id
    return frozenset(ends if own is None else [*ends, own])


class LlamaReader(Reader):
    """Sequence 0 of a llama.cpp context, cut by llama_memory_seq_rm, or saved and restored as a whole."""

    engine: LlamaCppEngine

    def __init__(self, engine: LlamaCppEngine, kv: KvTypes, context: int):
        super().__init__(engine)
        self.llama = engine.llama
        api, model, vocab = self.llama.api, self.llama.model, self.llama.vocab
        self.longest = api.llama_model_n_ctx_train(model)
        self.llama.renew(min(context, self.longest), kv)
        self.ends = frozenset(t for t in range(engine.vocab_size) if api.llama_vocab_is_eog(vocab, t))
        first, self.eot = api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab)
        self.start = first if first >= 0 else self.eot
        # seq_rm says yes to sliding windows and recurrent states, too, which have forgotten what is needed then
        self.can_cut = not (
            api.llama_model_n_swa(model) or api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
        )
        self._saved = b""

    @property
    def step(self) -> int:
        return min(self.engine.step, self.llama.settings.batch, self.llama.settings.context or CHUNK)

    def encode(self, text: str) -> np.ndarray:
        return self.llama.tokenize(text, special=True).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.llama.piece(int(token)) for token in tokens).decode("utf-8", "replace")

    def name(self, token: int) -> str:
        return self.llama.piece(token, special=True).decode("utf-8", "replace")

    def _forward(self, tokens: np.ndarray, first: int) -> Iterator[torch.Tensor]:
        start = len(self.past)
        if start + len(tokens) > self.llama.positions:
            self._grow(start + len(tokens))
        wanted = np.arange(len(tokens)) >= first
        logits = torch.from_numpy(self.llama.decode(tokens, start, wanted))
        for row in range(0, len(logits), ROWS):
            yield log_softmax(logits[row : row + ROWS])

    def _grow(self, positions: int) -> None:
        """A larger context, with what was read so far taken over."""
        state = self.llama.state() if len(self.past) else b""
        self.llama.renew(min(self.longest, -(-positions * 5 // 4 // GROWTH) * GROWTH), self.llama.settings.kv)
        if state:
            self.llama.restore(state)

    def _cut(self, length: int) -> None:
        self.llama.cut(length)

    def _clear(self) -> None:
        self.llama.clear()

    def _save(self) -> None:
        self._saved = self.llama.state()

    def _restore(self) -> None:
        self.llama.clear()
        self.llama.restore(self._saved)


def common_start(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements two rows share in front."""
    shorter = min(len(a), len(b))
    unequal = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(unequal[0]) if len(unequal) else shorter


def predict_each(reader: Reader, asked: Sequence[tuple[np.ndarray, int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """`Reader.predict` of each (tokens, rows), in an order in which neighbours share most; yields its index, too."""
    order = sorted(range(len(asked)), key=lambda n: tuple(asked[n][0]))
    before = 0
    for place, n in enumerate(order):
        tokens, rows = asked[n]
        if not reader.can_cut and place + 1 < len(order):
            after, after_rows = asked[order[place + 1]]
            shared = min(common_start(tokens, after), len(tokens) - rows, len(after) - after_rows)
            if shared > before or shared < len(reader.held):
                reader.hold(tokens[:shared])
            before = shared
        yield n, reader.predict(tokens, rows)


def greedy(reader: Reader, prompt: np.ndarray, limit: int, stop: Sequence[str] = ()) -> str:
    """The answer to a prompt int [n]: the likeliest token each time, ``limit`` tokens at most.

    Ends with a token of ``reader.ends`` or where its text has one of ``stop``; neither is part of the answer.
    """
    tokens, text = np.asarray(prompt, np.int64), ""
    for _ in range(limit):
        token = int(reader.predict(tokens, 1)[0].argmax())
        if token in reader.ends:
            break
        tokens = np.append(tokens, token)
        text = reader.decode(tokens[len(prompt) :].tolist())
        if any(word and word in text for word in stop):
            break
    for word in stop:
        text = text.split(word)[0] if word else text
    return text


def score_answer(found: torch.Tensor, answer: np.ndarray) -> tuple[float, bool]:
    """Sum of the answer's log-probabilities, from float32 [n, vocab] and ids [n], and whether each is the likeliest."""
    ids = torch.from_numpy(np.asarray(answer, np.int64))
    return float(_picked(found, answer).sum()), bool((found.argmax(dim=-1) == ids).all())


def _picked(found: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    return found.gather(1, ids[:, None])[:, 0].double()
