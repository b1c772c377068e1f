"""The servers that requests are forwarded to: which of them are well, what they serve, who gets the next request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmlite.errors import InputError
from llmlite.serve.errors import ApiError
from llmlite.serve.settings import ServeSettings
from llmlite.serve.upstream.vllm import VllmProcess

log = logging.getLogger("llmlite.serve")

LOOK_WELL, LOOK_ILL = 2.0, 0.5
"""Seconds between two looks at an upstream that is well, and at one that isn't."""

PATIENCE = 30.0
"""Seconds that an upstream may take to say how it is: one that is busy with a long prompt may answer late."""

CONNECT = 5.0
"""Seconds until a connection that isn't accepted counts as refused."""

NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
"""Failures before anything was sent: another upstream may be asked instead."""


@dataclass(eq=False)
class Upstream:
    """One server. ``base`` ends in /v1; ``cards``: its models by their ids; ``failure``: why it isn't asked now."""

    base: str
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str | None = "it was not asked yet"
    outstanding: int = 0
    turn: int = 0

    @property
    def root(self) -> str:
        return self.base.removesuffix("/v1")


@dataclass(frozen=True)
class Target:
    """Who is to answer a request, under which id it knows the model."""

    upstream: Upstream
    model: str


class Pool:
    """Upstreams with the same purpose. Used on the event loop.

    A request goes to the one with the fewest unanswered requests that is well and has the model, in turns where they
    are level. One that refuses connections gets none until it is well again.
    """

    def __init__(self, urls: Sequence[str], settings: ServeSettings, child: VllmProcess | None = None) -> None:
        self.upstreams = [Upstream(base_url(url)) for url in urls]
        self.created = int(time.time())
        self.draining = False
        self._settings = settings
        self._child = child
        self._turns = itertools.count(1)
        key = child.key if child is not None else settings.upstream_key()
        headers = {"Accept-Encoding": "identity", "User-Agent": "llmlite"}
        self._client = httpx.AsyncClient(
            headers=headers if key is None else {**headers, "Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(settings.upstream_timeout, connect=CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=False,
        )
        self._watch: list[asyncio.Task[None]] = []

    @property
    def patience(self) -> float:
        """Seconds for which an upstream may send nothing."""
        return self._settings.upstream_timeout

    @property
    def names(self) -> dict[str, str]:
        """The models by the names that clients use, with the id that the upstreams have; the first may be renamed."""
        ids = list(dict.fromkeys(model for upstream in self.upstreams for model in upstream.cards))
        own = self._settings.name
        return {own if own and place == 0 else model: model for place, model in enumerate(ids)}

    @property
    def well(self) -> list[Upstream]:
        return [upstream for upstream in self.upstreams if upstream.failure is None]

    def card(self, name: str) -> dict[str, Any]:
        """What an upstream says of a model. Raises 404."""
        model = self._id(name)
        return next(upstream.cards[model] for upstream in self.upstreams if model in upstream.cards)

    async def start(self) -> None:
        """Look at all once, and from then on again and again."""
        await asyncio.gather(*(self._look(upstream) for upstream in self.upstreams))
        self._watch = [asyncio.create_task(self._look_after(upstream)) for upstream in self.upstreams]

    def drain(self) -> None:
        """Refuse what is new; what runs goes on."""
        self.draining = True

    async def close(self) -> None:
        """Hang up on all, and end the server that was started."""
        for task in self._watch:
            task.cancel()
        await self._client.aclose()
        if self._child is not None:
            await asyncio.to_thread(self._child.stop)

    def choose(self, name: str, passed_over: Sequence[Upstream] = ()) -> Target:
        """Who gets a request for a model. Raises 404, 429 where all have enough to do, 503 where none is well."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        open_ones = [upstream for upstream in self.well if upstream not in passed_over]
        if not open_ones:
            raise self.down()
        model = self._id(name)
        able = [upstream for upstream in open_ones if model in upstream.cards]
        if not able:
            raise self.down()
        upstream = min(able, key=lambda each: (each.outstanding, each.turn))
        if upstream.outstanding >= self._settings.parallel + self._settings.max_queue:
            message = "too many requests are waiting; try again in 1 s"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        upstream.turn = next(self._turns)
        return Target(upstream, model)

    def down(self) -> ApiError:
        """The refusal while no upstream can answer."""
        reasons = (
            "; ".join(dict.fromkeys(up.failure for up in self.upstreams if up.failure)) or "it refuses connections"
        )
        message = f"the server behind this one can't answer now: {reasons}"
        return ApiError(503, message, code="upstream_down", headers={"Retry-After": "2"})

    async def send(self, target: Target, path: str, body: bytes) -> httpx.Response:
        """The answer of an upstream, its body unread. Raises `httpx.HTTPError`; refused connections eject it."""
        request = self._client.build_request(
            "POST", target.upstream.root + path, content=body, headers={"Content-Type": "application/json"}
        )
        try:
            return await self._client.send(request, stream=True)
        except NOT_SENT:
            self._ill(target.upstream, "it refuses connections")
            raise

    def _id(self, name: str) -> str:
        names = self.names
        if name not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise ApiError(
                404, f"the model {name!r} is not served here; this server has {known}", "model", "model_not_found"
            )
        return names[name]

    async def _look_after(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(LOOK_WELL if upstream.failure is None else LOOK_ILL)
            if self._child is not None:
                upstream.base = base_url(self._child.look())
            await self._look(upstream)

    async def _look(self, upstream: Upstream) -> None:
        """Ask for its health, where it has such a page, and for its models."""
        try:
            health = await self._client.get(f"{upstream.root}/health", timeout=httpx.Timeout(PATIENCE, connect=CONNECT))
            if health.status_code >= 500:
                self._ill(upstream, f"its health page says {health.status_code}")
                return
            models = await self._client.get(f"{upstream.base}/models", timeout=httpx.Timeout(PATIENCE, connect=CONNECT))
        except httpx.HTTPError as error:
            refused = isinstance(error, NOT_SENT)
            self._ill(upstream, "it refuses connections" if refused else f"it does not answer ({type(error).__name__})")
            return
        cards = _cards(models)
        if isinstance(cards, str):
            self._ill(upstream, cards)
            return
        upstream.cards = cards
        if upstream.failure is not None:
            log.info("%s is well", upstream.base)
        upstream.failure = None

    def _ill(self, upstream: Upstream, reason: str) -> None:
        if upstream.failure != reason:
            log.warning("%s gets no requests: %s", upstream.base, reason)
        upstream.failure = reason


def base_url(url: str) -> str:
    """``url`` as far as /v1, which is added where it is left out. Raises `InputError` for what is no such URL."""
    try:
        parts = urlsplit(url)
        known = parts.port != 0  # raises for a port that is no number
    except ValueError as error:
        raise InputError(f"{url}: is not a URL ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not known:
        raise InputError(f"{url}: is not a URL of a server; http://host:port/v1 is right")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError("the URL of an upstream takes no user, password or query; give its key by --upstream-key-file")
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _cards(answer: httpx.Response) -> dict[str, dict[str, Any]] | str:
    """The models of an upstream by id, or why its answer can't be used."""
    if answer.status_code in (401, 403):
        return "it refuses this server's key, which --upstream-key-file gives"
    if answer.status_code != 200:
        return f"its list of models is answered with {answer.status_code}"
    try:
        found = answer.json()
    except (ValueError, RecursionError):
        return "its list of models is not JSON"
    data = found.get("data") if isinstance(found, dict) else None
    if not isinstance(data, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in data
    ):
        return "its list of models is not one"
    return {card["id"]: card for card in data} or "it has no model"
