"""Adapters of rank 32 made of rounding errors, on a 3-bit GPTQ base and on a GGUF file: what comes back untrained."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.adaptation.setup import Setup, apart, float32_engine, llama_engine, tokens_per_second
from llmlite.adapt.error_adapters import ErrorAdapterSettings, Init
from llmlite.evals.engines import Engine
from llmlite.formats.dequantized import open_dequantized
from llmlite.formats.gguf.lora import GGUF_LORA
from llmlite.formats.peft import read_adapter
from llmlite.run.error_adapters import Calibration, make_error_adapter
from llmlite.run.quantize import QuantizeSettings, quantize

BAR = 0.30
RANK = 32
TOKENS = 16384
TARGETS = ("gptq:w3g64", "gguf:q3_k_m")
INITS: tuple[Init, ...] = ("qera", "loftq")


def run(setup: Setup) -> dict:
    """Mean KL to the base of each artifact as it is and with each adapter; bytes of both; tokens per second."""
    plain = float32_engine(setup.base)
    rows = setup.rows(plain.tokenizer)
    table, fallen = [], {}
    for target in TARGETS:
        artifact = _artifact(setup, target)
        before = apart(plain, _engine(setup, artifact, None), rows, target)
        table.append({"artifact": target, "adapter": "none", "bytes": _bytes(artifact), **before})
        for init in INITS:
            adapter = _adapter(setup, artifact, init)
            found = apart(plain, _engine(setup, artifact, adapter), rows, f"{target} {init}")
            fallen[target, init] = 1 - found["mean_kl"] / before["mean_kl"]
            size = json.loads((adapter / "llmlite.json").read_text())["bytes"]
            table.append({"artifact": target, "adapter": init, "bytes": size, **found, "fallen": fallen[target, init]})
    lora = setup.work / "gguf-q3_k_m-qera" / GGUF_LORA
    speed = tokens_per_second(setup.work / "gguf-q3_k_m" / "model.gguf", lora, setup.threads)
    table.append({"what": "tokens per second of gguf:q3_k_m", **speed})
    held = fallen["gptq:w3g64", "qera"] >= BAR
    return {"bar": f"mean KL of gptq:w3g64 falls by at least {BAR:.0%}", "held": held, "rank": RANK, "rows": table}


def _artifact(setup: Setup, target: str) -> Path:
    out = setup.work / target.replace(":", "-")
    if not out.is_dir():
        quantize(setup.base, out, QuantizeSettings(target, calibration_tokens=TOKENS, threads=setup.threads))
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
