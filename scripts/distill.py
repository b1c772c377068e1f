#!/usr/bin/env python3
"""Make a smaller student of a model and train it on the model's own predictions.

    python scripts/distill.py OUT --teacher BASE --layers 24 --data text.txt --minutes 10
    python scripts/distill.py OUT --teacher BASE --to gptq:w3g64 --minutes 10

The same as `llmlite distill`; the options are the fields of `DistillSettings`. Under `accelerate launch` each process
takes its share of every batch.
"""

import sys
from pathlib import Path

from llmlite.errors import LlmliteError
from llmlite.options import Parser, add_options
from llmlite.run.distill import DistillSettings
from llmlite.run.distilling import run_distill


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.set_defaults(recipe=None)
    add_options(parser, DistillSettings)
    try:
        done = run_distill(parser.parse_args())
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
