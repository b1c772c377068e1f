"""A vLLM that this server starts, watches, starts again and takes along when it ends."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

from llmlite.errors import InputError, OutsideError
from llmlite.evals.locate import find
from llmlite.serve.models import PEACE, RESTART_AFTER
from llmlite.serve.settings import ServeSettings

log = logging.getLogger("llmlite.serve")

GRACE = 10.0
"""Seconds that vLLM has to end after SIGTERM."""

TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the server that started this is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run in a process of its own, becomes the command in its arguments, which gets SIGTERM when its parent is gone.

The kernel sends the signal when the thread ends that started the process: start it on the main thread.
"""


class VllmProcess:
    """``vllm serve`` on an artifact, on a free port of loopback, with a key that only this server knows.

    Raises `InputError` where vLLM isn't installed or the artifact is none for it.
    """

    def __init__(self, artifact: str | Path, settings: ServeSettings) -> None:
        location = find(artifact)
        if location.engine != "transformers":
            raise InputError(f"{location.path}: GGUF files are served without --engine vllm, which takes safetensors")
        command = shutil.which("vllm")
        if command is None:
            raise InputError("--engine vllm: there is no command vllm here; install vLLM, as in pip install vllm")
        self.name = settings.name or (location.path.resolve().name if Path(artifact).is_dir() else str(artifact))
        self.key = secrets.token_urlsafe(32)
        self._command = [command, "serve", str(location.path), *flags(self.name, settings)]
        self._process: subprocess.Popen[bytes]
        self._port = 0
        self._deaths = 0
        self._started = 0.0
        self._again: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Start it. What it prints goes to standard error."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [*self._command, "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TIED, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**os.environ, "VLLM_API_KEY": self.key},
            start_new_session=True,  # Ctrl-C is this server's to handle, which ends it after what runs
        )
        self._started = time.monotonic()

    def wait(self) -> None:
        """Until its health page says that it is ready, however long that takes. Raises `OutsideError` if it ends."""
        with httpx.Client(trust_env=False, timeout=5) as client:
            while True:
                status = self._process.poll()
                if status is not None:
                    raise OutsideError(f"vLLM ended with status {status} before it was ready; its lines above say why")
                with suppress(httpx.HTTPError):
                    if client.get(self.url.removesuffix("/v1") + "/health").status_code == 200:
                        return
                time.sleep(0.25)

    def look(self) -> str:
        """Start it again, in a while, where it has ended. Returns its URL, which is another one then."""
        now = time.monotonic()
        if self._again is None and self._process.poll() is not None:
            log.error("vLLM has ended with status %s and is started again", self._process.returncode)
            self._kill()
            self._plan(now)
        if self._again is not None and now >= self._again:
            try:
                self.start()
                self._again = None
            except OSError as error:
                log.error("vLLM can't be started: %s", error)
                self._plan(now)
        return self.url

    def _plan(self, now: float) -> None:
        """When to start it again: later each time that it does not last."""
        self._deaths = 1 if now - self._started > PEACE else self._deaths + 1
        self._again = now + RESTART_AFTER[min(self._deaths, len(RESTART_AFTER)) - 1]

    def stop(self) -> None:
        """End it and all that it started. Blocks."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                log.warning("vLLM did not end within %.0f s and is killed", GRACE)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        """Whatever is left of its process group: engine processes whose parent died."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def flags(name: str, settings: ServeSettings) -> list[str]:
    """The options of ``vllm serve`` that mean what this server's settings mean; unset ones are left to vLLM."""
    given = ["--served-model-name", name]
    if settings.context is not None:
        given += ["--max-model-len", str(settings.context)]
    if settings.parallel != ServeSettings.parallel:  # the default suits an engine in this process; vLLM has its own
        given += ["--max-num-seqs", str(settings.parallel)]
    if settings.adapters:
        given += ["--enable-lora", "--lora-modules", *(f"{adapter}={file}" for adapter, file in settings.adapters)]
    return given
