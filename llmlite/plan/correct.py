"""Correct predicted losses by measured ones: a factor for each role, then other choices that are measured.

Predictions rank the tensors of one role well and are off from role to role. So the best choice is measured once as it
is and once for each role with that role's tensors at their best types; least squares give every role its factor. The
knapsack is solved anew with them, until its choice stays. Then choices are tried that would be best if single tensors
were off by as much as is expected; every trial tells something of the tensors it changed, and the best one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmlite.errors import InputError
from llmlite.plan.budget import Option, solve

Types = Mapping[str, str]
Measure = Callable[[Types], float]
PRIOR = 1e-4  # how strongly a role's factor is held to that of all: decides only where the runs say nothing
FLOOR, CEILING = 0.05, 20.0  # of the factor of all
DRAWS, SPREAD = 5, 0.6  # draws that may bring up a new choice, and their width as a share of the doubt
ADDITIVE = 0.05  # relative error of taking the losses of two changes for their sum


@dataclass(frozen=True)
class Item:
    """A tensor that a type is chosen for: its ``name``, the ``role`` it shares a factor with, type -> option."""

    name: str
    role: str
    options: dict[str, Option]


@dataclass(frozen=True)
class CorrectionSettings:
    """How much is measured. With R roles, rounds n and trials m at most 1 + R + n + m runs are made."""

    rounds: int = field(default=3, metadata={"help": "times the choice is solved anew after measuring it"})
    trials: int = field(default=20, metadata={"help": "other choices that are tried out by measuring"})
    doubt: float = field(default=0.3, metadata={"help": "relative error that is expected of a corrected loss"})
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One measured choice of types: the corrected prediction (final factors) and the measured loss."""

    what: str
    types: dict[str, str]
    bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Corrected:
    """The best measured choice within the budget; ``factors`` by role; ``runs`` in order.

    ``runs`` that measured one role at its best types are larger than the budget.
    """

    types: dict[str, str]
    bytes: int
    predicted: float
    measured: float
    factors: dict[str, float]
    runs: tuple[Run, ...]


def correct(items: list[Item], budget: int, measure: Measure, settings: CorrectionSettings) -> Corrected:
    """Choose a type for each item within ``budget`` bytes, by predictions that ``measure`` corrects.

    ``measure`` gives the true loss of a whole choice, above 0, in the unit of the options' losses. Raises
    `InputError` where the smallest choice exceeds the budget, or a measured loss is not a number.
    """
    return _Correction(items, budget, measure, settings).run()


def fit_factors(shares: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Factors [roles] with shares @ factors ~ measured, relative errors squared; shares [runs, roles] predicted.

    Roles that the runs tell nothing of get the factor of all.
    """
    whole = shares.sum(1) / measured
    overall = float(whole.sum() / (whole @ whole))
    rows = np.concatenate([shares / measured[:, None] * overall, np.sqrt(PRIOR) * np.eye(shares.shape[1])])
    wanted = np.concatenate([np.ones(len(measured)), np.full(shares.shape[1], np.sqrt(PRIOR))])
    relative = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return overall * np.clip(relative, FLOOR, CEILING)


class _Correction:
    def __init__(self, items: list[Item], budget: int, measure: Measure, settings: CorrectionSettings):
        self.items, self.budget, self._measure, self.settings = items, budget, measure, settings
        self.roles = sorted({item.role for item in items})
        self.role_of = np.array([self.roles.index(item.role) for item in items])
        self.types = [list(item.options) for item in items]
        self.bytes = [np.array([o.bytes for o in item.options.values()], dtype=np.int64) for item in items]
        self.loss = [np.array([o.loss for o in item.options.values()]) for item in items]
        self.factors = np.ones(len(self.roles))
        self.each = self.variance = np.zeros(len(items))  # factor of each item, and how sure it is
        self.runs: list[tuple[str, tuple[int, ...], float]] = []

    def run(self) -> Corrected:
        first = self._solved(self.factors[self.role_of])
        self._measured("predicted", first)
        for number, role in enumerate(self.roles):
            best = [
                int(np.argmin(loss)) if of == number else j
                for loss, of, j in zip(self.loss, self.role_of, first, strict=True)
            ]
            if tuple(best) != first:
                self._measured(f"{role} at its best", tuple(best))
        self._fit()
        for number in range(self.settings.rounds):
            picks = self._solved(self.factors[self.role_of])
            if any(picks == seen for _, seen, _ in self.runs):
                break
            self._measured(f"corrected {number + 1}", picks)
            self._fit()
        self._try_others()
        return self._result()

    def _solved(self, factors: np.ndarray) -> tuple[int, ...]:
        """The best choice where each item's losses are multiplied by its factor [items]."""
        rows = [
            [Option(int(size), float(loss)) for size, loss in zip(sizes, losses * factor, strict=True)]
            for sizes, losses, factor in zip(self.bytes, self.loss, factors, strict=True)
        ]
        return tuple(solve(rows, self.budget).picks)

    def _size(self, picks: tuple[int, ...]) -> int:
        return sum(int(sizes[j]) for sizes, j in zip(self.bytes, picks, strict=True))

    def _named(self, picks: tuple[int, ...]) -> dict[str, str]:
        return {item.name: types[j] for item, types, j in zip(self.items, self.types, picks, strict=True)}

    def _shares(self, picks: tuple[int, ...]) -> np.ndarray:
        chosen = [float(loss[j]) for loss, j in zip(self.loss, picks, strict=True)]
        return np.bincount(self.role_of, chosen, len(self.roles))

    def _measured(self, what: str, picks: tuple[int, ...]) -> float:
        loss = self._measure(self._named(picks))
        if not np.isfinite(loss):
            raise InputError(f"the measured loss of a choice of types is {loss}; a finite number is right")
        self.runs.append((what, picks, loss))
        return loss

    def _fit(self) -> None:
        shares = np.array([self._shares(picks) for _, picks, _ in self.runs])
        measured = np.array([loss for _, _, loss in self.runs])
        used = (measured > 0) & (shares.sum(1) > 0)  # a run without loss tells nothing
        if used.any():
            self.factors = fit_factors(shares[used], measured[used])

    def _best(self) -> tuple[str, tuple[int, ...], float]:
        return min((run for run in self.runs if self._size(run[1]) <= self.budget), key=lambda run: run[2])

    def _try_others(self) -> None:
        """Measure choices that would be best, were the predictions as wrong as they may be; learn from each."""
        _, picks, loss = self._best()
        self.each = self.factors[self.role_of]
        self.variance = (self.settings.doubt * self.each) ** 2
        chance = np.random.default_rng(self.settings.seed)
        for number in range(self.settings.trials):
            tried = self._unseen(chance)
            if tried is None:
                return
            after = self._measured(f"trial {number + 1}", tried)
            changes = {
                item: float(self.loss[item][new] - self.loss[item][old])
                for item, (new, old) in enumerate(zip(tried, picks, strict=True))
                if new != old
            }
            self._learn(changes, after - loss)
            if after < loss:
                picks, loss = tried, after

    def _unseen(self, chance: np.random.Generator) -> tuple[int, ...] | None:
        """The best choice by what was learned or, where that was measured, by factors drawn about it (Thompson 1933).

        None where draws bring up nothing new: what was learned leaves no doubt.
        """
        seen = {picks for _, picks, _ in self.runs}
        picks = self._solved(self.each)
        for _ in range(DRAWS):
            if picks not in seen:
                return picks
            drawn = self.each + SPREAD * np.sqrt(self.variance) * chance.normal(size=len(self.each))
            picks = self._solved(np.maximum(drawn, FLOOR * self.each))
        return None if picks in seen else picks

    def _learn(self, change: dict[int, float], seen: float) -> None:
        """Move the factors of the items changed towards the difference that was seen (a Kalman update, diagonal)."""
        at, by = np.array(list(change)), np.array(list(change.values()))
        spread = self.variance[at] * by
        noise = (ADDITIVE * by * self.each[at]) @ (by * self.each[at]) * ADDITIVE
        gain = spread / (by @ spread + noise)
        self.each[at] = np.maximum(self.each[at] + gain * (seen - by @ self.each[at]), FLOOR * self.each[at])
        self.variance[at] *= 1 - gain * by

    def _result(self) -> Corrected:
        runs = tuple(
            Run(what, self._named(picks), self._size(picks), float(self._shares(picks) @ self.factors), loss)
            for what, picks, loss in self.runs
        )
        best = min((run for run in runs if run.bytes <= self.budget), key=lambda run: run.measured)
        factors = dict(zip(self.roles, map(float, self.factors), strict=True))
        return Corrected(best.types, best.bytes, best.predicted, best.measured, factors, runs)
