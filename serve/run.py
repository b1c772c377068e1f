"""Run the server: port first, then the weights, then one line that says it is ready."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llmlite.errors import InputError, OutsideError
from llmlite.extras import need
from llmlite.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(artifacts: Sequence[str | Path], settings: ServeSettings) -> None:
    """Serve an artifact, or the servers behind URLs, until SIGTERM or SIGINT.

    What runs then is finished, what waits is refused with 503; a second SIGINT ends at once. The port is taken (not
    opened) before the weights are loaded, and opened after: a port in use is an `OutsideError` at once, a broken
    artifact an `InputError` before anyone could connect.
    """
    uvicorn = need("serve", "uvicorn")
    need("serve", "fastapi")
    from llmlite.serve.upstream.front import front, is_front

    with _bind(settings) as listener, ExitStack() as stack:
        if is_front(artifacts, settings):
            app, described = stack.enter_context(front(artifacts, settings))
        else:
            app, described = local(artifacts, settings)

        class Server(uvicorn.Server):  # type: ignore[name-defined, misc]
            should_exit: bool

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                try:
                    await super().startup(sockets)
                except OSError as error:  # another process, bound like this one, was first to listen
                    raise _not_listening(settings, error) from None
                print(f"{described()}, at {_url(listener)}", flush=True)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                """As uvicorn's, but an end that was asked for is no death by signal: the exit status is 0."""
                self.force_exit = self.should_exit and sig == signal.SIGINT
                self.should_exit = True

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.state.models.drain()
                await super().shutdown(sockets)

        config = uvicorn.Config(app, log_level="warning", access_log=False)
        Server(config).run(sockets=[listener])


def local(artifacts: Sequence[str | Path], settings: ServeSettings) -> tuple[FastAPI, Callable[[], str]]:
    """The app around an engine in this process, and what is said of it when it is ready."""
    from llmlite.serve.app import create_app
    from llmlite.serve.engines import Opened, open_artifact
    from llmlite.serve.models import ModelSpec

    if len(artifacts) > 1:
        raise InputError(f"{artifacts[1]}: one artifact can be served; only of URLs there can be several")
    first = open_artifact(artifacts[0], settings)
    opened = [first]  # it is loaded before anyone can connect, and again after its engine died

    def reopen() -> Opened:
        return opened.pop() if opened else open_artifact(artifacts[0], settings)

    name, engine = settings.name or first.name, first.engine
    described = f"{name} on {engine.name} ({engine.version}), context {engine.context:,} tokens"
    return create_app([ModelSpec(name, reopen)], settings), lambda: described


def _bind(settings: ServeSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _not_listening(settings, error) from None
    return listener


def _not_listening(settings: ServeSettings, error: OSError) -> OutsideError:
    return OutsideError(f"can't listen on {settings.host} port {settings.port}: {error.strerror or error}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
