#!/usr/bin/env python3
"""Train an adapter of a model on chats: what `llmlite lora` does, as a starting point for your own script.

    python scripts/lora.py MODEL OUT --data chat.jsonl
    accelerate launch --num_processes 2 scripts/lora.py MODEL OUT --data chat.jsonl --batch-rows 2

MODEL is a directory or a hub id, in 16 bits or quantized; --quantize bnb:nf4 rounds one in 16 bits first (QLoRA).
"""

import sys
from pathlib import Path

from llmlite.errors import LlmliteError
from llmlite.options import Parser, add_options, settings_from
from llmlite.run.adapting import run_lora
from llmlite.run.lora import LoraSettings


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    add_options(parser, LoraSettings)
    try:
        given = parser.parse_args()
        _, sentence = run_lora(given.model, given.out, settings_from(LoraSettings, given, recipe=None))
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
