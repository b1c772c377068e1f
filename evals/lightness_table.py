"""How light an artifact is, for the terminal: its figures, and a row for each class of machines."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmlite.evals.lightness import Figures, Lightness

ANSWERS = {True: "yes", False: "no", None: "not known"}
WORDS = {
    "memory": "memory at the peak",
    "disk": "bytes on disk",
    "generate_tps": "tokens per second, at most",
    "first_token_s": "seconds to the first token, at least",
    "kept": "best token kept",
}


def lightness_table(found: Lightness, title: str | None = None) -> Table:
    """A row per class: light enough or not, and the figure that decides, beside what the class asks."""
    out = Table(title=title, caption="\n".join(_lines(found.figures)), box=SIMPLE_HEAD)
    for name in ("class", "light enough", "decided by", "has", "may have"):
        out.add_column(name, justify="right" if name in ("has", "may have") else "left", no_wrap=True)
    for verdict in found.verdicts:
        value, most = (threshold(verdict.decides, number) for number in (verdict.value, verdict.threshold))
        out.add_row(verdict.name, ANSWERS[verdict.light], WORDS[verdict.decides], value, most)
    return out


def _lines(figures: Figures) -> list[str]:
    """What is known, unmeasured figures left out."""
    said = [
        f"{figures.parameters / 1e6:,.1f} million parameters, {figures.bits_per_weight:.2f} bits each, "
        f"{figures.bytes / 1e6:,.1f} MB on disk"
    ]
    if figures.flops_per_token is not None:
        said.append(f"{figures.flops_per_token / 1e9:,.3f} GFLOP per token at a context of {figures.context:,}")
    if figures.memory is not None:
        said.append(f"{figures.memory / 1e6:,.1f} MB at the peak beside the program ({figures.device})")
    if figures.generate_tps is not None and figures.first_token_s is not None:
        said.append(
            f"here: first token after {figures.first_token_s:.2f} s, then {figures.generate_tps:.1f} per second"
        )
    if figures.joules_per_token is not None:
        said.append(f"here: {figures.joules_per_token:.2f} J per token")
    if figures.kept is not None and figures.mean_kl is not None:
        said.append(f"keeps the base's best token at {figures.kept:.1%}, mean KL {figures.mean_kl:.5f}")
    return said


def threshold(decides: str, value: float) -> str:
    """What a class asks for, or an artifact has of it, in its unit; ``decides`` as in `Verdict`."""
    if decides in ("memory", "disk"):
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.1%}" if decides == "kept" else f"{value:,.2f}"
