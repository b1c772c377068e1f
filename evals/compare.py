"""Artifacts side by side on the same windows and items: which differences are real, and which may be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.bootstrap import FEWEST_BLOCKS, Interval, Resampling, paired
from llmlite.evals.evaluate import EvalSettings
from llmlite.evals.items import task_items
from llmlite.evals.locate import find
from llmlite.evals.obtain import measured, read_evaluation
from llmlite.evals.structure import compare_structure


@dataclass(frozen=True)
class CompareSettings(EvalSettings):
    """What `compare` can be told, besides all that an evaluation can be told."""

    resamples: int = field(default=10_000, metadata={"help": "resamples of the paired bootstrap"})
    resampling_seed: int = field(default=0, metadata={"help": "of the bootstrap's draws"})
    level: float = field(default=0.95, metadata={"help": "of the intervals, as a share of 1"})

    def check(self) -> None:
        """`InputError` for what can't be measured or resampled."""
        super().check()
        if self.resamples < 1000:
            raise InputError(f"resamples is {self.resamples}; 1000 or more is right")
        if not 0.5 <= self.level < 1:
            raise InputError(f"level is {self.level}; a share between 0.5 and 1 is right, as in 0.95")


@dataclass(frozen=True)
class Series:
    """One figure of one artifact, block by block: sums float64 [blocks] and numbers of values int [blocks]."""

    sums: np.ndarray
    counts: np.ndarray
    identity: str


@dataclass(frozen=True)
class Difference:
    """``figure`` of ``first`` less that of ``second``: means over all values, and what resampling makes of it."""

    figure: str
    first: str
    second: str
    first_value: float
    second_value: float
    interval: Interval

    def to_json(self) -> dict:
        """Plain data; ``real`` is None where too few blocks can't tell."""
        return {**asdict(self), "real": self.interval.real}


@dataclass(frozen=True)
class Comparison:
    """Evaluations by the artifacts' names, and every pairwise difference; ``notes``: what a reader must know."""

    evaluations: dict[str, dict[str, Any]]
    differences: tuple[Difference, ...]
    how: Resampling
    notes: tuple[str, ...]

    def to_json(self) -> dict:
        """Plain data: artifacts, differences, how they were resampled, notes."""
        return {
            "artifacts": self.evaluations,
            "differences": [difference.to_json() for difference in self.differences],
            "bootstrap": asdict(self.how),
            "notes": list(self.notes),
        }


def compare(artifacts: Sequence[str], settings: CompareSettings) -> Comparison:
    """Evaluate what is not a JSON file of an evaluation yet, then compare each two; `InputError` for unlike input."""
    settings.check()
    if len(artifacts) < 2:
        raise InputError("one artifact alone: name two or more, or JSON files of llmlite eval")
    known = {name: getattr(settings, name) for name in EvalSettings.__dataclass_fields__}
    plain = EvalSettings(**known)
    found = [
        read_evaluation(Path(source)) if source.endswith(".json") else measured(source, plain) for source in artifacts
    ]
    names = short_names([str(facts["artifact"]) for facts in found])
    by_name = dict(zip(names, found, strict=True))
    check_same_input(by_name)
    return compared(by_name, Resampling(settings.resamples, settings.resampling_seed, settings.level))


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart; a number where nothing does."""
    parts = [Path(path).parts for path in paths]
    for take in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(of[-take:]) for of in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, 1)]


def compared(evaluations: dict[str, dict[str, Any]], how: Resampling) -> Comparison:
    """Every figure that two artifacts have on the same blocks; `InputError` where there is none."""
    series = {name: {**text_series(facts), **task_items(facts)} for name, facts in evaluations.items()}
    pairs = [
        (figure, one, other)
        for one, other in combinations(series, 2)
        for figure in series[one]
        if figure in series[other]
    ]
    if not pairs:
        raise InputError("no figure was measured of two artifacts: name a text with --text")
    for figure, one, other in pairs:
        a, b = series[one][figure], series[other][figure]
        if a.identity != b.identity or not np.array_equal(a.counts, b.counts):
            raise InputError(f"{figure}: {one} and {other} were not measured on the same windows or items")
    how = Resampling(how.resamples, how.seed, how.level, comparisons=len(pairs))
    differences = tuple(_difference(figure, one, other, series, how) for figure, one, other in pairs)
    return Comparison(evaluations, differences, how, _notes(differences, how))


def _difference(figure: str, one: str, other: str, series: Mapping[str, dict], how: Resampling) -> Difference:
    a, b = series[one][figure], series[other][figure]
    total = a.counts.sum()
    return Difference(
        figure, one, other, float(a.sums.sum() / total), float(b.sums.sum() / total),
        paired(a.sums, b.sums, a.counts, how),
    )  # fmt: skip


def text_series(facts: Mapping[str, Any]) -> dict[str, Series]:
    """Per text, ``texts.<name>.nll`` and ``.kl`` in nats per token, by window; empty without sums by window."""
    out = {}
    protocol = facts.get("protocol", {})
    for name, of in facts.get("texts", {}).items():
        conditions = f"{of.get('sha256')} {protocol.get('name')} {protocol.get('window')} {protocol.get('stride')}"
        for key, group, belongs in (("nll", "perplexity", ""), ("kl", "divergence", str(facts.get("base_sha256")))):
            means = of.get(group, {}).get("by_window")
            if means:
                counts = window_tokens(len(means), of["perplexity"]["tokens"], protocol)
                sums = np.asarray(means, np.float64) * counts
                out[f"texts.{name}.{key}"] = Series(sums, counts, f"{conditions} {belongs}")
    return out


def window_tokens(windows: int, tokens: int, protocol: Mapping[str, Any]) -> np.ndarray:
    """Scored predictions of each window int64 [windows]: equal, but by a stride, where windows overlap.

    Then the first window has all of its own, each later one a stride's, and the last what is left.
    """
    stride = protocol.get("stride")
    if stride is None or windows == 1:
        return np.full(windows, tokens // windows, np.int64)
    counts = np.full(windows, stride, np.int64)
    counts[0] = protocol["window"] - 1
    counts[-1] = tokens - counts[:-1].sum()
    return counts


def check_same_input(evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """`InputError` unless all read the same token ids: by a common base, or by tokenizers that agree."""
    scored = {name: facts for name, facts in evaluations.items() if facts.get("texts")}
    bases = {facts.get("base_sha256") for facts in scored.values()}
    if len(scored) < 2 or (len(bases) == 1 and None not in bases):
        return
    (first, of_first), *others = scored.items()
    for name, facts in others:
        structure = compare_structure(find(str(of_first["artifact"])), find(str(facts["artifact"])))
        for aspect in ("tokenizer", "prefix_token"):
            said = structure.aspects.get(aspect)
            if said is None:
                raise InputError(
                    f"{first} and {name}: it can't be told that they read the same token ids "
                    f"({structure.unknown[aspect]}); evaluate both against the same --base"
                )
            if not said.equal:
                raise InputError(f"{first} and {name} do not read the same token ids: {said.detail}")


def _notes(differences: Sequence[Difference], how: Resampling) -> tuple[str, ...]:
    count = how.comparisons
    notes = [
        f"{how.level:.0%} intervals by a paired bootstrap, {how.resamples:,} resamples of windows or items, "
        f"seed {how.seed}",
        f"{count} comparisons: a difference is called real where its interval at {1 - (1 - how.level) / count:.2%} "
        "excludes 0 (Bonferroni), so that all calls hold at once",
    ]
    fewest = min(difference.interval.blocks for difference in differences)
    if fewest < FEWEST_BLOCKS:
        notes.append(f"{fewest} windows or items are too few to call anything real: take {FEWEST_BLOCKS} or more")
    return tuple(notes)


def percent(difference: Difference) -> str:
    """A difference of mean nll as the perplexity's change in percent; "" for other figures."""
    return f"{math.expm1(difference.interval.difference):+.2%}" if difference.figure.endswith(".nll") else ""
