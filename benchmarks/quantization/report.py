"""The results as JSON, Markdown and a picture, from whatever has been made and scored."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.quantization.artifacts import LLMLITE, PEERS, pairs
from benchmarks.quantization.pieces import made_from
from benchmarks.quantization.prepare import Setup
from benchmarks.quantization.score import known
from benchmarks.quantization.texts import TEXTS
from llmlite.evals.locate import find
from llmlite.evals.size import measure_size

SAMPLES = 10_000
HEAD = ("text", "artifact", "MB", "bits", "mean KL", "median KL", "p99.9 KL", "same top", "perplexity")
PAIR_HEAD = ("text", "llmlite", "against", "bytes, ratio", "perplexity, ratio", "mean KL, ratio", "95% interval")
NAME = "quantization"


def report(setup: Setup, folder: Path) -> None:
    """Write the three files into ``folder``, and print where they are."""
    results = gather(setup)
    if not results["artifacts"]:
        raise SystemExit(f"{setup.work}: nothing has been scored there yet")
    folder.mkdir(parents=True, exist_ok=True)
    data, text, drawn = (folder / f"{NAME}.{ending}" for ending in ("json", "md", "png"))
    data.write_text(json.dumps(results, indent=1) + "\n")
    text.write_text(markdown(results))
    picture(results, drawn)
    for path in (data, text, drawn):
        print(path)


def gather(setup: Setup) -> dict:
    """``artifacts``: by name, what made it, its size and its figures by text; ``pairs``: llmlite against each peer."""
    artifacts = {}
    for artifact in (*PEERS, *LLMLITE):
        path = artifact.path(setup)
        if not path.exists():
            continue
        texts = {text: figures for text in TEXTS if (figures := known(setup, path, text)) is not None}
        if texts:
            size = measure_size(find(path))
            facts = {"bytes": size.bytes, "bits_per_weight": size.bits_per_weight, "texts": texts}
            origin = {key: value for key, value in made_from(path).items() if key != "command"}  # it has local paths
            named = {"tool": artifact.tool, "type": artifact.type, "made_from": origin}
            artifacts[artifact.name] = {**named, **facts}
    settings = {"windows": setup.rows, "window": setup.length, "calibration_tokens": setup.tokens, **setup.origin}
    made = {"date": date.today().isoformat(), "machine": machine(), "command": f"python -m benchmarks.{NAME}"}
    return {**made, "settings": settings, "artifacts": artifacts, "pairs": list(_pairs(artifacts))}


def machine() -> str:
    """The processor's name and how many there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or sys.platform}, {os.cpu_count()} logical cores"


def _pairs(artifacts: dict) -> Iterator[dict]:
    for ours, other in pairs():
        mine, theirs = artifacts.get(ours.name), artifacts.get(other.name)
        if mine is None or theirs is None:
            continue
        for text in TEXTS:
            if text in mine["texts"] and text in theirs["texts"]:
                one, two = (side["texts"][text] for side in (mine, theirs))
                ratio, low, high = ratio_of_means(np.array(one["rows_kl"]), np.array(two["rows_kl"]))
                yield {
                    "text": text, "llmlite": ours.name, "peer": other.name, "bytes": mine["bytes"] / theirs["bytes"],
                    "perplexity": one["perplexity"] / two["perplexity"], "mean_kl": ratio, "low": low, "high": high,
                }  # fmt: skip


def ratio_of_means(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """mean(mine) / mean(theirs) of paired rows [n], and its 95% percentile bootstrap interval over rows."""
    chosen = np.random.default_rng(0).integers(len(mine), size=(SAMPLES, len(mine)))
    ratios = mine[chosen].mean(axis=1) / theirs[chosen].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(mine.mean() / theirs.mean()), float(low), float(high)


def markdown(results: dict) -> str:
    settings = results["settings"]
    figures = [
        (
            text, name, f"{facts['bytes'] / 1e6:.1f}", f"{facts['bits_per_weight']:.2f}", f"{scored['mean_kl']:.5f}",
            f"{scored['median_kl']:.5f}", f"{scored['p999_kl']:.3f}", f"{scored['same_top']:.2%}",
            f"{scored['perplexity']:.3f}",
        )
        for text in TEXTS
        for name, facts in sorted(results["artifacts"].items(), key=lambda item: item[1]["bytes"])
        if (scored := facts["texts"].get(text)) is not None
    ]  # fmt: skip
    pairs = [
        (
            pair["text"], pair["llmlite"], pair["peer"], f"{pair['bytes']:.4f}", f"{pair['perplexity']:.4f}",
            f"{pair['mean_kl']:.3f}", f"{pair['low']:.3f} to {pair['high']:.3f}",
        )
        for pair in sorted(results["pairs"], key=lambda pair: TEXTS.index(pair["text"]))
    ]  # fmt: skip
    return (
        "# Quantization: llmlite beside its peers\n\n"
        f"{settings['windows']} windows of {settings['window']} tokens from each text, the second half of each scored; "
        f"{settings['calibration_tokens']:,} calibration tokens, the same for every tool. KL in nats from the base in "
        "float32. GGUF files are judged by llama-perplexity, the others in transformers, weights multiplied out to "
        f"float32. Made by `{results['command']}` on {results['machine']}, {results['date']}.\n\n"
        f"![mean KL against bytes]({NAME}.png)\n\n## llmlite against each peer\n\n"
        "Below 1 is better for llmlite. The interval is a paired bootstrap over windows.\n\n"
        f"{_table(PAIR_HEAD, pairs)}\n## All figures\n\n{_table(HEAD, figures)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(results: dict, path: Path) -> None:
    """Mean KL against bytes, a panel for each text that was scored, a colour for each tool."""
    from matplotlib.figure import Figure

    texts = [text for text in TEXTS if any(text in facts["texts"] for facts in results["artifacts"].values())]
    across, down = min(len(texts), 2), -(-len(texts) // 2)
    figure = Figure(figsize=(7 * across, 5 * down), layout="constrained")
    tools = list(dict.fromkeys(facts["tool"] for facts in results["artifacts"].values()))
    for text, axes in zip(texts, figure.subplots(down, across, squeeze=False).flat, strict=False):
        for number, tool in enumerate(tools):
            points = [
                (facts["bytes"] / 1e6, facts["texts"][text]["mean_kl"], facts["type"])
                for facts in results["artifacts"].values()
                if facts["tool"] == tool and text in facts["texts"]
            ]
            if not points:
                continue
            style = {"marker": "os^vD"[number % 5], "color": f"C{number}", "label": tool}
            axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], **style)
            above = 4 if tool == "llmlite" else -9
            for x, y, kind in points:
                side, at = ("right", -5) if kind.startswith("size-") else ("left", 5)
                where = {"textcoords": "offset points", "xytext": (at, above), "ha": side}
                axes.annotate(kind, (x, y), fontsize=7, color=f"C{number}", **where)
        axes.set_yscale("log")
        axes.margins(0.15)
        axes.set_title(text)
        axes.set_xlabel("bytes on disk (MB)")
        axes.set_ylabel("mean KL from the base (nats)")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
