"""Tables on the terminal."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show_wide(*tables: Table) -> None:
    """Print to standard output, wider than the terminal rather than with names and figures cut."""
    console = Console()
    wanted = [Measurement.get(console, console.options.update(width=1000), table).maximum for table in tables]
    wide = Console(width=max(console.width, *wanted))
    for table in tables:
        wide.print(table)
