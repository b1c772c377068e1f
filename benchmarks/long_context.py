#!/usr/bin/env python3
"""Does the long-context suite see a broken key cache, and would passkey alone have seen it?

    python benchmarks/long_context.py MODEL [--length 4096] [--questions 4] [--seed 0] [--json FILE]

MODEL is a checkpoint that transformers loads. Its cache is broken on purpose: every key is rounded to one of the 16
whole numbers from -8 to 7, four bits without a scale. The same questions are asked with the usual cache and with the
broken one, and compared in pairs; then passkeys alone, as many questions as the whole suite has, in one more context.
Exit status 1 unless p < 0.01 for the answers' log-probability over the suite and p >= 0.01 for the string match of
the passkeys.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from llmlite.evals.chat import chat_template
from llmlite.evals.engines import TransformersEngine, open_engine
from llmlite.evals.generate import TransformersReader
from llmlite.evals.longcontext.needles import TASKS
from llmlite.evals.longcontext.result import LongContext
from llmlite.evals.longcontext.run import LongContextSettings, ask, make_questions
from llmlite.evals.longcontext.table import long_context_table

LEVEL = 0.01


def broken(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys.round().clamp(-8, 7), values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = LongContextSettings((args.length,), tuple(TASKS), questions=args.questions, seed=args.seed)
    settings.check()
    begin = time.process_time()
    result = compare(args.model, settings)
    count = min(len(result.answers), 32)
    alone = compare(args.model, replace(settings, tasks=("passkey",), questions=count))
    everything, passkey = result.figures(), alone.figures()
    for found in (result, alone):
        Console(width=140).print(long_context_table(found, "keys of 4 bits without scales against the usual cache"))
    assert everything.logprob.change is not None and passkey.match.change is not None
    seen, saturated = everything.logprob.change.p < LEVEL, passkey.match.change.p >= LEVEL
    print(f"log-probability of all {everything.questions} answers: p = {everything.logprob.change.p:.2g}")
    print(f"string match of {passkey.questions} passkey answers alone: p = {passkey.match.change.p:.2g}")
    print(f"{time.process_time() - begin:.0f} s of processor time")
    if args.json:
        args.json.write_text(json.dumps({"suite": result.to_json(), "passkey": alone.to_json()}, indent=1) + "\n")
    return 0 if seen and saturated else 1


def compare(model: str, settings: LongContextSettings) -> LongContext:
    engine = open_engine(model, threads=torch.get_num_threads())
    assert isinstance(engine, TransformersEngine), "the fault is built into a transformers cache"
    questions = make_questions(TransformersReader(engine), settings)
    usual = ask(TransformersReader(engine), questions)
    faulty = ask(TransformersReader(engine, broken), questions)
    return LongContext(
        lengths=settings.lengths, seed=settings.seed, text="synthetic", text_sha256=None,
        kv="4-bit keys without scales",
        chat=chat_template(engine) is not None, against="the usual cache", answers=faulty.answers, theirs=usual.answers,
        positions={},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
