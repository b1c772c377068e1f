"""How far an artifact's predictions are from the base's, on rows of token ids, the second half of each scored.

GGUF files are judged by llama.cpp's own llama-perplexity, safetensors artifacts in transformers: every weight
multiplied out to float32, in the base's own float32 model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.quantization.pieces import run
from llmlite.evals.divergence import Compared, compare_rows, divergence
from llmlite.evals.engines import TransformersEngine
from llmlite.evals.perplexity import Places, Window, perplexity
from llmlite.progress import track

NUMBER = r"(-?[\d.]+|-?nan|-?inf)"
FIGURES = {
    "perplexity": rf"Mean PPL\(Q\)\s*:\s*{NUMBER}",
    "mean_kl": rf"Mean\s+KLD:\s*{NUMBER}",
    "median_kl": rf"Median\s+KLD:\s*{NUMBER}",
    "p999_kl": rf"99\.9%\s+KLD:\s*{NUMBER}",
    "same_top": rf"Same top p:\s*{NUMBER}",
}
# row, perplexity, ln(PPL(Q)/PPL(base)), KL: each of the last three the mean over all rows so far, with its error
CHUNK = re.compile(rf"^\s*(\d+)\s+{NUMBER} ±\s+{NUMBER}\s+{NUMBER} ±\s+{NUMBER}\s+{NUMBER} ±", re.MULTILINE)


@dataclass(frozen=True)
class Scored:
    """Over all scored predictions; KL in nats, ``same_top`` a share; ``rows_kl``: the mean KL of each row."""

    perplexity: float
    mean_kl: float
    median_kl: float
    p999_kl: float
    same_top: float
    rows_kl: tuple[float, ...]

    def to_json(self) -> dict:
        return asdict(self)


def score_gguf(program: Path, model: Path, logits: Path, threads: int, log: Path) -> Scored:
    """By llama-perplexity --kl-divergence.

    It prints the mean KL of the first 1, 2, ... rows with 5 decimals, so a row's own mean has an error of up to
    1e-5 times its number. That is small beside how much rows differ, and makes the interval of a ratio wider only.
    """
    command = [str(program), "-m", str(model), "--kl-divergence", "--kl-divergence-base", str(logits)]
    said = run([*command, "-t", str(threads)], log)
    values = {name: _figure(pattern, said) for name, pattern in FIGURES.items()}
    values["same_top"] /= 100
    means = np.array([float(found[6]) for found in CHUNK.finditer(said)])
    if not len(means) or abs(means[-1] - values["mean_kl"]) > 2e-5:
        raise SystemExit(f"llama-perplexity's lines of rows are not as expected: see {log}")
    numbers = np.arange(1, len(means) + 1)
    rows = np.diff(means * numbers, prepend=0.0)
    return Scored(**values, rows_kl=tuple(float(value) for value in rows))


def _figure(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise SystemExit(f"llama-perplexity did not print {pattern}:\n{said[-2000:]}")
    return float(found[1])


def score_transformers(base: TransformersEngine, artifact: TransformersEngine, rows: np.ndarray, name: str) -> Scored:
    """By transformers, both models side by side over ``rows`` int64 [r, n]."""
    windows = [Window(row, number * len(row), len(row) // 2) for number, row in enumerate(rows)]
    compared = Compared.joined(
        [chunk for w in track(windows, name, len(rows)) for chunk in _compared(base, artifact, w)]
    )
    places = Places.of(windows)
    apart = divergence(compared, places, base.vocab_size)
    value = perplexity(-compared.own.astype(np.float64), places).value
    return Scored(value, apart.mean_kl, apart.median_kl, apart.p999_kl, apart.same_top, apart.by_window)


def _compared(base: TransformersEngine, artifact: TransformersEngine, window: Window) -> Iterator[Compared]:
    inputs = window.tokens[:-1]
    both = zip(base.log_probs(inputs, window.first), artifact.log_probs(inputs, window.first), strict=True)
    for (start, theirs), (_, mine) in both:
        targets = torch.from_numpy(window.tokens[start + 1 : start + 1 + len(mine)])
        yield compare_rows(theirs, mine, targets, base.vocab_size)
