"""An engine without a model: tokens are bytes, and it says what comes after "say:" in its prompt."""

import json
import time

import numpy as np

from llmlite.serve.engines.base import ChatTemplateError, EngineBroken, NoRoom, Room
from llmlite.serve.engines.pooling import CHUNK
from llmlite.serve.engines.slots import Slots
from llmlite.serve.prefixes import PrefixStore

EOS = 256
CONTROL = 257  # a token that adds nothing to the text
CERTAIN = 30.0  # the logit of the next token; all others have 0


class ScriptedEngine:
    """Words in the prompt make it misbehave: "boom" fails the request, "break" the engine, "nan" gives NaN.

    "slow" takes 20 ms a step. ``calls`` records the number of tokens of every piece of every step, ``steps`` those of
    each step, ``running`` the open sequences. ``cells``: tokens that all slots share; None: each has its own.
    """

    name, version = "scripted", "1"
    vocab_size = 260
    eos = frozenset({EOS})

    def __init__(self, context: int = 2048, slots: int = 1, cells: int | None = None, can_cut: bool = True):
        self.context, self.slots, self.cells, self.can_cut = context, slots, cells, can_cut
        self.batch, self.outputs = 512, 512
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.store = PrefixStore("scripted", 2**20, whole=not can_cut)
        self.pool = Slots(slots, self, self.store)
        self.calls: list[int] = []
        self.steps: list[list[int]] = []
        self.running = set()
        self.closed = False

    def encode(self, text):
        return list(text.encode())

    def encode_chat(self, messages):
        if any(message["role"] == "system" for message in messages):
            raise ChatTemplateError("the model's chat template refused these messages: no system role")
        return list("\n".join(message["content"] for message in messages).encode())

    def token_bytes(self, token, special):
        if token < 256:
            return bytes([token])
        return f"<{token}>".encode() if special else b""

    def open(self, prompt, adapter=None, reuse=True):
        sequence = self.pool.open(prompt, adapter, reuse)
        sequence.prompt = prompt
        self.running.add(sequence)
        return sequence

    def close(self, sequence, keep):
        self.running.remove(sequence)
        self.pool.close(sequence, keep)

    def suspend(self, sequence):
        self.pool.suspend(sequence)

    def resume(self, sequence):
        self.pool.resume(sequence)

    def checkpoint(self, sequence):
        self.pool.checkpoint(sequence)

    def cut(self, sequence, length):
        assert self.can_cut
        self.cut_slot(sequence.slot, length)
        del sequence.tokens[length:]

    def room(self):
        total = self.cells or self.context * self.slots
        return Room(self.pool.used, self.pool.kept, total, self.cells is not None)

    def embed(self, prompts):
        """Counts of bytes, as a direction; "slow" and "boom" mean here what they mean elsewhere."""
        rows = np.zeros((len(prompts), 8), np.float32)
        for row, prompt in zip(rows, prompts, strict=True):
            for begin in range(0, len(prompt), CHUNK):
                self.calls.append(len(prompt[begin : begin + CHUNK]))
                self._misbehave(bytes(token for token in prompt if token < 256))
                yield None
            np.add.at(row, np.array(prompt) % 8, 1)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def close_model(self):
        assert not self.running
        self.closed = True

    def step(self, pieces):
        assert 0 < sum(len(piece.tokens) for piece in pieces) <= self.batch
        self._check(pieces)
        self.steps.append([len(piece.tokens) for piece in pieces])
        self.calls += self.steps[-1]
        out = []
        for piece in pieces:
            held = self.held[piece.sequence.slot]
            assert held == piece.sequence.tokens, "the cache and the sequence differ"
            rows = []
            for token in piece.tokens:
                held.append(token)
                piece.sequence.tokens.append(token)
                rows.append(self._row(piece.sequence))
            out.append(np.stack(rows[len(rows) - piece.rows :]) if piece.rows else np.empty((0, self.vocab_size)))
        return out

    def cut_slot(self, slot, length):
        assert self.can_cut or length in (0, len(self.held[slot]))
        del self.held[slot][length:]

    def save_slot(self, slot):
        return json.dumps(self.held[slot]).encode()

    def load_slot(self, slot, state):
        assert not self.held[slot]
        tokens = json.loads(state)
        self._make_room(len(tokens))
        self.held[slot] = tokens

    def copy_slot(self, source, target, length):
        self._make_room(length)
        self.held[target] = self.held[source][:length]

    def _make_room(self, tokens):
        while self.cells is not None and sum(map(len, self.held)) + tokens > self.cells:
            if not self.pool.evict():
                raise NoRoom("full")

    def _check(self, pieces):
        for piece in pieces:
            self._misbehave(self._prompt(piece.sequence))
        self._make_room(sum(len(piece.tokens) for piece in pieces))

    def _misbehave(self, prompt):
        if b"slow" in prompt:
            time.sleep(0.02)
        if b"boom" in prompt:
            raise RuntimeError("boom")
        if b"break" in prompt:
            raise EngineBroken("it broke")

    def _prompt(self, sequence):
        return bytes(token for token in sequence.prompt if token < 256)

    def _row(self, sequence):
        prompt = self._prompt(sequence)
        row = np.zeros(self.vocab_size, np.float32)
        if b"nan" in prompt:
            return row * np.nan
        said = len(sequence.tokens) - len(sequence.prompt)
        _, _, script = prompt.partition(b"say:")
        row[script[said] if 0 <= said < len(script) else EOS] = CERTAIN
        return row
