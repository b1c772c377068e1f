"""Reads text and calls from an answer as it streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from llmlite.serve.tools.formats import CALL_ID, PYTHON_TAG, CallFormat
from llmlite.serve.tools.scanner import CallReader


@dataclass(frozen=True)
class Text:
    """Words beside the calls."""

    text: str


@dataclass(frozen=True)
class Begun:
    """Call number ``index`` has begun."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments' JSON of call number ``index``."""

    index: int
    text: str


Event = Text | Begun | Arguments


class CallParser:
    """``push`` text as it comes, ``finish`` at the end; both give what has become certain.

    ``names``: the functions that may be called. What turns out to be no call comes out as text, whole; what may be one
    when the answer ends does not, as a grammar lets nothing but a call follow its beginning. ``required``: there is
    nothing but calls.
    """

    def __init__(self, form: CallFormat, names: frozenset[str], required: bool = False) -> None:
        self.calls = 0
        self._form = form
        self._names = names
        self._required = required
        self._held = ""
        self._prelude = ""  # what led to a call that is not certain yet
        self._call: CallReader | None = None
        self._spoken = False
        self._read: Callable[[], list[Event] | None] = self._text if form.trigger else self._whole

    @property
    def complete(self) -> bool:
        """There are calls, and the last one is whole."""
        return self.calls > 0 and self._call is None

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while (more := self._read()) is not None:
            events += more
        return _merged(events)

    def finish(self) -> list[Event]:
        """What was held back, where it is no part of a call."""
        begun = self._call is not None or (self._read == self._between and self._may_go_on())
        text = "" if begun or self._required else self._prelude + self._held
        self._held = self._prelude = ""
        if self._call is not None and self._call.name is None:
            self._call = None
        return [Text(text)] if text else []

    def _text(self) -> list[Event] | None:
        """Up to a trigger. White space before the first word waits for the word: before a call it is nothing."""
        trigger = self._form.trigger
        place = self._held.find(trigger) if trigger else -1
        if place >= 0:
            text, self._held = self._held[:place], self._held[place + len(trigger) :]
            blank = not self._spoken and not text.strip()
            self._prelude = text + trigger if blank else trigger
            self._read = self._between
            return [] if blank else [Text(text)]
        certain = len(self._held) - (_overlap(self._held, trigger) if trigger else 0)
        if not self._held[:certain] or not (self._spoken or self._held[:certain].strip()):
            return None
        text, self._held = self._held[:certain], self._held[certain:]
        self._spoken = True
        return [Text(text)]

    def _whole(self) -> list[Event] | None:
        """Formats without a trigger: the answer is a call if it begins like one of a known function."""
        begin = _begins_call(self._held, self._names)
        if begin is None:
            return None
        if begin < 0:
            self._read = self._text
            return []
        self._prelude, self._held = self._held[:begin], self._held[begin:]
        return self._open(None)

    def _between(self) -> list[Event] | None:
        """From a trigger or a call to the next call: a bare name, or brackets, commas, tags and white space."""
        lead, brace, _ = self._held.partition("{")
        if not brace:
            return None
        if self._form.bare_name:
            name = lead.strip().removeprefix(self._form.trigger).removesuffix(self._form.middle)
            self._held = self._held[len(lead) :]
            return self._open(name.split(CALL_ID)[0])
        if not self._is_punctuation(lead):
            return self._no_call("")
        self._prelude, self._held = self._prelude + lead, self._held[len(lead) :]
        return self._open(None)

    def _open(self, name: str | None) -> list[Event]:
        self._call = CallReader(name)
        self._read = self._arguments
        return [] if name is None else self._begin(name)

    def _begin(self, name: str) -> list[Event]:
        self._prelude = ""
        self.calls += 1
        return [Begun(self.calls - 1, name)]

    def _arguments(self) -> list[Event] | None:
        call = self._call
        if not self._held or call is None:
            return None
        unknown = call.name is None
        self._held = self._held[call.push(self._held) :]
        if call.name is None:
            return self._no_call(call.raw) if call.done else []
        events = self._begin(call.name) if unknown else []
        if text := call.take():
            events.append(Arguments(self.calls - 1, text))
        if call.done:
            self._call = None
            self._read = self._between
        return events

    def _no_call(self, raw: str) -> list[Event]:
        text, self._prelude, self._call = self._prelude + raw, "", None
        self._spoken, self._read = True, self._text
        return [Text(text)] if text else []

    def _may_go_on(self) -> bool:
        """What is held between two calls, or before the first, may be the beginning of one."""
        if self._is_punctuation(self._held, ended=True):
            return True
        rest = self._held.strip().removeprefix(self._form.trigger)
        starts = [name + mark for name in self._names for mark in (self._form.middle, CALL_ID)]
        return self._form.bare_name and any(_agree(start, rest) for start in starts)

    def _is_punctuation(self, text: str, ended: bool = False) -> bool:
        """``ended``: the last tag may be half there."""
        form = self._form
        for piece in (form.trigger, form.after.lstrip("}").strip()):
            text = text.replace(piece, "") if piece else text
            text = text[: len(text) - _overlap(text, piece)] if ended and piece else text
        return not text.strip(" \n\r\t[],;")


def _begins_call(text: str, names: frozenset[str]) -> int | None:
    """Where the object of a call begins, -1 when the text is no call, None while it may become one."""
    rest = text.lstrip(" \n")
    if rest.startswith(PYTHON_TAG):
        rest = rest.removeprefix(PYTHON_TAG).lstrip(" \n")
    elif PYTHON_TAG.startswith(rest):
        return None
    begin = len(text) - len(rest)
    for word in ("{", '"name"', ":"):
        if not rest.startswith(word):
            return None if word.startswith(rest) else -1
        rest = rest.removeprefix(word).lstrip(" \n")
    quoted = [json.dumps(name) for name in names]
    if any(rest.startswith(name) for name in quoted):
        return begin
    return None if any(name.startswith(rest) for name in quoted) else -1


def _agree(one: str, other: str) -> bool:
    """One of them begins with the other."""
    return one.startswith(other) or other.startswith(one)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest end of the text that begins the trigger."""
    longest = min(len(trigger) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if trigger.startswith(text[-length:])), 0)


def _merged(events: list[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            merged[-1] = Arguments(event.index, last.text + event.text)
        else:
            merged.append(event)
    return merged
