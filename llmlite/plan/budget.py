"""The best type for every tensor within a number of bytes: a multiple-choice knapsack, solved exactly.

Every tensor takes one of its options; the bytes have a limit and the summed loss is made smallest. The linear
relaxation gives a price of a byte and a lower bound (Sinha and Zoltners 1979). At that price every option has a
reduced cost, and what any choice loses above the bound is the sum of the reduced costs of its options plus the price
of the bytes left over. So the search needs only combinations whose reduced costs sum to little (Pisinger 1995): it
lists all below a margin, and widens the margin until the list holds a solution, which then is the best.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmlite.errors import InputError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
MOST_STATES = 100_000  # per tensor; beyond it the search is cut and the gap is told
BEAM = 1_000  # states kept from there on
FIRST_MARGIN = 1 / 256  # of the gap between the greedy solution and the bound


@dataclass(frozen=True)
class Option:
    """One type that a tensor may take: its ``bytes``, and the ``loss`` expected of it in any one unit."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """Which option each tensor takes (``picks``), their summed ``bytes`` and ``loss``.

    ``bound``: no choice within the budget loses less than this; equal to ``loss`` where the choice is proved best.
    """

    picks: list[int]
    bytes: int
    loss: float
    bound: float


def parse_size(text: str | int) -> int:
    """Bytes from "2.5GB" (10**9), "1.2GiB" (2**30), "900MB" or a plain number of bytes; `InputError` for the rest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS:
        raise InputError(f"{str(text)!r} is not a size; a number with MB, GB, MiB or GiB is right, as in 2.5GB")
    size = round(float(match[1]) * UNITS[match[2]]) if "." in match[1] else int(match[1]) * UNITS[match[2]]
    if size < 1:
        raise InputError(f"{str(text)!r}: a size of at least one byte is right")
    return size


def choose(options: list[list[Option]], budget: int) -> list[int]:
    """The option of each tensor with the smallest summed loss in ``budget`` bytes; see `solve`."""
    return solve(options, budget).picks


def solve(options: list[list[Option]], budget: int) -> Choice:
    """The best choice within ``budget`` bytes and its proof; `InputError` where even the smallest does not fit.

    Losses are compared in float64; differences below 1e-12 of all losses do not count.
    """
    tensors = [_Tensor.of(row) for row in options]
    smallest = sum(int(tensor.bytes[0]) for tensor in tensors)
    if smallest > budget:
        raise InputError(f"{budget:,} bytes are too few: the smallest types of this model take {smallest:,} bytes")
    whole = [len(tensor.bytes) - 1 for tensor in tensors]
    if sum(int(tensor.bytes[-1]) for tensor in tensors) <= budget:
        return _choice(tensors, whole, None)
    # All sums of bytes lie on a lattice above the smallest: what lies between its last point and the budget is lost.
    unit = math.gcd(*(int(step) for tensor in tensors for step in np.diff(tensor.bytes)))
    budget = smallest + (budget - smallest) // unit * unit
    price, greedy = _relax(tensors, budget)
    best = _choice(tensors, _fill(tensors, greedy, budget), None)
    bound = sum(float((t.loss + price * t.bytes).min()) for t in tensors) - price * budget
    return _widen(tensors, budget, price, bound, best)


@dataclass(frozen=True)
class _Tensor:
    """The options that no other beats in both: bytes int64 rising, loss float64 falling, and their first numbers."""

    bytes: np.ndarray
    loss: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, options: list[Option]) -> _Tensor:
        if not options or not all(math.isfinite(option.loss) for option in options):
            raise ValueError("a tensor needs at least one option, and every loss must be a finite number")
        size = np.array([option.bytes for option in options], dtype=np.int64)
        loss = np.array([option.loss for option in options], dtype=np.float64)
        order = np.lexsort((loss, size))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
        order = order[loss[order] < best_before]
        return cls(size[order], loss[order], order)

    def hull(self) -> list[int]:
        """The options on the lower convex hull of loss over bytes."""
        kept: list[int] = []
        for j in range(len(self.bytes)):
            while len(kept) > 1 and self.slope(kept[-2], kept[-1]) <= self.slope(kept[-2], j):
                kept.pop()
            kept.append(j)
        return kept

    def slope(self, i: int, j: int) -> float:
        """Loss saved per byte from option i to option j."""
        return float(self.loss[i] - self.loss[j]) / int(self.bytes[j] - self.bytes[i])


def _choice(tensors: list[_Tensor], at: list[int], bound: float | None) -> Choice:
    loss = math.fsum(float(tensor.loss[j]) for tensor, j in zip(tensors, at, strict=True))
    size = sum(int(tensor.bytes[j]) for tensor, j in zip(tensors, at, strict=True))
    picks = [int(tensor.number[j]) for tensor, j in zip(tensors, at, strict=True)]
    return Choice(picks, size, loss, loss if bound is None else min(bound, loss))


def _relax(tensors: list[_Tensor], budget: int) -> tuple[float, list[int]]:
    """The linear relaxation: the price of a byte, and the whole steps that fit at it."""
    steps = []
    for number, tensor in enumerate(tensors):
        hull = tensor.hull()
        for i, j in pairwise(hull):
            steps.append((-tensor.slope(i, j), number, j, int(tensor.bytes[j] - tensor.bytes[i])))
    at, left = [0] * len(tensors), budget - sum(int(tensor.bytes[0]) for tensor in tensors)
    for slope, number, j, size in sorted(steps):
        if size > left:
            return -slope, at
        at[number], left = j, left - size
    raise AssertionError("the largest options fit, and were to be taken before")


def _fill(tensors: list[_Tensor], at: list[int], budget: int) -> list[int]:
    """Spend what is left on the single changes that save most, until none fits."""
    at = list(at)
    left = budget - sum(int(tensor.bytes[j]) for tensor, j in zip(tensors, at, strict=True))
    while True:
        best = (0.0, 0, 0)
        for number, tensor in enumerate(tensors):
            now = at[number]
            j = int(np.searchsorted(tensor.bytes, tensor.bytes[now] + left, side="right")) - 1
            best = max(best, (float(tensor.loss[now] - tensor.loss[j]), number, j))
        saved, number, j = best
        if saved <= 0:
            return at
        left -= int(tensors[number].bytes[j] - tensors[number].bytes[at[number]])
        at[number] = j


def _widen(tensors: list[_Tensor], budget: int, price: float, bound: float, best: Choice) -> Choice:
    """List ever more combinations until the best is among them, or nothing better than ``best`` can be."""
    gap = best.loss - bound
    noise = 1e-12 * sum(float(np.abs(tensor.loss).max()) for tensor in tensors)
    margin, proved = gap * FIRST_MARGIN, bound
    while gap > noise:
        found, whole = _Search(tensors, budget, price, min(margin, gap) + noise).run()
        if found is not None:
            candidate = _choice(tensors, found, None)
            if (candidate.loss, candidate.bytes) < (best.loss, best.bytes):
                best = candidate
        if not whole:
            return Choice(best.picks, best.bytes, best.loss, min(proved, best.loss))
        proved = bound + min(margin, gap)
        if margin >= gap or best.loss <= proved:
            break
        margin *= 4
    return best


class _Search:
    """All combinations that lose at most ``margin`` above the bound, less those that another beats."""

    def __init__(self, tensors: list[_Tensor], budget: int, price: float, margin: float):
        self.price, self.margin, self.at = price, margin, [0] * len(tensors)
        self.open: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # number, options, their bytes and costs
        self.budget = budget
        for number, tensor in enumerate(tensors):
            lagrangian = tensor.loss + price * tensor.bytes
            cost = lagrangian - lagrangian.min()
            kept = np.flatnonzero(cost <= margin)
            self.at[number] = int(kept[0])
            if len(kept) == 1:
                self.budget -= int(tensor.bytes[kept[0]])
            else:
                self.open.append((number, kept, tensor.bytes[kept], cost[kept]))
        self.open.sort(key=lambda row: -float(np.sort(row[3])[1]))  # the dearest second option first: few states

    def run(self) -> tuple[list[int] | None, bool]:
        """The best combination, as places in each tensor's list, or None; and whether nothing was cut."""
        least = np.cumsum([0, *(int(row[2].min()) for row in reversed(self.open))])[::-1]
        most = np.cumsum([0, *(int(row[2].max()) for row in reversed(self.open))])[::-1]
        size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
        trail: list[tuple[np.ndarray, np.ndarray]] = []
        whole = True
        for stage, (_, _, more, extra) in enumerate(self.open, 1):
            parts = [
                self._extend(size, cost, (int(more[k]), float(extra[k])), (int(least[stage]), int(most[stage])))
                for k in range(len(more))
            ]
            option = np.concatenate([np.full(len(part[0]), k, dtype=np.uint16) for k, part in enumerate(parts)])
            origin, size, cost = (np.concatenate([part[n] for part in parts]) for n in range(3))
            kept = self._unbeaten(size, cost)
            whole = whole and len(kept) <= MOST_STATES
            if not whole and len(kept) > BEAM:  # nothing is proved from here on: look on for a good choice alone
                kept = kept[np.sort(np.argpartition(cost[kept], BEAM)[:BEAM])]
            size, cost = size[kept], cost[kept]
            trail.append((origin[kept].astype(np.int32), option[kept]))
        if not len(size) or size[-1] > self.budget:
            return None, whole
        state = len(size) - 1  # sorted by bytes, loss falling
        for (number, places, _, _), (origin, option) in zip(reversed(self.open), reversed(trail), strict=True):
            self.at[number] = int(places[option[state]])
            state = int(origin[state])
        return self.at, whole

    def _extend(
        self, size: np.ndarray, cost: np.ndarray, option: tuple[int, float], rest: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The states (origin, bytes, cost) after one option, where the rest can still end within budget and margin."""
        size, cost = size + option[0], cost + option[1]
        unused = np.maximum(self.budget - size - rest[1], 0)
        kept = np.flatnonzero((size + rest[0] <= self.budget) & (cost + self.price * unused <= self.margin))
        return kept, size[kept], cost[kept]

    def _unbeaten(self, size: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """The states, by rising bytes, whose loss is below that of every smaller one."""
        loss = cost - self.price * size
        order = np.lexsort((loss, size))
        loss = loss[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], loss[:-1]]))
        return order[loss < before]
