"""How long work takes on its device."""

from __future__ import annotations

import time

import torch


def _now() -> float:
    return time.perf_counter()


class Clock:
    """Adds up the seconds spent in its blocks."""

    def __init__(self, device: str):
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> None:
        self._wait()
        self._started = _now()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds += _now() - self._started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
