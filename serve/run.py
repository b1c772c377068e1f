"""Run the server: port first, then the weights, then one line that says it is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmlite.errors import InputError
from llmlite.evals.locate import find
from llmlite.extras import need
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llmlite.serve.engines import Opened
    from llmlite.serve.models import ModelSpec

log = logging.getLogger("llmlite.serve")


def serve(artifacts: Sequence[str | Path], settings: ServeSettings) -> None:
    """Serve an artifact, or the servers behind URLs, until SIGTERM or SIGINT.

    What runs then is finished, what waits is refused with 503; a second SIGINT ends at once. The port is taken (not
    opened) before the weights are loaded, and opened after: a port in use is an `OutsideError` at once, a broken
    artifact an `InputError` before anyone could connect.
    """
    need("serve", "uvicorn")
    need("serve", "fastapi")
    need("serve", "llguidance")
    from llmlite.serve.logs import logging_to
    from llmlite.serve.process import Server, bind, tls_context, url_of
    from llmlite.serve.upstream.front import front, is_front

    tls_context(settings)  # refused before the weights are loaded, which takes longer
    with logging_to(level=settings.log_level), bind(settings) as listener, ExitStack() as stack:
        if is_front(artifacts, settings):
            if settings.also or settings.lora:
                raise InputError("also and lora: are for an artifact in this process; a server elsewhere has its own")
            app, about = stack.enter_context(front(artifacts, settings))
        else:
            app, about = local(artifacts, settings)
        _warn_of_open_doors(settings)
        ready = lambda: f"{about()}, at {url_of(settings, listener)}/v1"  # noqa: E731
        Server(app, settings, ready).run(sockets=[listener])


def local(artifacts: Sequence[str | Path], settings: ServeSettings) -> tuple[FastAPI, Callable[[], str]]:
    """The app around engines in this process, and what is said of it when it is ready."""
    from llmlite.serve.app import create_app

    if len(artifacts) > 1:
        raise InputError(f"{artifacts[1]}: is a second artifact; give more models by --also NAME=ARTIFACT")
    specs, first = model_specs(artifacts[0], settings)
    engine = first.engine
    about = f"{specs[0].name} on {engine.name} ({engine.version}), context {engine.context:,} tokens"
    return create_app(specs, settings), lambda: about


def model_specs(artifact: str | Path, settings: ServeSettings) -> tuple[list[ModelSpec], Opened]:
    """What to serve, the first model opened already. Raises `InputError` for what can't be loaded or found.

    The first model is loaded before anyone can connect, and again after its engine died. The others are looked for
    now and loaded when asked for; adapters and a draft model belong to the first one alone.
    """
    from llmlite.serve.engines import open_artifact
    from llmlite.serve.models import ModelSpec

    for name, place in settings.other_models:
        try:
            find(place)
        except InputError as error:
            raise InputError(f"also {name}: {error}") from None
    if settings.adapters:
        _check_adapters(settings, find(artifact).path)
    first = open_artifact(artifact, settings)
    opened = [first]

    def reopen() -> Opened:
        return opened.pop() if opened else open_artifact(artifact, settings)

    specs = [ModelSpec(settings.name or first.name, reopen, tuple(name for name, _ in settings.adapters))]
    draft = settings.draft if settings.draft in ("off", "lookup") else "off"
    theirs = replace(settings, name=None, also=(), lora=(), draft=draft)
    specs += [ModelSpec(name, partial(open_artifact, place, theirs)) for name, place in settings.other_models]
    names = [name for spec in specs for name in (spec.name, *spec.adapters)]
    if len(set(names)) < len(names):  # names that were given differ: this is the one that the artifact brought
        raise InputError(
            f"{specs[0].name!r} names two models or adapters: give the first model another name with --name"
        )
    return specs, first


def _check_adapters(settings: ServeSettings, base: Path) -> None:
    """`InputError` for an adapter that is not there, or was made for other weights than those of ``base``."""
    from llmlite.formats.adapter_base import refuse_other_base  # brings torch, which a GGUF file does not need

    for name, file in settings.adapters:
        if not file.exists():
            raise InputError(f"lora {name}: {file} is not there")
        refuse_other_base(file if file.is_dir() else file.parent, str(base), doubt=log.warning)


def _warn_of_open_doors(settings: ServeSettings) -> None:
    if settings.loopback:
        return
    if settings.api_key_file is None:
        log.warning("no API key is asked for: whoever reaches %s can use this server", settings.host)
    elif settings.tls_cert is None:
        log.warning("keys and prompts cross the network in clear text: use --tls-cert, or a proxy that has TLS")
