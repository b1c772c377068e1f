"""A comparison on the terminal, and as a picture: each difference with its interval beside zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmlite.evals.compare import Comparison, Difference, percent
from llmlite.evals.figures import lookup
from llmlite.evals.gate import number
from llmlite.evals.table import check_picture
from llmlite.evals.terminal import show_wide

SIDE_BY_SIDE = (
    "bytes", "bits_per_weight", "texts.*.perplexity.value", "texts.*.divergence.mean_kl", "texts.*.divergence.p999_kl",
    "texts.*.divergence.same_top", "memory.weights", "memory.kv_per_token", "memory.peak", "speed.prompt_tps",
    "speed.generate_tps", "tasks.*.*.value", "long_context.all.*.value", "long_context.tasks.*.*.*.value",
)  # fmt: skip
CALLS = {True: "real", False: "may be chance", None: "too few to tell"}


def show_comparison(comparison: Comparison) -> None:
    """Print both tables to standard output."""
    show_wide(figures_table(comparison), differences_table(comparison))
    console = Console()
    for note in comparison.notes:
        console.print(note, markup=False, highlight=False)


def figures_table(comparison: Comparison) -> Table:
    """A row per figure that anyone has, a column per artifact."""
    table = Table(title="side by side", box=SIMPLE_HEAD)
    table.add_column("figure", overflow="fold")
    for name in comparison.evaluations:
        table.add_column(Text(name), justify="right", overflow="fold")
    for figure, values in side_by_side(comparison.evaluations):
        table.add_row(Text(figure), *(number(value) for value in values))
    return table


def side_by_side(evaluations: dict[str, dict]) -> list[tuple[str, list]]:
    """Each figure that anyone has with everyone's value, None where it was not measured."""
    rows = []
    for address in SIDE_BY_SIDE:
        found = [lookup(facts, address) for facts in evaluations.values()]
        for figure in dict.fromkeys(figure for of in found for figure in of):
            rows.append((figure, [of.get(figure) for of in found]))
    return rows


def differences_table(comparison: Comparison) -> Table:
    """A row per figure and pair, with what may be said of it."""
    table = Table(title="differences, first less second", box=SIMPLE_HEAD)
    for name in ("figure", "first", "second", "difference", "perplexity", f"{comparison.how.level:.0%} interval", ""):
        table.add_column(
            name, overflow="fold", justify="left" if name in ("figure", "first", "second", "") else "right"
        )
    for difference in comparison.differences:
        interval = difference.interval
        words = (
            difference.figure, difference.first, difference.second, f"{interval.difference:+.3g}",
            percent(difference), f"{interval.low:+.3g} .. {interval.high:+.3g}", CALLS[interval.real],
        )  # fmt: skip
        table.add_row(*(Text(word, style="bold" if interval.real else "") for word in words))
    return table


def comparison_picture(comparison: Comparison, path: Path) -> None:
    """Each difference of each figure, with its interval; filled where it is real. Raises what `check_picture` does."""
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    groups: dict[str, list[Difference]] = {}
    for difference in comparison.differences:
        groups.setdefault(difference.figure, []).append(difference)
    with matplotlib.rc_context({"text.parse_math": False}):
        rows = sum(len(group) + 1.6 for group in groups.values())
        figure = Figure(figsize=(9, 0.8 + 0.42 * rows), layout="constrained")
        all_axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(g) + 1 for g in groups.values()])
        for axes, (name, group) in zip(all_axes[:, 0], groups.items(), strict=True):
            _forest(axes, name, group)
        figure.savefig(path, dpi=120)


def _forest(axes, name: str, group: Sequence[Difference]) -> None:
    for row, difference in enumerate(group):
        at = difference.interval
        axes.plot([at.family_low, at.family_high], [row, row], color="#888888", linewidth=1, zorder=1)
        axes.plot([at.low, at.high], [row, row], color="#0072b2", linewidth=3, zorder=2)
        fill = "#0072b2" if at.real else "white"
        axes.scatter([at.difference], [row], s=45, facecolor=fill, edgecolor="#0072b2", linewidth=1.5, zorder=3)
    axes.axvline(0, color="#555555", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(group)), [f"{of.first} - {of.second}" for of in group], fontsize=8)
    axes.set_ylim(len(group) - 0.4, -0.6)
    unit = "nats per token" if name.endswith((".nll", ".kl")) else "mean of items"
    axes.set_title(f"{name} ({unit}): thick interval by itself, thin all at once", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
