#!/usr/bin/env python3
"""Error feedback against round-to-nearest: the same base, grid and bytes, judged on text that calibration never saw.

    python benchmarks/rounding.py BASE [--windows 20] [--tokens 32768]

BASE is a full-precision checkpoint, such as demo-out/base. For each target both solvers are run, then measured on the
WikiText-2 excerpt; at 8 bits the perplexity is held against the base's. Exit status 1 where feedback does not win on
both perplexity and divergence at 4 bits, where the files differ in size, or where 8 bits with feedback cost more than
0.5% of the base's perplexity.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from llmlite.evals.evaluate import EvalSettings, Evaluation, evaluate
from llmlite.evals.table import show
from llmlite.plan.plan import SolverName
from llmlite.run.quantize import QuantizeSettings, quantize

TEXT = Path(__file__).resolve().parents[1] / "examples" / "wikitext2-test-excerpt.txt"
FOUR_BITS = ("gguf:q4_0", "gguf:q4_1", "compressed-tensors:w4a16g64")
EIGHT_BITS = ("gguf:q8_0", "compressed-tensors:w8a16")
MOST_AT_8_BITS = 5e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    solvers: tuple[SolverName, ...] = ("rtn", "feedback")
    jobs = [(target, solver) for target in (*FOUR_BITS, *EIGHT_BITS) for solver in solvers]
    results: dict[tuple[str, str], Evaluation] = {}
    base = evaluate(args.base, EvalSettings(text=(str(TEXT),), windows=args.windows))
    with tempfile.TemporaryDirectory() as folder:
        for target, solver in track(jobs, "rounding and measuring"):
            out = Path(folder) / f"{target.replace(':', '-')}-{solver}"
            quantize(args.base, out, QuantizeSettings(target, solver=solver, calibration_tokens=args.tokens))
            settings = EvalSettings(base=args.base, text=(str(TEXT),), windows=args.windows)
            results[target, solver] = evaluate(out, settings)
    show([base, *results.values()], f"{Path(args.base).name}: error feedback against round-to-nearest")
    if args.json:
        facts = {f"{target} {solver}": result.to_json() for (target, solver), result in results.items()}
        args.json.write_text(json.dumps({"base": base.to_json(), **facts}, indent=2) + "\n")
    return 0 if _holds(results, base) else 1


def _figures(result: Evaluation) -> tuple[float, float]:
    (score,) = result.scores.values()
    return score.perplexity.value, score.divergence.mean_kl if score.divergence else 0.0


def _holds(results: dict[tuple[str, str], Evaluation], base: Evaluation) -> bool:
    held = True
    for target in FOUR_BITS:
        (plain, plain_kl), (mine, mine_kl) = _figures(results[target, "rtn"]), _figures(results[target, "feedback"])
        same = results[target, "rtn"].size.bytes == results[target, "feedback"].size.bytes
        print(f"{target}: perplexity {mine / plain:.3f}, mean KL {mine_kl / plain_kl:.3f} of round-to-nearest's")
        held &= same and mine < plain and mine_kl < plain_kl
    for target in EIGHT_BITS:
        plain, mine = (_figures(results[target, s])[0] / _figures(base)[0] - 1 for s in ("rtn", "feedback"))
        print(f"{target}: perplexity {mine:+.2%} against the base, rounded to nearest {plain:+.2%}")
        held &= mine < MOST_AT_8_BITS
    return held


if __name__ == "__main__":
    sys.exit(main())
