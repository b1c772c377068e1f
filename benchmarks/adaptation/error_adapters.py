"""Adapters of rank 32 made of rounding errors, on 3-bit GPTQ bases and on a GGUF file: what comes back untrained.

Error feedback leaves errors that are nearly white in the inputs' metric, and little for a low rank; rounding to nearest
leaves more of both.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.adaptation.setup import Setup, apart, float32_engine, llama_engine, tokens_per_second
from llmlite.adapt.error_adapters import ErrorAdapterSettings, Init
from llmlite.evals.engines import Engine
from llmlite.formats.dequantized import open_dequantized
from llmlite.formats.gguf.lora import GGUF_LORA
from llmlite.formats.peft import read_adapter
from llmlite.plan.plan import SolverName
from llmlite.run.error_adapters import Calibration, make_error_adapter
from llmlite.run.quantize import QuantizeSettings, quantize

BAR = 0.30
RANK = 32
TOKENS = 16384
TARGETS: tuple[tuple[str, SolverName], ...] = (
    ("gptq:w3g64", "feedback"),
    ("gptq:w3g64", "rtn"),
    ("gguf:q3_k_m", "feedback"),
    ("gguf:q3_k_m", "rtn"),
)
INITS: tuple[Init, ...] = ("qera", "loftq")


def run(setup: Setup) -> dict:
    """Mean KL to the base of each artifact as it is and with each adapter; bytes of both; tokens per second."""
    plain = float32_engine(setup.base)
    rows = setup.rows(plain.tokenizer)
    table, fallen = [], {}
    for target, solver in TARGETS:
        artifact = _artifact(setup, target, solver)
        before = apart(plain, _engine(setup, artifact, None), rows, artifact.name)
        table.append({"artifact": artifact.name, "adapter": "none", "bytes": _bytes(artifact), **before})
        for init in INITS:
            adapter = _adapter(setup, artifact, init)
            found = apart(plain, _engine(setup, artifact, adapter), rows, f"{artifact.name} {init}")
            fallen[artifact.name, init] = 1 - found["mean_kl"] / before["mean_kl"]
            size = json.loads((adapter / "llmlite.json").read_text())["bytes"]
            share = fallen[artifact.name, init]
            table.append({"artifact": artifact.name, "adapter": init, "bytes": size, **found, "fallen": share})
    lora = setup.work / "gguf-q3_k_m-feedback-qera" / GGUF_LORA
    speed = tokens_per_second(setup.work / "gguf-q3_k_m-feedback" / "model.gguf", lora, setup.threads)
    table.append({"what": "tokens per second of gguf:q3_k_m", **speed})
    held = all(fallen[f"gptq-w3g64-{solver}", "qera"] >= BAR for solver in ("feedback", "rtn"))
    return {"bar": f"mean KL of both gptq:w3g64 falls by at least {BAR:.0%}", "held": held, "rank": RANK, "rows": table}


def _artifact(setup: Setup, target: str, solver: SolverName) -> Path:
    out = setup.work / f"{target.replace(':', '-')}-{solver}"
    if not out.is_dir():
        settings = QuantizeSettings(target, solver=solver, calibration_tokens=TOKENS, threads=setup.threads)
        quantize(setup.base, out, settings)
    return out


def _adapter(setup: Setup, artifact: Path, init: Init) -> Path:
    out = setup.work / f"{artifact.name}-{init}"
    if not out.is_dir():
        text = Calibration(calibration_tokens=TOKENS)
        make_error_adapter(str(artifact), str(setup.base), out, ErrorAdapterSettings(init, RANK), text)
    return out


def _engine(setup: Setup, artifact: Path, adapter: Path | None) -> Engine:
    file = artifact / "model.gguf"
    if file.is_file():
        return llama_engine(file, adapter / GGUF_LORA if adapter else None, setup.threads)
    return float32_engine(setup.base, open_dequantized(artifact), read_adapter(adapter) if adapter else None)


def _bytes(artifact: Path) -> int:
    """Of all its tensors."""
    return sum(row["bytes"] for row in json.loads((artifact / "llmlite.json").read_text())["plan"])
