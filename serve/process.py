"""The HTTP server around an app: what uvicorn does, and how this server begins, reloads, drains and ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llmlite.errors import InputError, OutsideError
from llmlite.serve.connection import connections
from llmlite.serve.keys import Keyring
from llmlite.serve.models import Models
from llmlite.serve.settings import ServeSettings
from llmlite.serve.upstream.pool import Pool

log = logging.getLogger("llmlite.serve")

KEEP_ALIVE = 30
"""Seconds that an idle connection stays open: longer than common clients keep one for their next request."""

LAST_WORDS = 5
"""Seconds in which requests that were cut off may still tell their clients so."""


class Server(uvicorn.Server):
    """uvicorn with SIGTERM that drains and SIGHUP that reads keys and certificate again.

    ``ready`` makes the line to print when the port is open.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings, ready: Callable[[], str] | None = None) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, http=connections(settings.max_connections), ws="none",
            lifespan="on", proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LAST_WORDS,
        )  # fmt: skip
        config.load()
        config.ssl = self._tls = tls_context(settings)
        super().__init__(config)
        self._settings = settings
        self._ready = ready
        self._models: Models | Pool = app.state.models
        self._keys: Keyring = app.state.keys
        self._running: set[str] = app.state.running

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process, bound like this one, was first to listen
            raise not_listening(self._settings, error) from None
        reloads = self._settings.api_key_file is not None or self._tls is not None
        if reloads and sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        if self._ready is not None:
            print(self._ready(), flush=True)

    def reload(self) -> None:
        """Read the key file and the certificate again; what can't be used is logged, and the old one stays."""
        for what, read in (("API keys", self._keys.reload), ("TLS certificate", self._reload_tls)):
            try:
                read()
                log.info("%s: read again", what)
            except InputError as error:
                log.error("%s: the old stay in use: %s", what, error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, but an end that was asked for is no death by signal: the exit status is 0."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish, with the port still open so that the rest hears 503, not a refused connection."""
        self._models.drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.drain_seconds
        while self._running and not self.force_exit and loop.time() < end:
            await asyncio.sleep(0.05)
        if self._running and not self.force_exit:
            log.warning(
                "%d requests are cut off: they ran on for %g s", len(self._running), self._settings.drain_seconds
            )
            await self._models.close()
        await super().shutdown(sockets)

    def _reload_tls(self) -> None:
        if self._tls is not None:
            tls_context(self._settings)  # a broken pair would leave the context that is in use without a key
            assert self._settings.tls_cert is not None
            self._tls.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)


def tls_context(settings: ServeSettings) -> ssl.SSLContext | None:
    """None: plain HTTP. Raises `InputError` for a certificate or key that can't be used."""
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        where = f"tls_cert {settings.tls_cert} with tls_key {settings.tls_key}"
        raise InputError(f"{where}: are no certificate and its unencrypted key in PEM ({error})") from None
    return context


def bind(settings: ServeSettings) -> socket.socket:
    """Take the port, without listening. Raises `OutsideError`."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise not_listening(settings, error) from None
    return listener


def not_listening(settings: ServeSettings, error: OSError) -> OutsideError:
    return OutsideError(f"can't listen on {settings.host} port {settings.port}: {error.strerror or error}")


def url_of(settings: ServeSettings, listener: socket.socket) -> str:
    """Where clients reach the server, /v1 left out."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL would ask for a password on the terminal
