"""What is known of a request while it runs: who asked, how long it has taken, how many tokens it cost."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import Scope


@dataclass
class Exchange:
    """One request and its answer. ``caller``: the name of its API key; ``status`` 0: nothing was answered."""

    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex[:16]}")
    caller: str | None = None
    status: int = 0
    prompt_tokens: int = 0
    begun: float = field(default_factory=time.monotonic)
    _generated: dict[int, int] = field(default_factory=dict)

    @property
    def generated_tokens(self) -> int:
        return sum(self._generated.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def generated(self, sequence: int, tokens: int) -> None:
        """Note that a sequence has so many tokens by now."""
        self._generated[sequence] = tokens


def exchange_of(request: Request | Scope) -> Exchange:
    """The exchange that a request belongs to."""
    scope = request.scope if isinstance(request, Request) else request
    found = scope["state"]["exchange"]
    assert isinstance(found, Exchange)
    return found
