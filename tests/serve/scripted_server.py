"""A server around the scripted engine as a process of its own: `python -m tests.serve.scripted_server SETTINGS`."""

import json
import sys
from pathlib import Path

from llmlite.serve.app import create_app
from llmlite.serve.engines import Opened
from llmlite.serve.logs import logging_to
from llmlite.serve.models import ModelSpec
from llmlite.serve.process import Server, bind, url_of
from llmlite.serve.settings import ServeSettings
from tests.serve.scripted_engine import ScriptedEngine

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    paths = {name: Path(given[name]) for name in ("api_key_file", "tls_cert", "tls_key") if name in given}
    settings = ServeSettings(port=0, **{**given, **paths})
    with logging_to(level=settings.log_level), bind(settings) as listener:
        app = create_app([ModelSpec("model", lambda: Opened(ScriptedEngine(), "model", None))], settings)
        Server(app, settings, ready=lambda: url_of(settings, listener)).run(sockets=[listener])
