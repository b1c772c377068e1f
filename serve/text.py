"""From tokens to text as it streams: no character is ever split, and no part of a stop string gets out."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns token bytes into text deltas.

    Bytes of an incomplete UTF-8 character wait for the rest; text that may yet become a stop string waits until it
    can't. ``length`` counts the characters decoded so far, ``emitted`` those handed out; both never go back. ``stop``
    is the stop string that ended it.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self.length = 0
        self.emitted = 0
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """A stop string is complete; it and the rest are cut."""
        return self.stop is not None

    def push(self, data: bytes) -> str:
        """The text that is now certain. Nothing of or behind a stop string is."""
        return self._take(self._decoder.decode(data))

    def finish(self) -> str:
        """What was still held back when generation ends; an incomplete character becomes U+FFFD."""
        rest = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return rest
        rest += self._held
        self.emitted += len(self._held)
        self._held = ""
        return rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self.length += len(text)
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stop = min(found)
            out, self._held = self._held[:place], ""
        else:
            keep = self._undecided()
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.emitted += len(out)
        return out

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
