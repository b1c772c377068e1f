"""How much one API key may ask for: requests and tokens a minute, requests at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmlite.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class Bucket:
    """Holds up to ``rate`` units and gets ``rate`` back each minute. A debt is possible: tokens are counted late."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._level = float(rate)
        self._at = clock()

    def wait(self) -> int:
        """Seconds until a unit is there, rounded up; 0: there is one."""
        self._refill()
        return 0 if self._level >= 1 else max(1, math.ceil((1 - self._level) * 60 / self.rate))

    def take(self, units: int) -> None:
        self._refill()
        self._level -= units

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.rate, self._level + (now - self._at) * self.rate / 60)
        self._at = now


class Caller:
    """The owner of an API key and what it has used. Used on the event loop."""

    def __init__(self, name: str, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.limits = limits
        self.running = 0
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """Hold to other limits from now on; what was used under the same ones stays used."""
        self.limits = limits
        self._requests = self._bucket(self._requests, limits.requests_per_minute)
        self._tokens = self._bucket(self._tokens, limits.tokens_per_minute)

    def admit(self) -> None:
        """Count a request in, until `leave`. Raises 429 with Retry-After where a limit is reached."""
        limits = self.limits
        if limits.concurrent is not None and self.running >= limits.concurrent:
            raise _refusal(f"{limits.concurrent} {_counted(limits.concurrent, 'requests')} at a time", 1)
        for bucket, unit in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None and (seconds := bucket.wait()):
                raise _refusal(f"{bucket.rate} {_counted(bucket.rate, unit)} a minute", seconds)
        if self._requests is not None:
            self._requests.take(1)
        self.running += 1

    def leave(self, tokens: int) -> None:
        """A request has ended and used so many tokens, of prompt and reply."""
        self.running -= 1
        if self._tokens is not None:
            self._tokens.take(tokens)

    def _bucket(self, old: Bucket | None, rate: int | None) -> Bucket | None:
        if rate is None:
            return None
        return old if old is not None and old.rate == rate else Bucket(rate, self._clock)


def _counted(number: int, units: str) -> str:
    return units if number != 1 else units.removesuffix("s")


def _refusal(limit: str, seconds: int) -> ApiError:
    message = f"this API key may ask for {limit}; try again in {seconds} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
