"""One conversation with a model: what was said, and what the last reply cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.errors import InputError, LlmliteError
from llmlite.serve.chat.client import Client, Refused


@dataclass(frozen=True)
class Cost:
    """Of one reply. ``tokens``: generated; ``used``: of the context, None where the server did not tell."""

    tokens: int
    used: int | None
    first: float
    seconds: float
    stopped: bool
    cut: bool

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if self.tokens > 1 and self.seconds > self.first:
            parts.append(f"{(self.tokens - 1) / (self.seconds - self.first):.1f} a second")
        parts.append(f"first after {self.first:.2f} s")
        return ", ".join(parts)


class Conversation:
    """``context``: the model's, None where the server does not tell. A reply that failed leaves no trace."""

    def __init__(self, client: Client, card: dict[str, Any], system: str | None, sampling: dict[str, Any]) -> None:
        self._client = client
        self._sampling = sampling
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.use(card)

    def use(self, card: dict[str, Any]) -> None:
        """Go on with another model, by its object in the server's list."""
        self.model: str = card["id"]
        about = card.get("llmlite")
        context = about.get("context") if isinstance(about, dict) else card.get("max_model_len")
        self.context = context if isinstance(context, int) else None

    def say(self, text: str, show: Callable[[str], None]) -> Cost:
        """Ask, and show the reply piece by piece. An interrupt stops the reply and keeps what is there of it.

        Raises `Refused` and `LlmliteError`, after which the conversation is what it was.
        """
        said: list[str] = []
        begun = time.monotonic()
        first, usage, finish, stopped = 0.0, None, None, False
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, *self.messages, {"role": "user", "content": text}]
        pieces = self._client.reply(self.model, asked, self._sampling)
        try:
            for piece in pieces:
                usage, finish = piece.usage or usage, piece.finish or finish
                if piece.text:
                    first = first or time.monotonic() - begun
                    said.append(piece.text)
                    show(piece.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            pieces.close()  # type: ignore[attr-defined]  # hangs up, which frees the place on the server
        reply = "".join(said)
        if reply or not stopped:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        seconds = time.monotonic() - begun
        tokens = usage["completion_tokens"] if usage else len(said)
        used = usage["total_tokens"] if usage else None
        return Cost(tokens, used, first or seconds, seconds, stopped, finish == "length")

    def again(self) -> str:
        """Take back the last question and its reply. Raises `InputError` where there is none."""
        if not self.messages:
            raise InputError("nothing was asked yet")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def save(self, file: Path) -> None:
        """Write the conversation as one line of JSON; a file that is there stays. Raises `InputError`."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        line = json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False)
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(line + "\n")
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}") from None


FAILURES = (Refused, LlmliteError)
"""What a reply can end with, and the conversation go on."""
