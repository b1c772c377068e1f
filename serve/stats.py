"""What an engine thread counts as it runs; others only read it, and each number is whole at any moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Since the engine was opened; ``running``, ``waiting`` and ``cells_*`` are as of now.

    ``prompt_tokens``: of all prompts, of which ``cached_tokens`` needed no prefill; ``prefix_hits``: sequences that
    found some of their prompt in the cache; ``generated_tokens``: all that were drawn, end tokens too; ``steps``: of
    the engine, ``step_seconds`` long in all, of which ``decode_seconds`` were spent in the engine itself;
    ``drafted_tokens``: guesses that were tried, of which ``accepted_tokens`` were right;
    ``preemptions``: sequences that had to leave their cells to others for a while. ``cells_*``: positions of keys and
    values that the cache has and that are used; 0 of 0 where the engine does not tell.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_hits: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    decode_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    cells_used: int = 0
    cells_total: int = 0
