#!/usr/bin/env python3
"""Compress a checkpoint with the library: what `llmlite quantize` does, as a starting point for your own script.

    python scripts/quantize.py MODEL OUT --to gguf:q4_0

MODEL is a directory, a GGUF file or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import sys
from pathlib import Path

from rich.console import Console

from llmlite.errors import LlmliteError
from llmlite.options import Parser, add_options, settings_from
from llmlite.run.quantize import QuantizeSettings, quantize
from llmlite.run.summary import summary_table


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    add_options(parser, QuantizeSettings)
    try:
        given = parser.parse_args()
        done = quantize(given.model, given.out, settings_from(QuantizeSettings, given, recipe=None))
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    Console().print(summary_table(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
