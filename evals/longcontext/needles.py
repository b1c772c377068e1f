"""Facts to hide in a text and the questions about them: after RULER (arXiv 2404.06654) and passkey (2305.16300).

Each task makes its facts and questions from a seeded generator; nothing is downloaded. All tasks of a context share
it, so one prefill serves every question, and each task's facts distract from the others'.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmlite.evals.longcontext.filler import NOUNS

VALUES = 3  # numbers under one key of multi_value
HOPS = 3  # assignments after the first of variable_tracking
FREQUENT = 3  # words that common_words asks for


@dataclass(frozen=True)
class Question:
    """``prompt`` is asked after the context; ``start`` opens the answer, ``answer`` goes on from it.

    ``expected``: what the string match looks for, each counting alike; ``facts``: which facts of the task hold the
    answer (their mean depth is the question's).
    """

    task: str
    prompt: str
    start: str
    answer: str
    expected: tuple[str, ...]
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Needles:
    """``facts`` in the order in which they must stand; ``spread``: over the whole text, else all at one place."""

    facts: tuple[str, ...]
    questions: tuple[Question, ...]
    spread: bool = True


def passkey(random: np.random.Generator, count: int, size: float) -> Needles:
    """``count`` five-digit keys, each with a name."""
    names = random.choice(NOUNS, count, replace=False)
    keys = [str(random.integers(10000, 100000)) for _ in names]
    pairs = list(zip(names, keys, strict=True))
    facts = tuple(f"The pass key of the {n} room is {k}. Remember it: {k} is the pass key." for n, k in pairs)
    questions = tuple(
        Question("passkey", f"What is the pass key of the {name} room?", f"The pass key of the {name} room is",
                 f" {key}", (key,), (place,))
        for place, (name, key) in enumerate(pairs)
    )  # fmt: skip
    return Needles(facts, questions)


def multi_key(random: np.random.Generator, count: int, size: float) -> Needles:
    """Pairs of UUIDs, ``size`` times as many as questions: only the key tells one from another."""
    pairs = [(_uuid(random), _uuid(random)) for _ in range(max(count, round(count * size)))]
    facts = tuple(f"The value of record {key} is {value}." for key, value in pairs)
    asked = np.sort(random.choice(len(pairs), count, replace=False)).tolist()
    questions = tuple(
        Question("multi_key", f"What is the value of record {pairs[n][0]}?", f"The value of record {pairs[n][0]} is",
                 f" {pairs[n][1]}", (pairs[n][1],), (n,))
        for n in asked
    )  # fmt: skip
    return Needles(facts, questions)


def multi_value(random: np.random.Generator, count: int, size: float) -> Needles:
    """Keys with `VALUES` numbers each, all asked for at once."""
    names = random.choice(NOUNS, count, replace=False)
    numbers = [[str(random.integers(1000000, 10000000)) for _ in range(VALUES)] for _ in names]
    order = [(key, value) for value in range(VALUES) for key in range(count)]  # a key's numbers lie far apart
    facts = tuple(f"One of the magic numbers of the {names[key]} is {numbers[key][value]}." for key, value in order)
    held = [tuple(n for n, part in enumerate(order) if part[0] == key) for key in range(count)]
    questions = tuple(
        Question(
            "multi_value", f"What are all the magic numbers of the {name}?", f"The magic numbers of the {name} are",
            " " + _listed(numbers[key]), tuple(numbers[key]), held[key],
        )
        for key, name in enumerate(names)
    )  # fmt: skip
    return Needles(facts, questions)


def variable_tracking(random: np.random.Generator, count: int, size: float) -> Needles:
    """Chains of assignments that pass a number on, interleaved; which variables have it?"""
    letters = [chr(65 + n) for n in range(26)]
    names = [
        ["".join(random.choice(letters, 3, replace=False)) + str(chain) for _ in range(HOPS + 1)]
        for chain in range(count)
    ]
    numbers = [str(n) for n in random.choice(90000, count, replace=False) + 10000]
    facts: list[str] = []
    held: list[list[int]] = [[] for _ in range(count)]
    for hop in range(HOPS + 1):
        for chain in range(count):
            held[chain].append(len(facts))
            value = numbers[chain] if hop == 0 else f"VAR {names[chain][hop - 1]}"
            facts.append(f"VAR {names[chain][hop]} = {value}.")
    questions = tuple(
        Question(
            "variable_tracking", f"Which variables have the value {numbers[chain]}?",
            f"The variables with the value {numbers[chain]} are", " " + _listed(names[chain]), tuple(names[chain]),
            tuple(held[chain]),
        )
        for chain in range(count)
    )  # fmt: skip
    return Needles(tuple(facts), questions)


def common_words(random: np.random.Generator, count: int, size: float) -> Needles:
    """Numbered lists in which `FREQUENT` words stand six times and the others once; which are frequent?"""
    facts, questions = [], []
    for place in range(count):
        words = random.choice(NOUNS, FREQUENT + 12, replace=False)
        frequent, rare = words[:FREQUENT].tolist(), words[FREQUENT:].tolist()
        listed = random.permutation(frequent * 6 + rare)
        facts.append(f"List {place + 1}: " + " ".join(f"{n + 1}. {word}" for n, word in enumerate(listed)) + ".")
        first = sorted(frequent, key=listed.tolist().index)
        questions.append(
            Question(
                "common_words", f"Which {FREQUENT} words stand most often in list {place + 1}?",
                f"The {FREQUENT} words that stand most often in list {place + 1} are", " " + _listed(first),
                tuple(first), (place,),
            )
        )  # fmt: skip
    return Needles(tuple(facts), tuple(questions))


def _uuid(random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


TASKS: dict[str, Callable[[np.random.Generator, int, float], Needles]] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
PERPLEXITY = "perplexity"
