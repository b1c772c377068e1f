"""Run the server: port first, then the weights, then one line that says it is ready."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmlite.errors import InputError
from llmlite.evals.locate import find
from llmlite.extras import need
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from llmlite.serve.engines import Opened
    from llmlite.serve.models import ModelSpec

log = logging.getLogger("llmlite.serve")


def serve(artifact: str | Path, settings: ServeSettings) -> None:
    """Serve an artifact until SIGTERM or SIGINT; what runs then is finished, what waits is refused with 503.

    A second SIGINT ends at once. The port is taken (not opened) before the weights are loaded, and opened after: a
    port in use is an `OutsideError` at once, a broken artifact an `InputError` before anyone could connect.
    """
    need("serve", "uvicorn")
    need("serve", "fastapi")
    from llmlite.serve.app import create_app
    from llmlite.serve.logs import logging_to
    from llmlite.serve.process import Server, bind, tls_context, url_of

    tls_context(settings)  # refused before the weights are loaded, which takes longer
    with logging_to(level=settings.log_level), bind(settings) as listener:
        specs, first = model_specs(artifact, settings)
        app = create_app(specs, settings)
        engine = first.engine
        about = f"{specs[0].name} on {engine.name} ({engine.version}), context {engine.context:,} tokens"
        _warn_of_open_doors(settings)
        line = f"{about}, at {url_of(settings, listener)}/v1"
        Server(app, settings, ready=lambda: line).run(sockets=[listener])


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
    for name, file in settings.adapters:
        if not file.exists():
            raise InputError(f"lora {name}: {file} is not there")
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


def _warn_of_open_doors(settings: ServeSettings) -> None:
    if settings.loopback:
        return
    if settings.api_key_file is None:
        log.warning("no API key is asked for: whoever reaches %s can use this server", settings.host)
    elif settings.tls_cert is None:
        log.warning("keys and prompts cross the network in clear text: use --tls-cert, or a proxy that has TLS")
