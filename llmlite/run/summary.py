"""What `quantize` did, as a table of tensors by type and as JSON."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table

from llmlite.plan.plan import PlanRow
from llmlite.run.quantize import Quantized


def summary(done: Quantized) -> dict:
    """The facts of the table as plain values."""
    return {
        "artifact": str(done.directory),
        "format": str(done.plan.target),
        "bytes": done.plan.bytes,
        "parameters": done.plan.parameters,
        "bits_per_weight": done.plan.bits_per_weight,
        "seconds": {phase: round(spent, 1) for phase, spent in done.seconds.items()},
        "types": [
            {"type": kind, "solver": solver, "tensors": len(rows), "parameters": sum(r.parameters for r in rows),
             "bytes": sum(r.bytes for r in rows), "mean_error": _mean_error(done, rows)}
            for (kind, solver), rows in _by_type(done).items()
        ],
    }  # fmt: skip


def summary_table(done: Quantized) -> Table:
    """A row per type and solver."""
    facts = summary(done)
    table = Table(
        title=f"{facts['artifact']}: {facts['format']}, {facts['bytes'] / 1e6:,.1f} MB of tensors, "
        f"{facts['bits_per_weight']:.2f} bits per weight",
        caption="seconds: " + ", ".join(f"{phase} {spent:,.0f}" for phase, spent in facts["seconds"].items()),
    )
    for heading in ("type", "solver", "tensors", "parameters", "MB", "mean relative error"):
        table.add_column(heading, justify="left" if heading in ("type", "solver") else "right")
    for row in facts["types"]:
        error = "" if row["mean_error"] is None else f"{row['mean_error']:.2e}"
        table.add_row(
            row["type"],
            row["solver"],
            str(row["tensors"]),
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            error,
        )
    return table


def _by_type(done: Quantized) -> dict[tuple[str, str], list[PlanRow]]:
    out: dict[tuple[str, str], list[PlanRow]] = defaultdict(list)
    for row in done.plan.rows:
        out[row.type, row.solver].append(row)
    return out


def _mean_error(done: Quantized, rows: list[PlanRow]) -> float | None:
    known = [done.errors[row.name] for row in rows if row.name in done.errors]
    return sum(known) / len(known) if known else None
