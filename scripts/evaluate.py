#!/usr/bin/env python3
"""Judge artifacts against the model they were made from, and show them side by side.

    python scripts/evaluate.py BASE ARTIFACT... --text FILE [--windows 20] [--speed] [--picture quality.png]

An artifact is a directory with safetensors or GGUF weights, or a GGUF file. The base itself is the first row.
"""

import argparse
import sys
from pathlib import Path

from llmlite.errors import LlmliteError
from llmlite.evals.evaluate import EvalSettings, evaluate
from llmlite.evals.table import picture, show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("artifacts", nargs="*")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--speed", action="store_true", help="measure speed and memory, too")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()

    def judge(artifact: str, base: str | None):
        settings = EvalSettings(
            base=base, text=tuple(args.text), windows=args.windows, speed=args.speed, memory=args.speed
        )
        return evaluate(artifact, settings)

    try:
        results = [judge(args.base, None), *(judge(artifact, args.base) for artifact in args.artifacts)]
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    show(results)
    if args.picture:
        picture(results, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
