"""The tokens that suffered most, readable: each in its place, with what both models thought of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmlite.evals.gate import number
from llmlite.evals.report.views import Table, percent

SHOWN = 20
ISOLATE, END = "\u2068", "\u2069"  # keep a token's direction of writing to itself
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def worst_table(caption: str, worst: Sequence[Mapping[str, Any]]) -> Table:
    """The first `SHOWN` of an evaluation's ``divergence.worst``."""
    rows = [
        (
            number(token.get("kl")), _in_place(token),
            f"{percent(token.get('base_probability'))} → {percent(token.get('probability'))}",
            _liked(token, "base_top"), _liked(token, "top"),
        ) for token in worst[:SHOWN]
    ]  # fmt: skip
    head = ("KL", "in its place", "its probability, base → artifact", "the base likes best", "the artifact likes best")
    return Table(caption, head, rows, ("KL",))


def visible(text: Any) -> str:
    """On one line: breaks and tabs as signs, other control characters and directions of writing as a box."""
    line = str(text).translate(VISIBLE)
    return "".join(character if character.isprintable() else "□" for character in line)


def _in_place(token: Mapping[str, Any]) -> str:
    before, text, after = (visible(token.get(key, "")) for key in ("before", "text", "after"))
    return f"…{before}⟦{ISOLATE}{text}{END}⟧{after}…"


def _liked(token: Mapping[str, Any], key: str) -> str:
    return f"{visible(token.get(key, '-'))!r}, {percent(token.get(f'{key}_probability'))}"
