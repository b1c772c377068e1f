"""Training scales and norms of 3-bit artifacts on the base's predictions: how much nearer they come."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.adaptation.setup import LENGTH, Setup, apart, float32_engine, llama_engine
from llmlite.adapt.repair import RepairSettings, repair, rows_wanted
from llmlite.adapt.stored import open_stored
from llmlite.checkpoint.artifact import GGUF_FILE
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.evals.engines import Engine
from llmlite.formats.dequantized import open_dequantized
from llmlite.plan.plan import stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.run.quantize import QuantizeSettings, quantize
from llmlite.run.text import calibration_rows, other_rows

BAR = 0.85
TARGETS = ("gptq:w3g64", "gguf:q3_k_m")
TOKENS = 32768


def run(setup: Setup) -> dict:
    """KL to the base on WikiText-2's test part; rows of the packaged text that no rounding saw train."""
    checkpoint, reference = open_checkpoint(setup.base), float32_engine(setup.base)
    rows = setup.rows(reference.tokenizer)
    taken, settings = calibration_rows(checkpoint, (), TOKENS, LENGTH, 0), RepairSettings()
    text = other_rows(checkpoint, (), taken, rows_wanted(settings) * LENGTH, 0).ids
    table, shares = [], []
    for target in TARGETS:
        plain = rounded(setup, target)
        out = plain.with_name(f"{plain.name}-repaired")
        told = None
        if not out.is_dir():
            told = _repaired(checkpoint, plain, out, target, text, settings)
        found = {
            name: apart(reference, engine_of(setup, folder), rows, f"{target}, {name}")
            for name, folder in (("feedback", plain), ("repaired", out))
        }
        table += [{"model": f"{target}, {name}", "bytes": weight_bytes(folder), **found[name]}
                  for name, folder in (("feedback", plain), ("repaired", out))]  # fmt: skip
        shares.append(found["repaired"]["mean_kl"] / found["feedback"]["mean_kl"])
        table.append({"model": f"{target}, share", "left": shares[-1], "seconds": told or 0.0})
    same = all(row["bytes"] == other["bytes"] for row, other in zip(table[::3], table[1::3], strict=True))
    bar = f"at the same bytes mean KL is at most {BAR} of what it was"
    return {"bar": bar, "held": same and max(shares) <= BAR, "rows": table}


def rounded(setup: Setup, target: str) -> Path:
    """An artifact of the base, rounded with error feedback; made once."""
    out = setup.work / target.replace(":", "-")
    if not out.is_dir():
        quantize(setup.base, out, QuantizeSettings(target, calibration_tokens=TOKENS, threads=setup.threads))
    return out


def engine_of(setup: Setup, folder: Path) -> Engine:
    """What computes with an artifact: llama.cpp, or its weights multiplied out in float32."""
    if (folder / GGUF_FILE).is_file():
        return llama_engine(folder / GGUF_FILE, None, setup.threads)
    return float32_engine(setup.base, open_dequantized(folder))


def _repaired(
    checkpoint: Checkpoint, plain: Path, out: Path, target: str, text: np.ndarray, settings: RepairSettings
) -> float:
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(plain, new)
    parsed = parse_target(target)
    stored = open_stored(checkpoint, new, type_table(parsed, stored_dtype(checkpoint, parsed), False))
    told = repair(checkpoint, stored, text, settings, new)
    new.rename(out)
    return told.seconds


def weight_bytes(folder: Path) -> int:
    """Of the files that hold the weights."""
    return sum(file.stat().st_size for file in folder.glob("model*"))
