"""What the server counts, as Prometheus reads it. Each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlite.serve.models import Models
from llmlite.serve.stats import Stats

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds in seconds of the histogram of times to the first token."""

BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Upper bounds in seconds of the histogram of times between two tokens."""

COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of all sequences that were begun."),
    "cached_tokens": ("cached_prompt_tokens", "Prompt tokens that were in the cache."),
    "generated_tokens": ("generated_tokens", "Tokens that were drawn, end tokens too."),
    "prefix_hits": ("prefix_hits", "Sequences that found some of their prompt in the cache."),
    "drafted_tokens": ("drafted_tokens", "Guessed tokens that were tried."),
    "accepted_tokens": ("accepted_draft_tokens", "Guessed tokens that were right."),
    "preemptions": ("preemptions", "Sequences that had to leave their cells to others for a while."),
    "steps": ("engine_steps", "Steps of the engine."),
    "step_seconds": ("engine_step_seconds", "Seconds that these steps took."),
    "decode_seconds": ("engine_decode_seconds", "Seconds of them inside the engine."),
}
GAUGES = {
    "running": ("sequences_running", "Sequences that run."),
    "waiting": ("sequences_waiting", "Sequences that wait."),
    "cells_used": ("kv_cells_used", "Positions of the key and value cache that are used."),
    "cells_total": ("kv_cells", "Positions that the key and value cache has."),
}
"""Each field of `Stats` under its name for Prometheus."""


class Metrics:
    """The counts of one app; ``models`` None: it stands in front of other servers and has no engine of its own."""

    content_type = "text/plain; version=1.0.0; charset=utf-8"

    def __init__(self, models: Models | None) -> None:
        self.registry = CollectorRegistry()
        if models is not None:
            self.registry.register(EngineCollector(models))
        self._requests = Counter(
            "llmlite_requests",
            "Requests by endpoint and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._first = Histogram(
            "llmlite_time_to_first_token_seconds", "From a request's arrival to its first token.", ["model"],
            buckets=FIRST_TOKEN, registry=self.registry,
        )  # fmt: skip
        self._between = Histogram(
            "llmlite_time_between_tokens_seconds", "Between two tokens of a sequence.", ["model"],
            buckets=BETWEEN_TOKENS, registry=self.registry,
        )  # fmt: skip

    def request(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def next_tokens(self, model: str, seconds: float, tokens: int) -> None:
        """``tokens`` came ``seconds`` after the one before them."""
        between = self._between.labels(model)
        for _ in range(tokens):
            between.observe(seconds / tokens)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Reads, when it is asked, what the engine threads have counted; a model that is not loaded has no such thread."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        stats = {
            model.spec.name: model.service.scheduler.stats for model in self._models.models if model.service is not None
        }
        for field, (name, text) in COUNTERS.items():
            yield _family(CounterMetricFamily(f"llmlite_{name}", text, labels=["model"]), field, stats)
        for field, (name, text) in GAUGES.items():
            yield _family(GaugeMetricFamily(f"llmlite_{name}", text, labels=["model"]), field, stats)
        loaded = GaugeMetricFamily("llmlite_model_loaded", "1 where the model is loaded and runs.", labels=["model"])
        restarts = CounterMetricFamily("llmlite_engine_restarts", "Engines opened again.", labels=["model"])
        for model in self._models.models:
            loaded.add_metric([model.spec.name], float(model.alive))
            restarts.add_metric([model.spec.name], model.restarts)
        yield loaded
        yield restarts


def _family(family: CounterMetricFamily | GaugeMetricFamily, field: str, stats: dict[str, Stats]) -> Metric:
    for name, counted in stats.items():
        family.add_metric([name], vars(counted)[field])
    return family


class Counting:
    """ASGI middleware that counts every request under its endpoint's path, and unknown paths under one name."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            route = scope.get("route")
            known = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.request(known, "other" if route is None else route.path, status or 500)


METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
