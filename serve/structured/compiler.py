"""Compiles grammars for one engine, off the event loop, and keeps the last ones."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits

from llmlite.serve.constraint import Constraint
from llmlite.serve.engines.base import Engine
from llmlite.serve.structured.grammar import HEADER, Grammar
from llmlite.serve.structured.matcher import GrammarConstraint, GrammarTooHard, reason
from llmlite.serve.structured.schema import InvalidGrammar
from llmlite.serve.structured.vocabulary import Vocabulary

KEPT = 32
PATIENCE = 30.0
"""Seconds that compiling may take; the limits below keep it far from that."""
LIMITS = LLParserLimits(
    max_items_in_row=5000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""A step within them takes at most about 0.1 s, and a compiled grammar some tens of megabytes; usual ones take
hundredths of a millisecond and some kilobytes."""


class CompilerClosed(Exception):
    """The model is being closed: no grammar is compiled for it any more."""


class Compiler:
    """Used on the event loop. ``markers``: see `Vocabulary`, which is made when the first grammar comes."""

    def __init__(self, engine: Engine, markers: tuple[str, ...]) -> None:
        self._engine = engine
        self._markers = markers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    @property
    def shown(self) -> frozenset[int]:
        """Control tokens whose letters belong to an answer that follows a grammar."""
        return frozenset() if self._vocabulary is None else self._vocabulary.shown

    async def compile(self, grammar: Grammar) -> Callable[[], Constraint]:
        """What makes the state of a new sequence.

        Raises `InvalidGrammar` with what is wrong and where, `CompilerClosed` after `close`.
        """
        matcher = self._kept.get(grammar.rules)
        if matcher is None:
            try:
                work = self._thread.submit(self._compile, grammar)
            except RuntimeError:  # the thread takes no more
                raise CompilerClosed from None
            try:
                matcher = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work)), PATIENCE)
            except TimeoutError:
                raise InvalidGrammar(grammar.field, f"takes longer than {PATIENCE:.0f} s to compile") from None
            except asyncio.CancelledError:
                if work.cancelled():
                    raise CompilerClosed from None
                raise
            self._kept[grammar.rules] = matcher
        self._kept.move_to_end(grammar.rules)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        vocab_size, compiled = self._engine.vocab_size, matcher
        return lambda: GrammarConstraint(compiled.deep_copy(), vocab_size)

    def close(self) -> None:
        """Wait for the grammar that is being compiled; nothing is compiled after it."""
        self._thread.shutdown(cancel_futures=True)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._engine, self._markers)
        matcher = LLMatcher(self._vocabulary.tokenizer, HEADER + grammar.rules, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidGrammar(grammar.field, reason(matcher))
        try:  # the first step finds what nothing can follow
            GrammarConstraint(matcher.deep_copy(), self._engine.vocab_size).mask()
        except GrammarTooHard as error:
            raise InvalidGrammar(grammar.field, str(error)) from None
        return matcher
