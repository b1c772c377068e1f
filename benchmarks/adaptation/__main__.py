#!/usr/bin/env python3
"""What adapters, merging and training give back, each against its bar.

    python -m benchmarks.adaptation NAME --base BASE --data DATA --work WORK

Run in the repository's root. BASE is a full-precision checkpoint with a chat template; DATA holds wikitext2/, calib/,
chat/ and books_en/. What is made lies in WORK and is used again; figures go to WORK/NAME.json. Exits with 1 where a
bar is missed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.adaptation import distill, draft, error_adapters, gguf_lora, lora, merge, qat, repair
from benchmarks.adaptation.setup import Setup

BENCHMARKS = {
    "distill": distill.run,
    "error_adapters": error_adapters.run,
    "gguf_lora": gguf_lora.run,
    "lora": lora.run,
    "merge": merge.run,
    "repair": repair.run,
    "qat": qat.run,
    "qat_2_bits": qat.run_2_bits,
    "draft": draft.run,
    "shrink": distill.shrink,
    "teacher_logits": distill.teacher_logits,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/adaptation"))
    parser.add_argument("--windows", type=int, default=16, help="rows of 512 tokens scored of a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--adapter", type=Path, help="gguf_lora, merge: an adapter of BASE to use (default: one is made)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        args.base.resolve(), args.data.resolve(), args.work.resolve(), args.windows, args.threads, args.adapter
    )
    found = BENCHMARKS[args.name](setup)
    (setup.work / f"{args.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    for row in found["rows"]:
        print(
            " | ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print("held" if found["held"] else "missed", f"the bar: {found['bar']}")
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
