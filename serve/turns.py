"""What goes into one step of the engine: a token of every sequence that generates, and a share of the prompts.

Prompts are cut into chunks so that a long one never stalls its neighbours: beside sequences that generate, a prompt of
up to `SHORT` tokens goes whole, of longer ones so much as makes a step `STRETCH` times longer. Half of what there is
for prompts goes to the one that came first, so none starves, the rest to those that need least.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from llmlite.serve.drafting import Drafts
from llmlite.serve.engines.base import Engine, Piece
from llmlite.serve.tickets import Ticket

EXACT_CHUNK = 128
"""Prompt tokens of one step where replies must not depend on what else runs."""

SHORT = 256
STRETCH = 1.8
"""Measured with it: 2.7 times the 99th percentile of neighbours' gaps (benchmarks/results/serving.md)."""

KEPT = 0.8
"""What a moving average keeps of itself at each new value."""

TIMED_EVERY = 32
"""Steps with guesses, after which there is one without."""


@dataclass
class Rates:
    """Moving averages in seconds: a step without prompt tokens, for each of its sequences; one more token of a step.

    ``row``: one more token of a step where it was a guess, which costs more than a prompt's; 0 until there was one.
    """

    step: float = 0.0
    sequence: float = 0.0
    row: float = 0.0
    guessed: int = 0  # steps with guesses since the last one without
    _prompts: float = 0.0  # seconds of the last steps that went to prompts, and their tokens
    _tokens: float = 0.0

    @property
    def token(self) -> float:
        """A prompt's token, 0 until there was one: more where few go at a time, or far from their prompt's start."""
        return self._prompts / self._tokens if self._tokens else 0.0

    def note(self, seconds: float, sequences: int, prompt_tokens: int) -> None:
        """How long a step was that took one token of each sequence and ``prompt_tokens`` of prompts.

        Prompts pay for what the step took longer than one without them, though nothing generated beside them: what is
        left of a prompt whose beginning is cached may be one token.
        """
        if sequences and not prompt_tokens:
            self.step = _average(self.step, seconds)
            self.sequence = _average(self.sequence, seconds / sequences)
            self.guessed = 0
        elif prompt_tokens:
            self._prompts = KEPT * self._prompts + max(0.0, seconds - self.step)
            self._tokens = KEPT * self._tokens + prompt_tokens

    def note_guesses(self, seconds: float, guesses: int) -> None:
        """How long a step was that took one token of each sequence and ``guesses``."""
        self.row = _average(self.row, max(1e-9, seconds - self.step) / guesses)
        self.guessed += 1

    def price(self, drafting: float) -> float | None:
        """What a guessed token costs, in steps of one sequence that it could save; None while it isn't known, and now
        and then, for a step without guesses to be timed. ``drafting``: seconds in which a guess is made."""
        if not self.sequence or not self._tokens or self.guessed >= TIMED_EVERY:
            return None
        return ((self.row or self.token) + drafting) / self.sequence


def _average(before: float, now: float) -> float:
    return now if before == 0 else KEPT * before + (1 - KEPT) * now


def plan(
    running: Items[Ticket], engine: Engine, rates: Rates, drafts: Drafts | None = None
) -> list[tuple[Ticket, Piece]]:
    """The pieces of one step, those that generate first; no more tokens and rows than the engine takes."""
    pieces: list[tuple[Ticket, Piece]] = []
    generating = [ticket for ticket in running if ticket.generation.prompt_left <= 0]
    prompts = [ticket for ticket in running if ticket.generation.prompt_left > 0]
    room, rows = engine.batch, engine.outputs - len(running)
    if drafts is not None:
        price = None if prompts else rates.price(drafts.seconds)
        for ticket in generating:
            ticket.generation.look_ahead(price)
        drafts.run()
    for ticket in generating:
        left = room - len(generating) + len(pieces)  # each of those that follow has its token
        piece = ticket.generation.piece(max(1, min(left, rows)))
        pieces.append((ticket, piece))
        room -= len(piece.tokens)
        rows -= len(piece.tokens) - 1
    budget = min(room, prompt_budget(prompts, rates) if generating else room)
    for ticket, share in shares(prompts, budget):
        most = min(share, rows) if ticket.generation.work.score_prompt else share
        if most > 0:
            piece = ticket.generation.piece(most)
            pieces.append((ticket, piece))
            rows -= max(0, piece.rows - 1)
    return pieces


def plan_exactly(running: Items[Ticket], turn: int) -> list[tuple[Ticket, Piece]]:
    """One sequence's piece, whole chunks from the prompt's start: what it computes depends on nothing else."""
    ticket = running[turn % len(running)]
    return [(ticket, ticket.generation.piece(EXACT_CHUNK))]


def prompt_budget(prompts: Items[Ticket], rates: Rates) -> int:
    """Prompt tokens beside sequences that generate."""
    slice_ = max(1, round(STRETCH * rates.step / rates.token)) if rates.token and rates.step else SHORT
    short = sum(ticket.generation.prompt_left for ticket in prompts if ticket.generation.is_short(SHORT))
    return max(slice_, min(short, SHORT))


def shares(prompts: Items[Ticket], budget: int) -> list[tuple[Ticket, int]]:
    """How ``budget`` is dealt out: half to the first, then as much as they need to those that need least."""
    if not prompts:
        return []
    first, *_ = prompts
    dealt = {id(first): min(first.generation.prompt_left, max(1, budget // 2))}
    left = budget - dealt[id(first)]
    for ticket in sorted(prompts, key=lambda ticket: ticket.generation.prompt_left):
        more = min(left, ticket.generation.prompt_left - dealt.get(id(ticket), 0))
        if more > 0:
            dealt[id(ticket)] = dealt.get(id(ticket), 0) + more
            left -= more
    return [(ticket, dealt[id(ticket)]) for ticket in prompts if id(ticket) in dealt]
