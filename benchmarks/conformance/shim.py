"""Stands in for llama-server in its own tests: `llmlite serve` under llama-server's flags, paths and defaults.

LLAMA_SERVER_BIN_PATH names a script that runs this. The app is the one that `llmlite serve` runs, whole. Around it:
paths without /v1; the model that there is for whatever name is asked for, as llama-server has it; and the defaults of
a request (--n-predict, --temp, --seed) that llama-server takes from its command line. Nothing in an answer is changed
but the first letter of system_fingerprint, which llama-server has begin with b and OpenAI with fp.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlite.serve.keys import Keyring, StoredKey
from llmlite.serve.limits import Limits
from llmlite.serve.process import Server, bind
from llmlite.serve.run import model_specs
from llmlite.serve.settings import ServeSettings

GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")
UNDER_V1 = (*GENERATING, "/embeddings", "/models", "/messages/count_tokens")
TRAINED = 2048
"""llama-server takes a context longer than the model's; this server refuses that."""
FINGERPRINT = (b'"system_fingerprint":"fp_', b'"system_fingerprint":"bp_')
LIMITS = {"/v1/responses": "max_output_tokens"}


@dataclass(frozen=True)
class Defaults:
    """What llama-server fills in where a request says nothing."""

    model: str
    temperature: float
    seed: int
    tokens: int


class Translated:
    """ASGI middleware: a request to llama-server becomes one to this server."""

    def __init__(self, app: ASGIApp, defaults: Defaults) -> None:
        self._app = app
        self._defaults = defaults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path in UNDER_V1:
            path = f"/v1{path}"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        body = self._filled(path, body)
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": message["body"].replace(*FINGERPRINT)}
            await send(message)

        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, told)

    def _filled(self, path: str, body: bytes) -> bytes:
        try:
            asked: Any = json.loads(body)
        except ValueError:
            return body
        if not isinstance(asked, dict):
            return body
        if path.startswith("/v1/"):
            asked["model"] = self._defaults.model
        if path.removeprefix("/v1") in GENERATING:
            asked.setdefault("temperature", self._defaults.temperature)
            if path != "/v1/responses" and path != "/v1/messages":
                asked.setdefault("seed", self._defaults.seed)
            limit = LIMITS.get(path, "max_tokens")
            if "max_completion_tokens" not in asked:
                asked.setdefault(limit, self._defaults.tokens)
        return json.dumps(asked).encode()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--hf-repo")
    parser.add_argument("--chat-template")
    parser.add_argument("--chat-template-file")
    parser.add_argument("--alias")
    parser.add_argument("--api-key")
    parser.add_argument("--cors-origins")
    parser.add_argument("--ctx-size", type=int)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--n-predict", type=int, default=64)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    given, _ = parser.parse_known_args(arguments)
    if given.hf_repo is None or "stories260K" not in given.hf_repo or "infill" in given.hf_repo:
        print(f"there is no model here for {given.hf_repo}", file=sys.stderr)
        return 2
    if given.chat_template or given.chat_template_file:
        print("a model is served with its own chat template", file=sys.stderr)
        return 2
    settings = ServeSettings(
        host=given.host, port=given.port, name=given.alias or "model", threads=1, parallel=given.parallel,
        context=min(TRAINED, (given.ctx_size or TRAINED) // given.parallel), drain_seconds=1.0,
        cors=("*",),  # llama-server lets every page in
    )  # fmt: skip
    keys = None if given.api_key is None else Keyring([StoredKey.of("tests", given.api_key, Limits())])
    with bind(settings) as listener:
        from llmlite.serve.app import create_app

        specs, _ = model_specs(os.environ["CONFORMANCE_STORIES"], settings)
        app = create_app(specs, settings, keys)
        defaults = Defaults(specs[0].name, given.temp, given.seed, given.n_predict)
        app.add_middleware(Translated, defaults=defaults)
        Server(app, settings).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
