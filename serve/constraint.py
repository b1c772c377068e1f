"""What holds a sequence to a grammar while it is sampled."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The state of one sequence within a grammar. Used on the engine thread alone."""

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next: bool [vocab], None for all of them.

        An end token is among them exactly where the output may end; at least one token always is.
        """

    def accept(self, token: int) -> None:
        """The next token was drawn: one that `mask` allowed."""
