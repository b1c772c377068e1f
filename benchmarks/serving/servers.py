"""The servers side by side: llmlite's and llama.cpp's, on the same file with the same threads and contexts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY = 120.0


@dataclass(frozen=True)
class Setup:
    """``slots`` sequences at once, each of up to ``context`` tokens; ``cells`` None: room for all of them at once.

    ``streams``: at how many at once throughput is measured.
    """

    model: Path
    tools: Path
    threads: int = 2
    slots: int = 8
    context: int = 2048
    cells: int | None = None
    more: tuple[str, ...] = ()
    streams: tuple[int, ...] = (1, 4, 8, 16)


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    process: subprocess.Popen


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(name: str, setup: Setup, log: Path | None = None) -> Iterator[Server]:
    """One of "llmlite" and "llama-server", ready; ended when the block ends."""
    port = free_port()
    out = open(log, "w") if log else subprocess.DEVNULL  # noqa: SIM115 (the process has it)
    process = subprocess.Popen(command(name, setup, port), stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(port, process)
        yield Server(name, port, process)
    finally:
        process.terminate()
        process.wait(60)


def command(name: str, setup: Setup, port: int) -> list[str]:
    shared = ["--port", str(port), "--threads", str(setup.threads)]
    if name == "llmlite":
        cells = [] if setup.cells is None else ["--cells", str(setup.cells)]
        return [
            sys.executable, "-m", "llmlite.cli", "serve", str(setup.model), *shared, "--name", "m",
            "--parallel", str(setup.slots), "--context", str(setup.context), *cells,
            "--max-queue", "1000", "--log-level", "error", *setup.more,
        ]  # fmt: skip
    total = setup.cells or setup.slots * setup.context
    pool = [] if setup.cells is None else ["--kv-unified"]
    return [
        str(setup.tools / "llama-server"), "-m", str(setup.model), *shared, "--alias", "m", "--no-webui",
        "-np", str(setup.slots), "-c", str(total), *pool, "--threads-batch", str(setup.threads), *setup.more,
    ]  # fmt: skip


def _wait(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"a server ended with status {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"no server was ready within {READY:.0f} s")
