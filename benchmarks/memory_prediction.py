"""Memory told before a run against memory measured in it, of one artifact at several contexts.

    python benchmarks/memory_prediction.py ARTIFACT [--contexts 512 2048 8192] [--threads N] [--json FILE]

Prints a row per context: the predicted parts, the predicted and the measured peak, their difference. On a CPU the bar
is 3% of the measured peak and 64 MiB; the exit status is 1 where a context misses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmlite.errors import LlmliteError
from llmlite.evals.engines import engine_version
from llmlite.evals.locate import find
from llmlite.evals.memory import Memory
from llmlite.evals.predict import Prediction, predict
from llmlite.evals.probe import probe

SHARE, FLOOR = 0.03, 64 << 20
PARTS = ("program", "runtime", "weights", "loading", "kv", "activations")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        location = find(args.artifact)
        contexts = sorted(set(args.contexts))
        told = predict(location.path, contexts, args.threads)
        seen, _ = probe(location.path, args.threads, 0, contexts)
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    show(told, seen, f"{location.path}, {engine_version(location.engine)}, MB")
    if args.json is not None:
        facts = {"predictions": [dataclasses.asdict(one) for one in told], "memory": seen.to_json()}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(within(one, at.peak) for one, at in zip(told, seen.contexts, strict=True)) else 1


def within(told: Prediction, peak: int) -> bool:
    return abs(told.peak - peak) <= SHARE * peak + FLOOR


def show(told: list[Prediction], seen: Memory, title: str) -> None:
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("prompt", *PARTS, "predicted", "measured", "difference", "within the bar"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, at in zip(told, seen.contexts, strict=True):
        parts = [f"{getattr(one, part) / 1e6:,.1f}" for part in PARTS]
        apart = (one.peak - at.peak) / at.peak
        sums = [f"{one.peak / 1e6:,.1f}", f"{at.peak / 1e6:,.1f}", f"{apart:+.1%}"]
        table.add_row(f"{one.context:,}", *parts, *sums, "yes" if within(one, at.peak) else "no")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
