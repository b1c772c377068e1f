"""A small client of the OpenAI API: which models there are, and a streamed reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmlite.errors import InputError, OutsideError

CONNECT_SECONDS = 10.0
FIRST_TOKEN_SECONDS = 600.0
"""Seconds for which a server may send nothing: a long prompt on a CPU takes minutes."""


class Refused(Exception):
    """The server's own words on why it does not answer; the conversation can go on. ``status``: HTTP's, if any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Piece:
    """A part of a reply. ``usage``: OpenAI's object, in the last part."""

    text: str = ""
    finish: str | None = None
    usage: dict[str, int] | None = None


class Client:
    """Talks to ``url``, with or without /v1 at its end. ``key`` is sent there and nowhere else."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url}: is no URL of a server; http://127.0.0.1:8000 is right")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(FIRST_TOKEN_SECONDS, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, follow_redirects=False)

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The server's model objects. Raises `OutsideError` where there is no such server, `Refused`."""
        with self._outside():
            answer = self._http.get("/models")
            _check(answer)
        try:
            cards = answer.json()["data"]
            return [card for card in cards if isinstance(card["id"], str)]
        except (ValueError, KeyError, TypeError):
            raise OutsideError(f"{self.url}/models: does not answer as the OpenAI API does") from None

    def reply(self, model: str, messages: list[dict[str, str]], sampling: dict[str, Any]) -> Iterator[Piece]:
        """The reply as it comes. Closing the iterator hangs up. Raises `OutsideError` and `Refused`."""
        body = {
            "model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}, **sampling,
        }  # fmt: skip
        with self._outside(), self._http.stream("POST", "/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
            _check(answer)
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield _piece(data)
        raise OutsideError(f"{self.url}: the reply broke off")

    @contextmanager
    def _outside(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise OutsideError(f"{self.url}: {str(error) or type(error).__name__}") from None


def _check(answer: httpx.Response) -> None:
    if answer.status_code == 200:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "no reason was given"
    raise Refused(f"{message} (status {answer.status_code})", answer.status_code)


def _piece(data: str) -> Piece:
    try:
        event = json.loads(data)
        if "error" in event:
            raise Refused(str(event["error"]["message"]))
        choices = event.get("choices") or [{}]
        text = (choices[0].get("delta") or {}).get("content") or ""
        return Piece(text, choices[0].get("finish_reason"), event.get("usage"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutsideError("the server sent an event that is none of the OpenAI API") from None
