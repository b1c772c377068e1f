"""Text from models, texts and file names, made harmless inside Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$@:])")


def cell(text: str) -> str:
    """One line of plain text: nothing in it is markup, a link, a mention or the end of a table's cell."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))


def row(cells: Sequence[str]) -> str:
    """A table's row of cells that are Markdown already."""
    return "| " + " | ".join(cells) + " |"
