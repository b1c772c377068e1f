#!/usr/bin/env python3
"""Build llama-perplexity, llama-quantize, llama-imatrix and llama-server from the source of llama-cpp-python.

    python benchmarks/llama_cpp_tools.py [--folder build/llama.cpp]
    python benchmarks/llama_cpp_tools.py --flags    # prints the compiler flags that any build of llama.cpp wants here

Their llama.cpp is then the one that the package llama_cpp computes with. The source comes through pip; cmake, ninja
and a C++ compiler must be there. What is built already is used again. On 2 cores the build takes about 15 minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.3.36"  # of llama-cpp-python; keep it equal to the installed one
TOOLS = ("llama-perplexity", "llama-quantize", "llama-imatrix", "llama-server")
FOLDER = Path(__file__).resolve().parents[1] / "build" / "llama.cpp"
# Some virtual machines announce Intel's AMX and don't let a program use it: what was compiled for it dies there of an
# illegal instruction.
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_CURL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    **{f"LLAMA_BUILD_{part}": "OFF" for part in ("TESTS", "EXAMPLES", "APP", "MTMD", "UI")},
}


def tools(folder: Path = FOLDER) -> Path:
    """The directory with the programs, built in ``folder`` unless they are there; SystemExit says why not."""
    programs = folder / "bin"
    if all((programs / tool).is_file() for tool in TOOLS):
        return programs
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is needed to build llama.cpp's tools, and is not installed")
    source = _source(folder)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    flags = compiler_flags()
    options += [f"-DCMAKE_{kind}_FLAGS={os.environ.get(f'{kind}FLAGS', '')} {flags}" for kind in ("C", "CXX")]
    _run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder), *options])
    _run(["cmake", "--build", str(folder), "--target", *TOOLS])
    return programs


def compiler_flags() -> str:
    """What to add to CFLAGS and CXXFLAGS: WITHOUT_AMX, or nothing for a compiler that does not know those flags."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return ""
    probe = [compiler, *WITHOUT_AMX.split(), "-x", "c", "-fsyntax-only", os.devnull]
    return WITHOUT_AMX if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else ""


def _source(folder: Path) -> Path:
    """llama.cpp as it stands in the source distribution of llama-cpp-python."""
    unpacked = folder / "source"
    source = unpacked / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if source.is_dir():
        return source
    fetch = ["pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(unpacked)]
    _run([sys.executable, "-m", *fetch, f"llama-cpp-python=={VERSION}"])
    partial = unpacked / "partial"
    with tarfile.open(unpacked / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(partial, filter="data")
    (partial / f"llama_cpp_python-{VERSION}").rename(unpacked / f"llama_cpp_python-{VERSION}")
    return source


def _run(command: list[str]) -> None:
    print("$", " ".join(command), file=sys.stderr)
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{command[0]} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--flags", action="store_true", help="print compiler flags and build nothing")
    settings = parser.parse_args()
    print(compiler_flags() if settings.flags else tools(settings.folder))
