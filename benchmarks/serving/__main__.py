#!/usr/bin/env python3
"""llmlite's server beside llama-server: same file, same threads, same requests, in turns.

    python -m benchmarks.serving --model FILE.gguf --questions DIR [--only throughput prefix ...]

Run in the repository's root. DIR holds vicuna_bench_question.jsonl and mt_bench_question.jsonl (FastChat). Writes
--out.md and --out.json; exits with 1 where a bar is missed. llama-server is built from the source that llama-cpp-python
ships (benchmarks/llama_cpp_tools.py).
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

from benchmarks.llama_cpp_tools import FOLDER, VERSION, tools
from benchmarks.serving.cases import CASES
from benchmarks.serving.report import write_report
from benchmarks.serving.servers import Setup
from benchmarks.serving.texts import Texts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file with a chat template")
    parser.add_argument("--questions", type=Path, required=True, help="folder of FastChat's questions")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="times that each pair of servers is compared")
    parser.add_argument("--streams", type=int, nargs="+", default=Setup.streams, help="throughput: requests at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tools", type=Path, default=FOLDER, help="where llama-server is, or is to be built")
    parser.add_argument("--out", type=Path, default=Path("build/serving"))
    args = parser.parse_args()
    setup = Setup(args.model.resolve(), tools(args.tools), args.threads, streams=tuple(args.streams))
    texts = Texts(args.questions)
    about = {
        "model": args.model.name,
        "llama.cpp": f"as in llama-cpp-python {VERSION}",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.serving --only {' '.join(args.only)} --rounds {args.rounds} "
        f"--streams {' '.join(map(str, args.streams))}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict = {}
    for name in args.only:
        found[name] = CASES[name](setup, texts, args.rounds)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        write_report(args.out, about, found)
    return 0 if all(row["met"] for rows in found.values() for row in rows if row["met"] is not None) else 1


if __name__ == "__main__":
    sys.exit(main())
