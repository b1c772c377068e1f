"""The other tools, each from its package, on the same base and the same calibration tokens."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.llama_cpp_tools import VERSION
from benchmarks.quantization.pieces import digest, piece, run
from benchmarks.quantization.prepare import Setup

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "gptqmodel": ("gptqmodel==7.7.0",),
    "auto-round": ("auto-round==0.16.1",),
}


def make_peer(setup: Setup, tool: str, kind: str, path: Path) -> None:
    """One artifact of a peer at ``path``: a GGUF file of llama-quantize, else a directory."""
    log = setup.work / "logs" / f"{tool}-{kind}.txt"

    def make(out: Path) -> None:
        if tool == "llama.cpp":
            _llama_quantize(setup, kind, out, log)
        elif tool == "bitsandbytes":
            _bitsandbytes(setup, kind, out)
        else:
            _driven(setup, tool, kind, out, log)

    calibration = digest(setup.calibration_rows())
    piece(path, {**setup.origin, "calibration": calibration, "tool": _version(tool), "type": kind}, make)


def imatrix(setup: Setup) -> Path:
    """llama-imatrix over the calibration text, whose tokens are the rows that every other tool gets."""
    text, model = setup.calibration(), setup.gguf()

    def make(out: Path) -> None:
        command = [str(setup.tools / "llama-imatrix"), "-m", str(model), "-f", str(text), "-o", str(out), "--no-ppl"]
        command += ["--parse-special", "-c", str(setup.length), "--chunks", str(setup.tokens // setup.length)]
        run([*command, "-t", str(setup.threads)], setup.work / "logs" / "imatrix.txt")

    return piece(setup.work / "imatrix.gguf", {"model": digest(model), "text": digest(text)}, make)


def _llama_quantize(setup: Setup, kind: str, out: Path, log: Path) -> None:
    preset, _, pure = kind.partition("-")
    command = [str(setup.tools / "llama-quantize"), "--imatrix", str(imatrix(setup)), *(["--pure"] if pure else [])]
    command += [str(setup.gguf()), str(out), preset.upper(), str(setup.threads)]
    run(command, log)


def _driven(setup: Setup, tool: str, kind: str, out: Path, log: Path) -> None:
    """GPTQModel or auto-round, in an environment of its own: each wants another torch than llmlite's."""
    python = environment(setup, tool)
    bits, group = kind.removeprefix("w").split("g")
    driver = HERE / f"run_{tool.replace('-', '_')}.py"
    command = [str(python), str(driver), str(setup.base), str(setup.calibration_rows()), str(out), bits, group]
    # GPTQModel does not start with fewer workers than two.
    threads = {"OMP_NUM_THREADS": str(setup.threads), "GPTQMODEL_CPU_WORKERS": str(max(setup.threads, 2))}
    # Without PYTHONPATH, which may lead to packages of this interpreter's environment.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(command, log, {**own, **threads})


def environment(setup: Setup, tool: str) -> Path:
    """The Python of a virtual environment with the tool in it, built where it is not there."""
    folder = setup.environments / tool
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(PACKAGES[tool])
    if not stamp.is_file() or stamp.read_text() != wanted:
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
        run([str(python), "-m", "pip", "install", "-q", *PACKAGES[tool]])
        stamp.write_text(wanted)
    return python


def _version(tool: str) -> str:
    """What made an artifact: the package that it comes from, with its version."""
    if tool == "llama.cpp":
        return f"llama-cpp-python {VERSION}"
    if tool == "bitsandbytes":
        return f"bitsandbytes {version('bitsandbytes')}, transformers {version('transformers')}"
    return " ".join(PACKAGES[tool])


def _bitsandbytes(setup: Setup, kind: str, out: Path) -> None:
    """nf4 with double quantization through transformers, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(setup.base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(out)
