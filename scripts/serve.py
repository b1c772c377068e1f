#!/usr/bin/env python3
"""Serve a compressed model as the OpenAI API does.

    python scripts/serve.py ARTIFACT [--port 8000] [--context 4096] [--parallel 4]

An artifact is a directory with safetensors or GGUF weights, a GGUF file, or a hub id. URLs of other servers may stand
in its place.
"""

import sys

from llmlite.errors import LlmliteError
from llmlite.options import Parser, add_options, settings_from
from llmlite.serve.run import serve
from llmlite.serve.settings import ServeSettings


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+")
    add_options(parser, ServeSettings)
    try:
        given = parser.parse_args()
        serve(given.artifacts, settings_from(ServeSettings, given, recipe=None))
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
