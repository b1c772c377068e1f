"""The three ways a command can end badly, and the exit status of each."""


class LlmliteError(Exception):
    """One clear sentence for the user: what was wrong, where, and what would be right."""

    exit_status = 1


class InputError(LlmliteError):
    """The input or the words of the command were wrong: nothing was started, or nothing was kept."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class OutsideError(LlmliteError):
    """Something outside the program failed: disk, memory, network."""

    exit_status = 3


class WriteError(OutsideError):
    """The disk is full or failed; what was written before it did may be gone on with. ``reason``: the system's word."""

    def __init__(self, reason: str, sentence: str | None = None) -> None:
        super().__init__(sentence or f"the disk can't be written to ({reason})")
        self.reason = reason
