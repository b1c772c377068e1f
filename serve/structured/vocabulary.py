"""An engine's tokens as llguidance wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from llmlite.serve.engines.base import Engine


class _Tokens:
    """The bytes of every token; llguidance reads these attributes. Nothing is ever tokenized."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("a grammar forced text, although forcing is off")


class Vocabulary:
    """The tokens of an engine. ``shown``: control tokens that stand for their letters in an answer, as ``markers`` do.

    All other control tokens are no text and fit no grammar; the end tokens fit where it may end. Making it takes
    about a second for a large vocabulary.
    """

    def __init__(self, engine: Engine, markers: tuple[str, ...]) -> None:
        self.size = engine.vocab_size
        shown: set[int] = set()
        tokens, special = [], []
        for token in range(engine.vocab_size):
            data = engine.token_bytes(token, special=False)
            if not data or token in engine.eos:
                data = engine.token_bytes(token, special=True)
                if token not in engine.eos and data.decode("utf-8", "replace") in markers:
                    shown.add(token)
                else:
                    special.append(token)
                    data = b"<%d>" % token  # names must differ
            tokens.append(data)
        ends = sorted(engine.eos)
        wrapper: Callable[..., Any] = TokenizerWrapper
        self.tokenizer = LLTokenizer(
            wrapper(_Tokens(tokens, special, ends[0])), n_vocab=self.size, eos_token=ends  # type: ignore[arg-type]
        )  # fmt: skip
        self.shown = frozenset(shown)
