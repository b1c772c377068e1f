"""The terminal's side of a conversation: a prompt with history, commands, what a reply cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llmlite.errors import InputError
from llmlite.serve.chat.client import Client, Refused
from llmlite.serve.chat.conversation import FAILURES, Conversation, Cost

HELP = """\
/reset          forget what was said
/system TEXT    tell the model this before the conversation, which begins anew; without TEXT nothing
/retry          take back the last reply and ask again
/model [NAME]   go on with another model; without NAME show which there are
/save FILE      write the conversation as JSON
/quit           end, as Ctrl-D does
Ctrl-C stops a reply. A line that ends with \\ goes on in the next one."""


class Terminal:
    """Reads lines until /quit or the end of input."""

    def __init__(self, client: Client, conversation: Conversation) -> None:
        self._client = client
        self._conversation = conversation
        self._console = Console(highlight=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._note(HELP), "/reset": self._reset, "/system": self._system,
            "/retry": self._retry, "/model": self._model, "/save": self._save,
        }  # fmt: skip
        self._prompt = _prompt()

    def run(self) -> None:
        self._note(f"{self._conversation.model} at {self._client.url}; /help shows the commands")
        while (line := self._read()) is not None:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(text)
                elif text:
                    self._say(text)
            except FAILURES as error:
                self._error(str(error))

    def _read(self) -> str | None:
        """A line, or several joined by \\; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = input(self._prompt if not lines else "  ")
            except EOFError:
                self._console.print()
                return None
            except KeyboardInterrupt:
                self._note("\n/quit or Ctrl-D ends the chat")
                return ""
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _say(self, text: str) -> None:
        try:
            cost = self._conversation.say(text, show)
        finally:
            self._console.print()
        self._note(self._told(cost))

    def _told(self, cost: Cost) -> str:
        parts = [str(cost)]
        context = self._conversation.context
        if cost.used is not None and context is not None:
            parts.append(f"context {cost.used:,} of {context:,} ({cost.used / context:.0%})")
        if cost.stopped:
            parts.append("stopped")
        if cost.cut:
            parts.append("cut off at its longest")
        return ", ".join(parts)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            raise InputError(
                f"{name} is no command; /help shows them, and a line with a space in front is sent as it is"
            )
        self._commands[name](rest.strip())

    def _reset(self, _: str) -> None:
        self._conversation.messages.clear()
        self._note("forgotten")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._reset("")

    def _retry(self, _: str) -> None:
        before = list(self._conversation.messages)
        question = self._conversation.again()
        try:
            self._say(question)
        except FAILURES:
            self._conversation.messages = before
            raise

    def _model(self, name: str) -> None:
        cards = {card["id"]: card for card in self._client.models()}
        if name:
            if name not in cards:
                raise InputError(f"the server has no model {name!r}, but {', '.join(cards)}")
            self._conversation.use(cards[name])
        for known in cards:
            self._note(f"{'*' if known == self._conversation.model else ' '} {known}")

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save FILE is right")
        self._conversation.save(Path(file).expanduser())
        self._note(f"saved to {file}")

    def _note(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False)

    def _error(self, text: str) -> None:
        self._console.print(printable(text), style="red", markup=False)


def piped(conversation: Conversation) -> None:
    """Each line of standard input gets a reply on standard output. Raises what a reply ends with."""
    for line in sys.stdin:
        if line.strip():
            try:
                cost = conversation.say(line.rstrip("\n"), show)
            except Refused as refusal:
                raise InputError(str(refusal)) from None
            sys.stdout.write("\n")
            sys.stdout.flush()
            if cost.stopped:
                raise KeyboardInterrupt


def show(text: str) -> None:
    """A piece of a reply as it comes. A terminal gets no control characters, which a model could use to deceive."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Without the characters by which a terminal is steered; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or not ("\x00" <= c < " " or "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


def _prompt() -> str:
    """What stands before the user's line. Where there is readline, lines can be edited and called back."""
    try:
        import readline
    except ImportError:
        return "> "
    readline.set_history_length(1000)
    return "\x01\x1b[1m\x02> \x01\x1b[0m\x02"  # what stands between \x01 and \x02 takes no room
