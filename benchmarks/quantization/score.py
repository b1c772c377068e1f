"""The stage that scores: each artifact on each text, once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.quantization.artifacts import Artifact
from benchmarks.quantization.pieces import digest, is_made, piece
from benchmarks.quantization.prepare import Setup
from benchmarks.quantization.safetensors_models import multiplied_out
from benchmarks.quantization.scoring import Scored, score_gguf, score_transformers
from llmlite.evals.engines import TransformersEngine
from llmlite.evals.locate import Location, find
from llmlite.evals.size import measure_size


def score(setup: Setup, artifacts: Sequence[Artifact], files: Sequence[Path], texts: Sequence[str]) -> None:
    """Score what has been made of ``artifacts``, and ``files``; print the table of both."""
    made = {artifact.name: artifact.path(setup) for artifact in artifacts if artifact.path(setup).exists()}
    made |= {str(file): file for file in files}
    for text in texts:
        for path in made.values():
            scored(setup, path, text)
    show(setup, made, texts)


def scored(setup: Setup, path: Path, text: str) -> dict:
    """The figures of one artifact on one text, as `Scored.to_json` gives them."""
    location = find(path)

    def make(out: Path) -> None:
        if location.engine == "llama.cpp":
            program, log = setup.tools / "llama-perplexity", setup.work / "logs" / f"{result.stem}.txt"
            found: Scored = score_gguf(program, location.path, setup.logits(text), setup.threads, log)
        else:
            rows = np.load(setup.text_rows(text))
            found = score_transformers(_base(setup), multiplied_out(setup, location.path), rows, text)
        out.write_text(json.dumps(found.to_json(), indent=1) + "\n")

    result, settings = _place(setup, location, text)
    return json.loads(piece(result, settings, make).read_text())


def known(setup: Setup, path: Path, text: str) -> dict | None:
    """What `scored` gives, None where it has not been scored yet."""
    result, settings = _place(setup, find(path), text)
    return json.loads(result.read_text()) if is_made(result, settings) else None


def _place(setup: Setup, location: Location, text: str) -> tuple[Path, dict]:
    judge = "llama-perplexity" if location.engine == "llama.cpp" else "transformers float32"
    artifact = digest(location.path)
    settings = {"artifact": artifact, "base": digest(setup.base), "rows": digest(setup.text_rows(text)), "judge": judge}
    name = sha256(artifact.encode()).hexdigest()[:16]  # a directory's begins with its config, which others may share
    return setup.work / "scores" / f"{name}-{text}-{setup.rows}.json", settings


@cache
def _base(setup: Setup) -> TransformersEngine:
    return multiplied_out(setup, setup.base)


def show(setup: Setup, made: dict[str, Path], texts: Sequence[str]) -> None:
    table = Table("artifact", "MB", "bits per weight", "text", box=SIMPLE_HEAD)
    for column in ("perplexity", "mean KL", "median KL", "p99.9 KL", "same top"):
        table.add_column(column, justify="right")
    for name, path in made.items():
        size = measure_size(find(path))
        for text in texts:
            found = scored(setup, path, text)
            table.add_row(
                name, f"{size.bytes / 1e6:.2f}", f"{size.bits_per_weight:.3f}", text, f"{found['perplexity']:.3f}",
                f"{found['mean_kl']:.6f}", f"{found['median_kl']:.6f}", f"{found['p999_kl']:.4f}",
                f"{found['same_top']:.2%}",
            )  # fmt: skip
    Console(width=max(Console().width, 130)).print(table)
