"""The losses of a training as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from llmlite.adapt.training import Trained


def loss_curve(trained: Trained, file: Path, title: str) -> None:
    """A PNG of the loss of each step and of the held-out rows, with a mark at the parameters that were kept."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        steps = range(1, len(trained.losses) + 1)
        axes.plot(steps, trained.losses, color="#8fb3d9", linewidth=1.2, label="each step's rows")
        axes.plot(*zip(*trained.judged, strict=True), color="#b5451c", marker="o", markersize=4, label="held-out rows")
        axes.plot([trained.best_step], [trained.after], "o", color="#b5451c", markersize=10, fillstyle="none")
        axes.annotate(
            f"kept: {trained.after:.3f}", (trained.best_step, trained.after), xytext=(0, 12),
            textcoords="offset points", ha="right" if trained.best_step else "left", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(file, dpi=144)
