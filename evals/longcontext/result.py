"""What the questions on long contexts gave: figures for each task and length, and paired changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llmlite.evals.longcontext.paired import Paired, paired

PARTS = 8  # of a long text, by position


@dataclass(frozen=True)
class Answer:
    """One question: ``depth`` of its facts (0 to 1), ``match``: share of the expected words in the written answer.

    ``logprob``: natural logarithm of the right answer's probability, its ``tokens`` together.
    """

    task: str
    length: int
    sample: int
    depth: float
    match: float
    logprob: float
    tokens: int

    @property
    def per_token(self) -> float:
        """What answers of different lengths are compared by."""
        return self.logprob / self.tokens


@dataclass(frozen=True)
class PositionLoss:
    """Mean negative log-likelihood of the tokens ``first`` to ``last`` (counted from 0) of a long text, in nats."""

    first: int
    last: int
    nll: float
    stderr: float
    change: Paired | None

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


@dataclass(frozen=True)
class Figure:
    """A mean over questions with its standard error (nan for one question), and the change from the base."""

    value: float
    stderr: float
    change: Paired | None

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"value": self.value, "stderr": self.stderr, "change": _paired_json(self.change)}
        return {key: value for key, value in out.items() if value is not None and value == value}


@dataclass(frozen=True)
class Figures:
    """Of some questions: share matched, and mean log-probability per token of the answers."""

    questions: int
    match: Figure
    logprob: Figure

    def to_json(self) -> dict[str, Any]:
        return {"questions": self.questions, "match": self.match.to_json(), "logprob": self.logprob.to_json()}


@dataclass(frozen=True)
class LongContext:
    """``theirs``: the same questions answered by what ``against`` names, empty where there is nothing to compare.

    ``text``: "synthetic" or the name of the user's text, with its digest; ``positions``: by length;
    ``against_sha256``: digest of the base, None where ``against`` is none.
    """

    lengths: tuple[int, ...]
    seed: int
    text: str
    text_sha256: str | None
    kv: str | None
    chat: bool
    against: str | None
    answers: tuple[Answer, ...]
    theirs: tuple[Answer, ...]
    positions: dict[int, tuple[PositionLoss, ...]]
    against_sha256: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LongContext:
        """What `to_json` wrote, also by way of a file; KeyError or TypeError where it is something else."""
        rows, against = data.get("items", []), data.get("against")
        answers = [Answer(**{name: row[name] for name in Answer.__dataclass_fields__}) for row in rows]
        theirs = [
            dataclasses.replace(answer, match=row["base_match"], logprob=row["base_logprob"])
            for answer, row in zip(answers, rows, strict=True)
            if against is not None
        ]
        positions = {int(length): tuple(map(_read_position, of)) for length, of in data.get("perplexity", {}).items()}
        return cls(
            tuple(data["lengths"]), data["seed"], data["text"], data.get("text_sha256"), data.get("kv"), data["chat"],
            against, tuple(answers), tuple(theirs), positions, data.get("against_sha256"),
        )  # fmt: skip

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(answer.task for answer in self.answers))

    def figures(self, task: str | None = None, length: int | None = None) -> Figures:
        """Over the questions of a task, of a length, of both, or over all of them."""
        chosen = [
            n
            for n, answer in enumerate(self.answers)
            if task in (None, answer.task) and length in (None, answer.length)
        ]
        mine = [self.answers[n] for n in chosen]
        theirs = [self.theirs[n] for n in chosen] if self.theirs else []
        return Figures(
            len(mine),
            _figure([a.match for a in mine], [a.match for a in theirs]),
            _figure([a.per_token for a in mine], [a.per_token for a in theirs]),
        )

    def to_json(self) -> dict[str, Any]:
        """``tasks.<task>.<length>`` and ``all``: ``questions``, ``match`` and ``logprob`` (mean per answer token).

        Each has ``value``, ``stderr`` and, against a base, ``change.{value,stderr,p}``. ``perplexity.<length>`` is
        a list of ``first``, ``last``, ``value``, ``nll``, ``stderr`` (of nll) and ``change`` (of nll). ``items`` has
        a row for each question, with what the base made of it as ``base_match`` and ``base_logprob``.
        """
        out: dict[str, Any] = {"lengths": list(self.lengths), "seed": self.seed, "chat": self.chat, "text": self.text}
        optional = {name: getattr(self, name) for name in ("text_sha256", "kv", "against", "against_sha256")}
        out.update({key: value for key, value in optional.items() if value is not None})
        if self.answers:
            out["all"] = self.figures().to_json()
            out["tasks"] = {
                task: {str(length): self.figures(task, length).to_json() for length in self.lengths}
                for task in self.tasks
            }
            out["items"] = [dataclasses.asdict(answer) for answer in self.answers]
            for row, other in zip(out["items"], self.theirs, strict=False):
                row.update(base_match=other.match, base_logprob=other.logprob)
        if self.positions:
            out["perplexity"] = {
                str(length): [_position_json(part) for part in parts] for length, parts in self.positions.items()
            }
        return out


def _figure(mine: list[float], theirs: Sequence[float] = ()) -> Figure:
    values = np.asarray(mine)
    stderr = float(values.std() / np.sqrt(len(values) - 1)) if len(values) > 1 else float("nan")
    return Figure(float(values.mean()), stderr, paired(values, np.asarray(theirs)) if theirs else None)


def losses_by_position(mine: np.ndarray, theirs: np.ndarray | None) -> tuple[PositionLoss, ...]:
    """Eight parts of a text, of losses float64 [n]; the n-th loss is that of token n + 1."""
    bounds = np.linspace(0, len(mine), min(PARTS, len(mine)) + 1).round().astype(int)
    parts = []
    for first, last in pairwise(bounds.tolist()):
        change = paired(mine[first:last], theirs[first:last]) if theirs is not None else None
        figure = _figure(mine[first:last].tolist())
        parts.append(PositionLoss(first + 1, last, figure.value, figure.stderr, change))
    return tuple(parts)


def _position_json(part: PositionLoss) -> dict[str, Any]:
    out = {"first": part.first, "last": part.last, "value": part.perplexity, "nll": part.nll, "stderr": part.stderr}
    change = _paired_json(part.change)
    return out if change is None else {**out, "change": change}


def _read_position(part: dict[str, Any]) -> PositionLoss:
    said, count = part.get("change"), part["last"] - part["first"] + 1
    change = Paired(said["value"], said.get("stderr", float("nan")), said["p"], count) if said else None
    return PositionLoss(part["first"], part["last"], part["nll"], part["stderr"], change)


def _paired_json(change: Paired | None) -> dict[str, Any] | None:
    if change is None:
        return None
    out = {"value": change.change, "p": change.p}
    return out if change.stderr != change.stderr else {**out, "stderr": change.stderr}
