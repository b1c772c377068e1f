"""The results of tasks, item by item, as an evaluation's JSON has them.

Of a task ``tasks.<name>``, a metric's items are the list ``<metric>.items`` or ``items.<metric>``: a number, true or
false for each item, in the task's order. ``items_sha256``, where it is there, says which items they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SECTIONS = ("tasks", "long_context")


@dataclass(frozen=True)
class Items:
    """A metric's values float64 [items], one each (``counts``); ``identity`` tells other items apart."""

    sums: np.ndarray
    counts: np.ndarray
    identity: str


def task_items(facts: Mapping[str, Any]) -> dict[str, Items]:
    """By address, as in ``tasks.hellaswag.acc``: every metric whose items are there."""
    out = {}
    for section in SECTIONS:
        for name, task in facts.get(section, {}).items():
            if isinstance(task, Mapping):
                for metric, values in _lists(task):
                    counts = np.ones(len(values), np.int64)
                    identity = str(task.get("items_sha256", len(values)))
                    out[f"{section}.{name}.{metric}"] = Items(np.asarray(values, np.float64), counts, identity)
    return out


def _lists(task: Mapping[str, Any]) -> Iterator[tuple[str, list]]:
    below = task.get("items")
    if isinstance(below, Mapping):
        yield from ((metric, values) for metric, values in below.items() if _numbers(values))
    for metric, of in task.items():
        if isinstance(of, Mapping) and _numbers(of.get("items")):
            yield metric, of["items"]


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, bool | int | float) for value in values)
