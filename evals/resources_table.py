"""Memory and speed at each context, the budget and lightness of one evaluation, for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmlite.evals.evaluate import Evaluation
from llmlite.evals.lightness_table import lightness_table
from llmlite.evals.memory import MemoryAt
from llmlite.evals.speed import SpeedAt, Spread
from llmlite.evals.terminal import show_wide

ABSENT = "-"
COLUMNS = (
    "prompt\ntokens", "cache\nMB", "compute\nMB", "peak\nMB", "address\nspace MB", "reserved\nMB", "driver\nMB",
    "prompt t/s", "answer t/s", "first token s", "J per\ntoken",
)  # fmt: skip


def show_resources(evaluation: Evaluation) -> None:
    """Print to standard output what was measured of them; nothing where nothing was."""
    if evaluation.memory is not None or evaluation.speed is not None:
        show_wide(contexts_table(evaluation))
    if evaluation.fit is not None:
        Console().print(evaluation.fit.sentence, highlight=False, soft_wrap=True)
    if evaluation.lightness is not None:
        show_wide(lightness_table(evaluation.lightness))


def contexts_table(evaluation: Evaluation) -> Table:
    """A row per context; speeds as median (least to most); columns that nobody measured are left out."""
    memory = {at.context: at for at in evaluation.memory.contexts} if evaluation.memory else {}
    speed = {at.context: at for at in evaluation.speed.contexts} if evaluation.speed else {}
    rows = [(f"{n:,}", *_memory(memory.get(n)), *_speed(speed.get(n))) for n in sorted({*memory, *speed})]
    kept = [n for n in range(len(COLUMNS)) if any(row[n] != ABSENT for row in rows)]
    out = Table(box=SIMPLE_HEAD)
    for n in kept:
        out.add_column(COLUMNS[n], justify="right", no_wrap=True)
    for row in rows:
        out.add_row(*(row[n] for n in kept))
    return out


def _memory(at: MemoryAt | None) -> tuple[str, ...]:
    if at is None:
        return (ABSENT,) * 6
    values = (at.kv, at.activations, at.peak, at.address_space, at.reserved, at.driver)
    return tuple(ABSENT if value is None else f"{value / 1e6:,.1f}" for value in values)


def _speed(at: SpeedAt | None) -> tuple[str, ...]:
    if at is None:
        return (ABSENT,) * 4
    joules = ABSENT if at.generate_joules is None else f"{at.generate_joules:.2f}"
    return (_spread(at.prompt_tps, 1), _spread(at.generate_tps, 1), _spread(at.first_token_s, 2), joules)


def _spread(of: Spread, digits: int) -> str:
    return f"{of.median:,.{digits}f} ({of.minimum:,.{digits}f} to {of.maximum:,.{digits}f})"
