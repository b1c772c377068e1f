import itertools
import math
import time

import numpy as np
import pytest

from llmlite.errors import InputError
from llmlite.plan import budget
from llmlite.plan.budget import Choice, Option, choose, parse_size, solve

BITS = (2.5625, 3.4375, 4.5, 5.5, 6.5625, 8.5, 16)
LAYER = ((64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192))
LAYER_70B = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2.5GB", 2_500_000_000),
        ("900MB", 900_000_000),
        ("1.2GiB", round(1.2 * 2**30)),
        ("2.3 gb", 2_300_000_000),
        ("64KiB", 65536),
        ("123456789012345678", 123456789012345678),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2.5 gigs", "1e9", "0", "2,5GB", "0.1"])
def test_what_is_no_size(text: str):
    with pytest.raises(InputError, match=r"2\.5GB is|size"):
        parse_size(text)


def random_case(rng: np.random.Generator) -> tuple[list[list[Option]], int]:
    unit = int(rng.choice([1, 2, 6]))
    tensors = [
        [Option(int(rng.integers(1, 30)) * unit, float(rng.normal())) for _ in range(rng.integers(1, 5))]
        for _ in range(rng.integers(1, 6))
    ]
    least, most = (sum(pick(o.bytes for o in row) for row in tensors) for pick in (min, max))
    return tensors, int(rng.integers(least, most + 2))


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_trying_everything_finds(seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        tensors, limit = random_case(rng)
        fitting = (c for c in itertools.product(*tensors) if sum(o.bytes for o in c) <= limit)
        best = min(sum(o.loss for o in c) for c in fitting)
        found = solve(tensors, limit)
        chosen = [row[k] for row, k in zip(tensors, found.picks, strict=True)]
        assert found.loss == pytest.approx(best, abs=1e-12)
        assert found.bound == pytest.approx(best, abs=1e-11)
        assert sum(o.loss for o in chosen) == pytest.approx(found.loss, abs=1e-12)
        assert sum(o.bytes for o in chosen) == found.bytes <= limit


def model(layers: int, shapes: tuple, rest: tuple, seed: int) -> list[list[Option]]:
    """Options whose loss falls about fourfold per bit, at each tensor from another height."""
    rng = np.random.default_rng(seed)
    tensors = []
    for rows, width in (*shapes * layers, *rest):
        height = math.exp(rng.normal(0, 1.5)) * rows * width
        wobble = np.exp(rng.normal(0, 0.2, len(BITS)))
        tensors.append(
            [Option(int(rows * width * b / 8), height * w * 4**-b) for b, w in zip(BITS, wobble, strict=True)]
        )
    return tensors


def by_table(tensors: list[list[Option]], limit: int) -> float:
    """The smallest loss from the textbook's table: one cell for each number of bytes, in their common unit."""
    least = [min(o.bytes for o in row) for row in tensors]
    unit = math.gcd(*(o.bytes - low for row, low in zip(tensors, least, strict=True) for o in row))
    cells = (limit - sum(least)) // unit + 1
    table = np.zeros(cells)
    for row, low in zip(tensors, least, strict=True):
        after = np.full(cells, np.inf)
        for option in row:
            step = (option.bytes - low) // unit
            if step < cells:
                np.minimum(after[step:], table[: cells - step] + option.loss, out=after[step:])
        table = after
    return float(table[-1])


@pytest.mark.parametrize("bits", [2.7, 3.3, 3.9, 4.7, 6.1])
def test_it_finds_what_a_whole_table_finds(bits: float):
    tensors = model(10, LAYER, ((1024, 64),), seed=int(bits * 10))
    limit = int(sum(row[0].bytes for row in tensors) * bits / BITS[0])
    found = solve(tensors, limit)
    assert found.loss == pytest.approx(by_table(tensors, limit), rel=1e-12)
    assert found.bytes <= limit


def linear_bound(tensors: list[list[Option]], limit: int) -> float:
    """The Lagrangian dual, its price found by bisection."""

    def at(price: float) -> tuple[float, int]:
        picked = [min(row, key=lambda o: o.loss + price * o.bytes) for row in tensors]
        return math.fsum(o.loss + price * o.bytes for o in picked) - price * limit, sum(o.bytes for o in picked)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > limit else (low, middle)
    return at(high)[0]


@pytest.mark.parametrize("bits", [2.7, 3.9, 5.2])
def test_a_large_model_takes_seconds_and_lies_on_its_bound(bits: float):
    tensors = model(80, LAYER_70B, ((128256, 8192), (128256, 8192)), seed=1)
    limit = int(sum(row[0].bytes for row in tensors) * bits / BITS[0])
    start = time.perf_counter()
    found = solve(tensors, limit)
    assert time.perf_counter() - start < 5
    below = linear_bound(tensors, limit)
    assert below <= found.loss <= below * 1.001
    assert found.bound == pytest.approx(found.loss)
    assert limit * 0.999 < found.bytes <= limit


def test_a_search_that_is_cut_tells_its_gap(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    sizes = rng.integers(10, 1000, (40, 8))
    tensors = [[Option(int(s), -float(s)) for s in row] for row in sizes]  # loss and bytes in proportion: hard
    limit = int(sizes.mean(1).sum())
    whole = solve(tensors, limit)
    monkeypatch.setattr(budget, "MOST_STATES", 4)
    monkeypatch.setattr(budget, "BEAM", 4)
    cut = solve(tensors, limit)
    assert cut.bound <= whole.loss <= cut.loss
    assert cut.bytes <= limit


def test_a_budget_below_the_smallest_names_it():
    tensors = [[Option(300, 1.0), Option(700, 0.0)], [Option(500, 0.0)]]
    with pytest.raises(InputError, match="800 bytes"):
        choose(tensors, 799)
    assert choose(tensors, 800) == [0, 0]


def test_a_budget_for_everything_takes_the_best_not_the_largest():
    tensors = [[Option(3, 1.0), Option(5, 0.0), Option(9, 0.0), Option(12, 2.0)], [Option(7, -1.0)]]
    assert solve(tensors, 10**12) == Choice([1, 0], 12, -1.0, -1.0)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        choose([[Option(1, math.nan)]], 10)
