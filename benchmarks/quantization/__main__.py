#!/usr/bin/env python3
"""llmlite beside llama-quantize, GPTQModel, auto-round and bitsandbytes: same base, calibration tokens and texts.

    python -m benchmarks.quantization all --base BASE --data DATA [--work build/quantization]

Run in the repository's root. BASE is a full-precision checkpoint with a chat template. DATA holds wikitext2/
(wiki.test.raw, wiki.valid.raw), calib/c4_demo.jsonl, chat/ and zh_cmrc2018/. Stages can be run alone, and what is
finished is used again: prepare, peers, llmlite, score, report. --only takes patterns of names such as
'llama.cpp/q4_*'. `score FILE...` scores files from elsewhere as well, and prints them.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.llama_cpp_tools import FOLDER, tools
from benchmarks.quantization.artifacts import make_llmlite, make_peers, selected
from benchmarks.quantization.prepare import Setup, prepare
from benchmarks.quantization.report import report
from benchmarks.quantization.score import score
from benchmarks.quantization.texts import TEXTS

STAGES = ("all", "prepare", "peers", "llmlite", "score", "report")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("files", nargs="*", type=Path, help="for score: GGUF files or artifact directories beside ours")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--windows", type=int, default=48, help="rows of 512 tokens scored of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="names of artifacts, tool/type")
    parser.add_argument("--texts", nargs="*", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--tools", type=Path, default=FOLDER, help="where llama.cpp's tools are, or are to be built")
    parser.add_argument("--results", type=Path, help="where the report is written (default: --work)")
    parser.add_argument("--environments", type=Path, help="of GPTQModel and auto-round (default: in --work)")
    args = parser.parse_args()
    environments = args.environments or args.work / "environments"
    base, data, work, around = (path.resolve() for path in (args.base, args.data, args.work, environments))
    setup = Setup(base, data, work, tools(args.tools), around, rows=args.windows, threads=args.threads)
    wanted = selected(args.only)
    if args.stage in ("all", "prepare"):
        prepare(setup)
    if args.stage in ("all", "peers"):
        make_peers(setup, wanted)
    if args.stage in ("all", "llmlite"):
        make_llmlite(setup, wanted)
    if args.stage in ("all", "score"):
        score(setup, wanted, args.files, args.texts)
    if args.stage in ("all", "report"):
        report(setup, args.results or work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
