"""Answers on long contexts as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmlite.evals.longcontext.paired import Paired
from llmlite.evals.longcontext.result import Figure, LongContext, PositionLoss

ABSENT = "-"


def long_context_table(result: LongContext, title: str | None = None) -> Table:
    """A row for each task and length, and one for all questions; then perplexity by position.

    With a comparison, the changes and how likely they are by chance stand beside the figures.
    """
    compared = result.against is not None
    out = Table(title=title, caption=_caption(result), box=SIMPLE_HEAD)
    columns = ["task", "tokens", "questions", "match", "log-prob\nper token"]
    for n, column in enumerate(
        [*columns, *(["change of\nmatch", "p", "change of\nlog-prob", "p"] if compared else [])]
    ):
        out.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    asked: list[tuple[str | None, int | None]] = [(task, n) for task in result.tasks for n in result.lengths]
    for task, length in [*asked, (None, None)] if asked else []:
        figures = result.figures(task, length)
        row = [task or "all", f"{length:,}" if length else ABSENT, str(figures.questions)]
        row += [_share(figures.match), _plus_minus(figures.logprob)]
        if compared:
            row += [*_change(figures.match.change, 2), *_change(figures.logprob.change, 4)]
        out.add_row(
            *row, end_section=task == (result.tasks[-1] if result.tasks else None) and length == result.lengths[-1]
        )
    for length, parts in result.positions.items():
        for part in parts:
            out.add_row(*_position(length, part, compared))
    return out


def _position(length: int, part: PositionLoss, compared: bool) -> list[str]:
    where = f"{part.first:,} to {part.last:,}"
    row = ["perplexity", f"{length:,}", where, f"{part.perplexity:.3f}", f"{-part.nll:.4f} ± {part.stderr:.4f}"]
    if not compared:
        return row
    change = part.change
    turned = Paired(-change.change, change.stderr, change.p, change.count) if change else None
    return [*row, ABSENT, ABSENT, *_change(turned, 4)]


def _share(figure: Figure) -> str:
    return f"{figure.value:.0%}"


def _plus_minus(figure: Figure) -> str:
    return f"{figure.value:.4f}" if figure.stderr != figure.stderr else f"{figure.value:.4f} ± {figure.stderr:.4f}"


def _change(change: Paired | None, digits: int) -> tuple[str, str]:
    return (f"{change.change:+.{digits}f}", f"{change.p:.2g}") if change else (ABSENT, ABSENT)


def _caption(result: LongContext) -> str:
    said = [f"seed {result.seed}", f"text: {result.text}", "chat template" if result.chat else "no chat template"]
    if result.kv:
        said.append(f"cache {result.kv}")
    if result.against:
        said.append(f"change against {result.against}; p: sign-flip permutation test")
    return "; ".join(said)
