"""What `llmlite serve` puts in front of other servers: those behind URLs, or a vLLM of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmlite.errors import InputError
from llmlite.extras import need
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llmlite.serve.upstream.pool import Pool


def is_front(artifacts: Sequence[str | Path], settings: ServeSettings) -> bool:
    """Whether another process runs the model: behind a URL, or started for it."""
    return settings.engine != "auto" or any(map(_is_url, artifacts))


LOCAL = (
    "also", "idle_unload", "rope_scaling", "rope_scale", "kv", "cells", "threads", "exact", "draft", "cache_ram",
    "cache_dir", "cache_disk",
)  # fmt: skip
"""Settings of engines in this process, which another one would not hear of."""


@contextmanager
def front(artifacts: Sequence[str | Path], settings: ServeSettings) -> Iterator[tuple[FastAPI, Callable[[], str]]]:
    """The app in front of what is named, and what is to be said of it once it has started.

    Raises `InputError` for what is no URL, or no artifact for vLLM, `OutsideError` when vLLM ends before it is ready.
    """
    need("serve", "httpx")
    from llmlite.serve.app import create_front
    from llmlite.serve.upstream.pool import Pool
    from llmlite.serve.upstream.vllm import VllmProcess

    foreign = LOCAL if settings.engine == "vllm" else (*LOCAL, "context", "lora")
    for name in foreign:
        if vars(settings)[name] != vars(ServeSettings())[name]:
            option = name.replace("_", "-")
            raise InputError(f"--{option}: is for an engine in this process; set it where the model runs")
    urls = [str(artifact) for artifact in artifacts if _is_url(artifact)]
    if settings.engine != "vllm":
        for other in artifacts:
            if not _is_url(other):
                raise InputError(f"{other}: only URLs, as http://host:port/v1, are right here")
        pool = Pool(urls, settings)
        yield create_front(pool, settings), lambda: _described(pool)
        return
    if urls or len(artifacts) > 1:
        raise InputError("--engine vllm: takes one artifact; a vLLM that runs already is served by its URL alone")
    child = VllmProcess(artifacts[0], settings)
    child.start()
    try:
        child.wait()
        pool = Pool([child.url], settings, child)
        yield create_front(pool, settings), lambda: f"{', '.join(pool.names)} on vLLM"
    finally:
        child.stop()


def _is_url(artifact: str | Path) -> bool:
    return str(artifact).lower().startswith(("http://", "https://"))


def _described(pool: Pool) -> str:
    bases = ", ".join(upstream.base for upstream in pool.upstreams)
    if not pool.well:
        return f"in front of {bases}, which can't answer yet ({pool.upstreams[0].failure})"
    return f"{', '.join(pool.names)} from {bases}"
