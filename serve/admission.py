"""Who may run next: a slot must be free and the cache must have room; a prompt that is being computed is waited for."""

from __future__ import annotations

from collections import deque
from itertools import islice

from llmlite.serve.engines.base import Engine
from llmlite.serve.prefixes import common_length
from llmlite.serve.tickets import Ticket

GROWTH = 32
"""Tokens that each running sequence should still find room for when another one begins, or it would leave at once."""

SHARED = 64
"""A prompt that has so many tokens in common with one that is being computed waits for them."""

LOOK = 16
"""How far into the queue somebody is looked for who needn't wait for another's prompt."""


class Admission:
    """Used on the engine thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def may_resume(self, ticket: Ticket, running: list[Ticket]) -> bool:
        """Whether a sequence that had to leave may come back; always where nothing else runs."""
        if len(running) >= self._engine.slots:
            return False
        assert ticket.generation.sequence is not None
        return not running or self._fits(len(ticket.generation.sequence.tokens), running)

    def next(self, waiting: deque[Ticket], running: list[Ticket]) -> Ticket | None:
        """The first in the queue that may run, None while nobody may."""
        if not waiting or len(running) >= self._engine.slots:
            return None
        for ticket in islice(waiting, LOOK):
            if self._is_behind(ticket, running):
                continue
            fits = not running or self._fits(len(ticket.generation.work.prompt), running)
            return ticket if fits else None
        return None

    def _fits(self, tokens: int, running: list[Ticket]) -> bool:
        coming = sum(max(0, ticket.generation.prompt_left) for ticket in running)
        return self._engine.room().fits(tokens + coming + GROWTH * (len(running) + 1))

    def _is_behind(self, ticket: Ticket, running: list[Ticket]) -> bool:
        """Whether another sequence is computing the beginning of this one's prompt."""
        if not self._engine.can_cut or ticket.generation.work.score_prompt:
            return False
        if ticket.behind is None or ticket.behind not in running:
            ticket.behind, ticket.shared = self._ahead(ticket, running)
        first = ticket.behind
        if first is None or first.generation.prompt_left <= 0 or first.generation.sequence is None:
            return False
        return len(first.generation.sequence.tokens) < ticket.shared

    def _ahead(self, ticket: Ticket, running: list[Ticket]) -> tuple[Ticket | None, int]:
        """Who of the running has most of the prompt in common with ``ticket``, in computing it, and how much."""
        work = ticket.generation.work
        mine = ticket.generation.ids[:-1]
        best, most = None, SHARED - 1
        for other in running:
            theirs = other.generation.work
            if other.generation.prompt_left > 0 and theirs.adapter == work.adapter:
                length = common_length(mine, other.generation.ids)
                if length > most:
                    best, most = other, length
        return best, most
