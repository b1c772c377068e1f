"""Run the server: port first, then the weights, then one line that says it is ready."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from types import FrameType

from llmlite.errors import OutsideError
from llmlite.extras import need
from llmlite.serve.engines.base import Engine
from llmlite.serve.settings import ServeSettings


def serve(artifact: str | Path, settings: ServeSettings) -> None:
    """Serve an artifact until SIGTERM or SIGINT; what runs then is finished, what waits is refused with 503.

    A second SIGINT ends at once. The port is taken (not opened) before the weights are loaded, and opened after: a
    port in use is an `OutsideError` at once, a broken artifact an `InputError` before anyone could connect.
    """
    uvicorn = need("serve", "uvicorn")
    need("serve", "fastapi")
    from llmlite.serve.app import create_app
    from llmlite.serve.engines import Opened, open_artifact
    from llmlite.serve.models import ModelSpec

    with _bind(settings) as listener:
        first = open_artifact(artifact, settings)
        opened = [first]  # it is loaded before anyone can connect, and again after its engine died

        def reopen() -> Opened:
            return opened.pop() if opened else open_artifact(artifact, settings)

        spec = ModelSpec(settings.name or first.name, reopen)
        app = create_app([spec], settings)
        ready = _ready_line(spec.name, first.engine, listener)

        class Server(uvicorn.Server):  # type: ignore[name-defined, misc]
            should_exit: bool

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                try:
                    await super().startup(sockets)
                except OSError as error:  # another process, bound like this one, was first to listen
                    raise _not_listening(settings, error) from None
                print(ready, flush=True)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                """As uvicorn's, but an end that was asked for is no death by signal: the exit status is 0."""
                self.force_exit = self.should_exit and sig == signal.SIGINT
                self.should_exit = True

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.state.models.drain()
                await super().shutdown(sockets)

        config = uvicorn.Config(app, log_level="warning", access_log=False)
        Server(config).run(sockets=[listener])


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


def _ready_line(name: str, engine: Engine, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    return f"{name} on {engine.name} ({engine.version}), context {engine.context:,} tokens, at {url}"
