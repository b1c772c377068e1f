"""Progress and time left on standard error, so that standard output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
console = Console(stderr=True)


def say(sentence: str) -> None:
    """One sentence that the user should not miss, on standard error, whole on one line."""
    console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)


def note(sentence: str) -> None:
    """`say` something about what is done, or was made."""
    say(f"note: {sentence}")


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show how many are done; nothing is drawn where standard error is no terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=what)


@contextmanager
def advancing(what: str, total: float, shown: bool = True) -> Iterator[Callable[[float, str], None]]:
    """A function of how much of ``total`` is done and of what is to be told beside it, as a loss is."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total, told="")
        yield lambda done, told: progress.update(task, completed=done, told=told)
