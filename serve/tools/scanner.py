"""A call's JSON object, character by character."""

from __future__ import annotations

import json


class JsonScanner:
    """Follows one JSON object and tells which of its own members, ``key``, each character is part of the value of."""

    def __init__(self) -> None:
        self.done = False
        self.key: str | None = None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_value = False
        self._word = ""

    def push(self, character: str) -> bool:
        """Whether the character is part of the value of the member ``key``."""
        if self._in_string:
            return self._push_string(character)
        if character == '"':
            self._in_string, self._word = True, ""
            return self._in_value
        if character in "{[":
            self._depth += 1
            return self._depth > 1
        if character in "}]":
            self._depth -= 1
            self.done = self._depth == 0
            return self._depth > 0
        if self._depth == 1 and character in ":,":
            self._in_value = character == ":"
            return False
        return self._in_value and (self._depth > 1 or not character.isspace())

    def _push_string(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if not self._in_value:
                self.key = self._word
        if not self._in_value:
            self._word += character
        return self._in_value


class CallReader:
    """One call as it is read. ``name`` None until it is known; ``raw``: all of it up to that."""

    def __init__(self, name: str | None) -> None:
        self.raw = ""
        self.name = name
        self._arguments: list[str] = []
        self._scanner = JsonScanner()
        self._all_arguments = name is not None
        self._quoted = ""
        self._taken = False

    @property
    def done(self) -> bool:
        """The object is closed."""
        return self._scanner.done

    def push(self, text: str) -> int:
        """Read up to the end of the object: how many characters that were."""
        count = 0
        for character in text:
            count += 1
            part = self._scanner.push(character)
            if self._all_arguments or (part and self._scanner.key in ("arguments", "parameters")):
                self._arguments.append(character)
            elif part and self._scanner.key == "name":
                self._quoted += character
                if character == '"':
                    self.name = _decoded(self._quoted)
            if self.done:
                break
        if self.name is None:
            self.raw += text[:count]
        return count

    def take(self) -> str:
        """The arguments' text since the last time; a call that ends without any has none to give: {}."""
        taken = "".join(self._arguments)
        self._arguments.clear()
        if self.done and not taken and not self._taken:
            taken = "{}"
        self._taken = self._taken or bool(taken)
        return taken


def _decoded(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:  # only the opening quote, or an escaped one
        return None
