"""The results of tasks and of questions on long contexts, item by item, as an evaluation's JSON has them.

``tasks.<name>.<metric>.items`` is a list of a number, true or false for each item, in the task's order.
``long_context.items`` has a row for each question: its task, length and sample, the share ``match`` of what was
expected in the answer, and ``logprob`` of the right answer's ``tokens``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Items:
    """A metric's values float64 [items], one each (``counts``); ``identity`` tells other items apart."""

    sums: np.ndarray
    counts: np.ndarray
    identity: str


def task_items(facts: Mapping[str, Any]) -> dict[str, Items]:
    """By address, as in ``tasks.hellaswag.acc``: every metric whose items are there."""
    return {**_tasks(facts.get("tasks", {})), **_questions(facts.get("long_context", {}))}


def _tasks(tasks: Mapping[str, Any]) -> dict[str, Items]:
    return {
        f"tasks.{name}.{metric}": _items(of["items"], f"{task.get('shots')} {task.get('chat')} {task.get('harness')}")
        for name, task in tasks.items() if isinstance(task, Mapping)
        for metric, of in task.items() if isinstance(of, Mapping) and _numbers(of.get("items"))
    }  # fmt: skip


def _questions(long_context: Mapping[str, Any]) -> dict[str, Items]:
    """Per task over all lengths, and over all questions: ``match``, and ``logprob`` per token of the right answer."""
    rows = [row for row in long_context.get("items") or [] if isinstance(row, Mapping) and row.get("tokens")]
    out = {}
    asked = f"{long_context.get('seed')} {long_context.get('text_sha256')} {long_context.get('chat')}"
    for task in ("all", *dict.fromkeys(str(row["task"]) for row in rows)):
        chosen = [row for row in rows if task in ("all", row["task"])]
        if chosen:
            which = asked + str([(row["task"], row["length"], row["sample"]) for row in chosen])
            out[f"long_context.{task}.match"] = _items([row["match"] for row in chosen], which)
            out[f"long_context.{task}.logprob"] = _items([row["logprob"] / row["tokens"] for row in chosen], which)
    return out


def _items(values: list, identity: str) -> Items:
    return Items(np.asarray(values, np.float64), np.ones(len(values), np.int64), identity)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, bool | int | float) for value in values)
