#!/usr/bin/env python3
"""Run suites by others against `llmlite serve`.

    python -m benchmarks.conformance --model FILE.gguf --tokenizer CHECKPOINT --data DATA --llama-tests FOLDER \
        [--only clients langchain schemathesis llama.cpp lm-eval]

MODEL answers the clients, langchain-tests and lm-eval, a model of 260,000 parameters the others; TOKENIZER is the
checkpoint that MODEL was made from. DATA has openbookqa/, hellaswag/ and stories260k/. FOLDER is tools/server/tests of
llama.cpp, as the sdist of llama-cpp-python holds it at vendor/llama.cpp. Each suite runs in an environment of its own
under build/conformance, made from packages by name when it isn't there, but for lm-eval, which is this one's. Exit
status 1 if a test failed that is not waived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from benchmarks.conformance.fuzz import WAIVED, read_operations
from benchmarks.conformance.harness import run_harness
from benchmarks.conformance.result import Suite, as_markdown, read_outcomes
from benchmarks.conformance.stories import write_stories

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "conformance"
STORIES = BUILD / "stories260K.gguf"
SUITES = ("clients", "langchain", "schemathesis", "llama.cpp", "lm-eval")
PACKAGES = {
    "clients": ("pytest", "openai", "anthropic"),
    "langchain": ("langchain-tests", "langchain-openai"),
    "schemathesis": ("schemathesis",),
    "llama.cpp": ("pytest", "openai", "requests", "wget", "filelock", "prometheus-client", "aiohttp"),
}
LLAMA_FILES = (
    "test_security.py", "test_tokenize.py", "test_compat_anthropic.py", "test_compat_oai_responses.py",
    "test_chat_completion.py",
)  # fmt: skip
LLAMA_TESTS = ("test_completion.py::test_completion_with_openai_library",
               "test_completion.py::test_completion_stream_with_openai_library")  # fmt: skip
READY = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--llama-tests", type=Path)
    parser.add_argument("--items", type=int, default=12, help="lm-eval: questions of each task")
    parser.add_argument("--threads", type=int, default=2, help="of the server: 1 where others use the machine, too")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--out", type=Path, default=BUILD / "conformance.md")
    args = parser.parse_args()
    needs = {"llama.cpp": ("llama_tests", "data"), "lm-eval": ("tokenizer", "data"), "schemathesis": ("data",)}
    for suite in args.only:
        for need in needs.get(suite, ()):
            if vars(args)[need] is None:
                parser.error(f"{suite} needs --{need.replace('_', '-')}")
    BUILD.mkdir(parents=True, exist_ok=True)
    suites = [run(name, args) for name in SUITES if name in args.only]
    command = f"python -m benchmarks.conformance --model {args.model.name} --tokenizer CHECKPOINT --data DATA"
    command += f" --llama-tests FOLDER --threads {args.threads} --items {args.items} --only {' '.join(args.only)}"
    page = as_markdown(suites, command, f"Against `llmlite serve`, {date.today().isoformat()}.")
    args.out.write_text(page, "utf-8")
    print(page)
    return 1 if any(suite.failed for suite in suites) else 0


def run(name: str, args: argparse.Namespace) -> Suite:
    print(f"{name} ...", file=sys.stderr, flush=True)
    if name == "llama.cpp":
        return llama_cpp(args.llama_tests, args.data / "stories260k")
    if name == "schemathesis":
        write_stories(args.data / "stories260k", STORIES)
        with served(STORIES, args.threads, "--context", "128") as url:
            return schemathesis(url)
    with served(args.model, args.threads, "--context", "4096", *(["--exact"] if name == "lm-eval" else [])) as url:
        if name == "clients":
            return clients(url)
        if name == "langchain":
            return langchain(url)
        return run_harness(args.model, url, args.tokenizer, args.data, BUILD, args.items)


def clients(url: str) -> Suite:
    python = environment("clients")
    out = BUILD / "clients.json"
    settings = {"CONFORMANCE_URL": url, "CONFORMANCE_WAIVERS": os.devnull}
    pytest(python, ["clients_suite.py", "-c", os.devnull, "--rootdir", str(HERE)], HERE, out, settings)
    version = ", ".join(f"{client} {version_of(python, client)}" for client in ("openai", "anthropic"))
    return read_outcomes("the openai and anthropic clients, strict", version, out)


def schemathesis(url: str) -> Suite:
    """Every operation of the OpenAPI document with requests made from it, right ones and wrong ones."""
    python = environment("schemathesis")
    out = BUILD / "schemathesis.xml"
    out.unlink(missing_ok=True)
    command = [
        str(python.with_name("schemathesis")), "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing",
        "--max-examples", "20", "--exclude-checks", ",".join(WAIVED), "--generation-deterministic", "--request-timeout",
        "120", "--report", "junit", "--report-junit-path", str(out),
    ]  # fmt: skip
    log = out.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        subprocess.run(command, cwd=BUILD, stdout=file, stderr=subprocess.STDOUT, check=False)
    if not out.exists():
        raise SystemExit(f"schemathesis did not run: {log} says why")
    return read_operations(version_of(python, "schemathesis"), out, log)


def langchain(url: str) -> Suite:
    python = environment("langchain")
    out = BUILD / "langchain.json"
    settings = {"CONFORMANCE_URL": url, "CONFORMANCE_WAIVERS": str(HERE / "langchain.toml")}
    loop = [item for kind in ("test", "fixture") for item in ("-o", f"asyncio_default_{kind}_loop_scope=session")]
    arguments = ["langchain_suite.py", "-c", os.devnull, "--rootdir", str(HERE), "--asyncio-mode=auto", *loop]
    pytest(python, arguments, HERE, out, settings)
    tests, client = version_of(python, "langchain-tests"), version_of(python, "langchain-openai")
    return read_outcomes("langchain-tests ChatModelIntegrationTests", f"{tests}, langchain-openai {client}", out)


def llama_cpp(tests: Path, stories: Path) -> Suite:
    """llama.cpp's tests of llama-server, from a copy, with `shim` in llama-server's place."""
    python = environment("llama.cpp")
    copy = BUILD / "llama-server-tests"
    shutil.copytree(tests, copy, dirs_exist_ok=True)
    program = BUILD / "llama-server"
    write_stories(stories, STORIES)
    program.write_text(f'#!/bin/sh\ncd "{ROOT}" && exec "{sys.executable}" -m benchmarks.conformance.shim "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    out = BUILD / "llama.cpp.json"
    settings = {
        "CONFORMANCE_STORIES": str(STORIES), "LLAMA_SERVER_BIN_PATH": str(program), "PORT": str(free_port()),
        "CONFORMANCE_WAIVERS": str(HERE / "llama_cpp.toml"),
    }  # fmt: skip
    chosen = [f"unit/{name}" for name in (*LLAMA_FILES, *LLAMA_TESTS)]
    pytest(python, [*chosen, "-m", "not slow", "-s"], copy, out, settings)  # they close the captured output
    notes = [f"with openai {version_of(python, 'openai')}"]
    return read_outcomes("llama.cpp tools/server/tests", f"llama.cpp of {tests.parents[4].name}", out, notes)


def pytest(python: Path, arguments: Sequence[str], where: Path, out: Path, settings: Mapping[str, str]) -> None:
    """Run a suite with the waivers' plugin; what came of it lies in ``out``."""
    out.unlink(missing_ok=True)
    path = os.pathsep.join((str(HERE), str(where)))
    surroundings = {**os.environ, **settings, "CONFORMANCE_OUT": str(out), "PYTHONPATH": path}
    command = [str(python), "-m", "pytest", "-p", "waivers", "-p", "no:cacheprovider", "--tb=short", "-v", *arguments]
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=where, env=surroundings, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not out.exists():
        raise SystemExit(f"the suite did not run: {out.with_suffix('.log')} says why")


def environment(name: str) -> Path:
    """The Python of a suite's own environment."""
    folder = BUILD / f"venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        (folder / "made").touch()
    return python


def version_of(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def served(model: Path, threads: int, *more: str) -> Iterator[str]:
    """The URL of `llmlite serve` on a free port of loopback, until the block ends."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    program = Path(sys.executable).with_name("llmlite")
    asked = ["--name", "model", "--port", str(port), "--threads", str(threads), *more]
    command = [str(program), "serve", str(model), *asked]
    with open(BUILD / "serve.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + READY
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {BUILD / 'serve.log'} says why")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(90)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except urllib.error.URLError:
        return False


if __name__ == "__main__":
    sys.exit(main())
