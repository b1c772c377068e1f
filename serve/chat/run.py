"""Find or start the server, then talk to it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmlite.errors import InputError, OutsideError
from llmlite.serve.chat.client import Client, Refused
from llmlite.serve.chat.conversation import Conversation
from llmlite.serve.chat.settings import ChatSettings
from llmlite.serve.chat.terminal import Terminal, piped
from llmlite.serve.settings import ServeSettings

KEY_VARIABLE = "LLMLITE_API_KEY"
"""Where a server's key is taken from: on the command line, all users of the machine could read it."""


def chat(model: str, settings: ChatSettings) -> int:
    """Talk to an artifact or to the server behind a URL, until the end of input; returns the exit status."""
    if not model.startswith(("http://", "https://")):
        with local_server(model, settings) as (url, key):
            return _talk(Client(url, key), settings)
    if settings.context is not None or settings.threads is not None:
        raise InputError("context and threads: belong to an artifact; a server has its own")
    return _talk(Client(model, os.environ.get(KEY_VARIABLE)), settings)


@contextmanager
def local_server(artifact: str, settings: ChatSettings) -> Iterator[tuple[str, str]]:
    """A server of this process on a free port of loopback, its URL and its key, which no other process knows."""
    from llmlite.serve.app import create_app
    from llmlite.serve.keys import Keyring, StoredKey, new_key
    from llmlite.serve.limits import Limits
    from llmlite.serve.logs import logging_to
    from llmlite.serve.process import Server, bind, url_of
    from llmlite.serve.run import model_specs

    serve = ServeSettings(
        port=0, name=settings.model, context=settings.context, threads=settings.threads, drain_seconds=1.0
    )
    key = new_key()
    with logging_to(level="error"), bind(serve) as listener:
        specs, _ = model_specs(artifact, serve)
        server = Server(create_app(specs, serve, Keyring([StoredKey.of("chat", key, Limits())])), serve)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise OutsideError(f"{artifact}: the server that runs it has ended")
                time.sleep(0.01)
            yield url_of(serve, listener), key
        finally:
            server.should_exit = True
            thread.join()


def _talk(client: Client, settings: ChatSettings) -> int:
    try:
        cards = {card["id"]: card for card in client.models()}
    except Refused as refusal:
        hint = f"; a key is read from the variable {KEY_VARIABLE}" if refusal.status == 401 else ""
        raise InputError(f"{client.url}: {refusal}{hint}") from None
    name = settings.model or next(iter(cards), None)
    if name not in cards:
        raise InputError(f"{client.url}: has no model {name!r}, but {', '.join(cards) or 'none'}")
    conversation = Conversation(client, cards[name], settings.system, settings.sampling)
    if sys.stdin.isatty():
        Terminal(client, conversation).run()
    else:
        piped(conversation)
    client.close()
    return 0
