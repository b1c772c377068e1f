"""Evaluations side by side: a table for the terminal and a picture of quality against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llmlite.errors import InputError
from llmlite.evals.divergence import Suffered
from llmlite.evals.evaluate import Evaluation
from llmlite.evals.longcontext.table import long_context_table
from llmlite.evals.score import Score
from llmlite.evals.tasks.table import task_table
from llmlite.evals.terminal import show_wide

COLUMNS = (
    "model", "engine", "MB on\ndisk", "bits per\nweight", "text", "perplexity", "mean KL", "p99 KL", "same\ntop",
    "peak\nMB", "prompt\nt/s", "answer\nt/s",
)  # fmt: skip
WORDS = ("model", "engine", "text")
ABSENT = "-"
SHOWN = 5  # of the tokens that suffered most
CONTEXT = 32  # characters before such a token


def show(evaluations: Sequence[Evaluation], title: str | None = None) -> None:
    """Print the table to standard output, wider than the terminal rather than with figures cut short."""
    show_wide(table(evaluations, title))
    for evaluation in evaluations:
        if evaluation.tasks:
            show_wide(task_table(evaluation.tasks, f"tasks: {evaluation.name}"))
        if evaluation.long_context is not None:
            show_wide(long_context_table(evaluation.long_context, f"long context: {evaluation.name}"))


def show_worst(evaluation: Evaluation) -> None:
    """Print for each text the tokens whose predictions changed most; nothing without a base."""
    for name, scored in evaluation.scores.items():
        if scored.divergence is not None and scored.divergence.worst:
            show_wide(worst_table(name, scored.divergence.worst[:SHOWN]))


def worst_table(text: str, worst: Sequence[Suffered]) -> Table:
    """A row per token: what stood before it, the token, and what base and artifact predicted there."""
    out = Table(title=f"{text}: the tokens that suffered most", box=SIMPLE_HEAD)
    out.add_column("KL", justify="right", no_wrap=True)
    for heading in ("context", "token", "by base", "by this", "base's best", "its best"):
        out.add_column(heading, justify="right" if heading.startswith("by") else "left", no_wrap=True)
    for token in worst:
        out.add_row(
            f"{token.kl:.3f}",
            Text(_readable(token.before)[-CONTEXT:], style="dim"),
            Text(_readable(token.text), style="bold"),
            f"{token.base_probability:.1%}",
            f"{token.probability:.1%}",
            Text(f"{_readable(token.base_top)} {token.base_top_probability:.0%}"),
            Text(f"{_readable(token.top)} {token.top_probability:.0%}"),
        )
    return out


def _readable(text: str) -> str:
    """On one line, with spaces and control characters visible where nothing else is."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if shown.strip() else repr(shown)


def table(evaluations: Sequence[Evaluation], title: str | None = None) -> Table:
    """A row per artifact and text; columns that nobody measured are left out."""
    rows = [row for evaluation in evaluations for row in _rows(evaluation)]
    texts = {name for evaluation in evaluations for name in evaluation.scores}
    kept = [n for n in range(len(COLUMNS)) if any(row[n] != ABSENT for row in rows)]
    if len(texts) == 1:
        kept.remove(COLUMNS.index("text"))
    out = Table(title=title, caption=_caption(evaluations), box=SIMPLE_HEAD)
    for n in kept:
        out.add_column(COLUMNS[n], justify="left" if COLUMNS[n] in WORDS else "right", no_wrap=True)
    for row in rows:
        out.add_row(*(row[n] for n in kept))
    return out


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    memory, speed = evaluation.memory, evaluation.speed
    head = (
        evaluation.name,
        evaluation.engine,
        _megabytes(evaluation.size.bytes),
        f"{evaluation.size.bits_per_weight:.2f}",
    )
    tail = (
        _megabytes(memory.peak) if memory else ABSENT,
        f"{speed.prompt_tps:.0f}" if speed else ABSENT,
        f"{speed.generate_tps:.1f}" if speed else ABSENT,
    )
    scores = [(name, _figures(scored)) for name, scored in evaluation.scores.items()]
    return [(*head, name, *figures, *tail) for name, figures in scores or [(ABSENT, (ABSENT,) * 4)]]


def _figures(scored: Score) -> tuple[str, str, str, str]:
    apart = scored.divergence
    return (
        f"{scored.perplexity.value:.2f} ± {scored.perplexity.stderr:.2f}",
        f"{apart.mean_kl:.5f}" if apart else ABSENT,
        f"{apart.p99_kl:.4f}" if apart else ABSENT,
        f"{apart.same_top:.1%}" if apart else ABSENT,
    )


def _caption(evaluations: Sequence[Evaluation]) -> str | None:
    """What the figures are, once for all rows where they agree."""
    said = dict.fromkeys(
        f"{name}: protocol {evaluation.protocol}, {scored.perplexity.windows} windows of {evaluation.window} tokens"
        f"{f' every {evaluation.windows.step}' if evaluation.windows.step else ''}, "
        f"{scored.perplexity.tokens:,} scored"
        for evaluation in evaluations
        for name, scored in evaluation.scores.items()
    )
    return "\n".join(said) or None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def check_picture(path: Path) -> None:
    """`InputError` where `picture` could not write: an ending matplotlib doesn't know, a folder that is not there."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise InputError(f"{path}: a picture ends in .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent} to write the picture in")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name the file that the picture is to be")


def picture(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Mean KL divergence and perplexity on the first text against bytes on disk, a point per artifact.

    The file's ending says what kind of picture it is. Raises what `check_picture` raises.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    scored = [(e, next(iter(e.scores.values()))) for e in evaluations if e.scores]
    apart = [(e.size.bytes / 1e6, s.divergence.mean_kl, e) for e, s in scored if s.divergence is not None]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _points(left, apart, "mean KL divergence from the base (nats)")
    if any(value > 0 for _, value, _ in apart):
        left.set_yscale("log")
    _points(right, [(e.size.bytes / 1e6, s.perplexity.value, e) for e, s in scored], "perplexity")
    figure.savefig(path, dpi=120)


def _points(axes, points: list[tuple[float, float, Evaluation]], label: str) -> None:
    # The engines' names stand on two sides of their points, which often lie close together.
    for engine, marker, side, align in (("llama.cpp", "o", -8, "top"), ("transformers", "s", 8, "bottom")):
        own = [point for point in points if point[2].engine == engine]
        if own:
            axes.scatter([x for x, _, _ in own], [y for _, y, _ in own], marker=marker, label=engine)
        for x, y, evaluation in own:
            at = {"textcoords": "offset points", "xytext": (0, side), "ha": "center", "va": align}
            axes.annotate(evaluation.name, (x, y), fontsize=8, **at)
    axes.margins(0.18)
    axes.set_xlabel("bytes on disk (MB)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if points:
        axes.legend(loc="center right")
