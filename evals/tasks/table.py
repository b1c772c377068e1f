"""Tasks as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmlite.evals.tasks.run import TaskScore


def task_table(scores: Mapping[str, TaskScore], title: str | None = None) -> Table:
    """A row for each metric of each task, with its standard error where the harness has one."""
    said = dict.fromkeys(
        f"{s.harness}{', chat template' if s.chat else ''}{f', cache {s.kv}' if s.kv else ''}" for s in scores.values()
    )
    out = Table(title=title, caption="; ".join(said) or None, box=SIMPLE_HEAD)
    for n, column in enumerate(("task", "questions", "shots", "metric", "value")):
        out.add_column(column, justify="left" if n in (0, 3) else "right", no_wrap=True)
    for name, scored in scores.items():
        for n, (metric, figure) in enumerate(scored.metrics.items()):
            head = [name, str(scored.questions), "-" if scored.shots is None else str(scored.shots)]
            error = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
            out.add_row(*(head if n == 0 else [""] * 3), metric, f"{figure.value:.4f}{error}")
    return out
