"""An engine without a model: tokens are bytes, and it says what comes after "say:" in its prompt."""

import time

import numpy as np

from llmlite.serve.engines.base import CHUNK, ChatTemplateError, EngineBroken, Sequence, Slots

EOS = 256
CONTROL = 257  # a token that adds nothing to the text
CERTAIN = 30.0  # the logit of the next token; all others have 0


class ScriptedEngine:
    """Words in the prompt make it misbehave: "boom" fails the request, "break" the engine, "nan" gives NaN.

    "slow" takes 20 ms a step. ``calls`` records the size of every prefill and step, ``running`` the open sequences.
    """

    name, version = "scripted", "1"
    vocab_size = 260
    eos = frozenset({EOS})

    def __init__(self, context: int = 2048, slots: int = 1, tool_template: str | None = None):
        self.context = context
        self.slots = slots
        self.tool_template = tool_template
        self.told: tuple[list, list | None] = ([], None)  # the last messages and tools
        self.pool = Slots(slots, reusable=True)
        self.calls: list[int] = []
        self.running: set[Sequence] = set()

    def encode(self, text):
        return list(text.encode())

    def encode_chat(self, messages, tools=None):
        self.told = (messages, tools)
        if any(message["role"] == "system" for message in messages):
            raise ChatTemplateError("the model's chat template refused these messages: no system role")
        return list("\n".join(message["content"] for message in messages).encode())

    def token_bytes(self, token, special):
        if token < 256:
            return bytes([token])
        return f"<{token}>".encode() if special else b""

    def open(self, prompt, reuse=True):
        sequence = self.pool.take(prompt, reuse)
        self.running.add(sequence)
        return sequence

    def close(self, sequence, keep):
        self.running.remove(sequence)
        self.pool.put_back(sequence, keep)

    def close_model(self):
        assert not self.running

    def prefill(self, sequence, tokens, every_row):
        assert 0 < len(tokens) <= CHUNK
        self.calls.append(len(tokens))
        sequence.tokens += tokens
        sequence.prefilled += len(tokens)
        return np.stack([self._row(sequence)] * (len(tokens) if every_row else 1))

    def step(self, sequences, tokens):
        self.calls.append(1)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        return np.stack([self._row(sequence) for sequence in sequences])

    def _row(self, sequence):
        prompt = bytes(token for token in sequence.tokens[: sequence.prefilled] if token < 256)
        if b"slow" in prompt:
            time.sleep(0.02)
        if b"boom" in prompt:
            raise RuntimeError("boom")
        if b"break" in prompt:
            raise EngineBroken("it broke")
        row = np.zeros(self.vocab_size, np.float32)
        if b"nan" in prompt:
            return row * np.nan
        said = len(sequence.tokens) - sequence.prefilled
        _, _, script = prompt.partition(b"say:")
        row[script[said] if said < len(script) else EOS] = CERTAIN
        return row
