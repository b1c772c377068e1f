import math

import numpy as np
import pytest

from llmlite.errors import InputError
from llmlite.plan.budget import Option, solve
from llmlite.plan.correct import Corrected, CorrectionSettings, Item, Types, correct, fit_factors

BITS = {"q2": 2.5625, "q3": 3.4375, "q4": 4.5, "q5": 5.5, "q6": 6.5625, "q8": 8.5}
FACTORS = {"v": 4.0, "o": 0.5, "up": 1.3, "down": 0.4, "embedding": 2.5}
NO_TRIALS = CorrectionSettings(trials=0)


def network(seed: int = 0, layers: int = 6) -> list[Item]:
    """Tensors of five roles whose predicted losses fall fourfold per bit."""
    rng = np.random.default_rng(seed)
    sizes = {"v": 4096, "o": 12288, "up": 36864, "down": 36864}
    tensors = [(f"{n}.{role}", role, size) for n in range(layers) for role, size in sizes.items()]
    items = []
    for name, role, size in [*tensors, ("embedding", "embedding", 196608)]:
        height = size / 1e5 * math.exp(rng.normal(0, 1))
        items.append(Item(name, role, {t: Option(int(size * b / 8), height * 4**-b) for t, b in BITS.items()}))
    return items


def truth(items: list[Item], wrong: float = 0.0, seed: int = 1) -> list[Item]:
    """What each option really loses: the role's factor, and a factor of the tensor's own that nothing predicts."""
    rng = np.random.default_rng(seed)
    out = []
    for item in items:
        factor = FACTORS[item.role] * math.exp(wrong * rng.normal())
        out.append(Item(item.name, item.role, {t: Option(o.bytes, o.loss * factor) for t, o in item.options.items()}))
    return out


class Meter:
    """The true loss of a choice; with ``bend`` losses together cost more than their sum."""

    def __init__(self, items: list[Item], bend: float = 0.0):
        self.items, self.bend, self.calls = items, bend, 0

    def __call__(self, types: Types) -> float:
        self.calls += 1
        whole = sum(item.options[types[item.name]].loss for item in self.items)
        return whole * (1 + self.bend * whole)


def limit_of(items: list[Item], bits: float) -> int:
    return int(sum(item.options["q8"].bytes for item in items) * bits / BITS["q8"])


def best_of(items: list[Item], limit: int) -> float:
    return solve([list(item.options.values()) for item in items], limit).loss


def bytes_of(items: list[Item], done: Corrected) -> int:
    return sum(item.options[done.types[item.name]].bytes for item in items)


@pytest.mark.parametrize("bits", [3.2, 3.9, 5.0])
def test_factors_of_roles_are_found_and_with_them_the_best_choice(bits: float):
    items, limit = network(), limit_of(network(), bits)
    meter = Meter(truth(items))
    picks = solve([list(item.options.values()) for item in items], limit).picks
    blind = meter({item.name: list(item.options)[k] for item, k in zip(items, picks, strict=True)})
    done = correct(items, limit, meter, NO_TRIALS)
    assert done.factors == pytest.approx(FACTORS, rel=0.15)
    assert done.measured == pytest.approx(best_of(meter.items, limit), rel=0.01)
    assert done.measured < 0.95 * blind
    assert done.predicted == pytest.approx(done.measured, rel=0.05)
    assert bytes_of(items, done) == done.bytes <= limit


def test_losses_that_do_not_just_add_up_are_corrected_too():
    items, limit = network(), limit_of(network(), 3.5)
    meter = Meter(truth(items), bend=2.0)
    done = correct(items, limit, meter, NO_TRIALS)
    best = best_of(meter.items, limit)
    assert done.measured <= 1.05 * best * (1 + 2.0 * best)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trials_mend_single_tensors(seed: int):
    items = network(seed, layers=12)
    limit = limit_of(items, 3.7)
    meter = Meter(truth(items, wrong=0.6, seed=seed))
    without = correct(items, limit, meter, NO_TRIALS)
    done = correct(items, limit, meter, CorrectionSettings(trials=40, doubt=0.6))
    best = best_of(meter.items, limit)
    assert best <= done.measured
    assert done.measured - best < 0.5 * (without.measured - best)
    assert bytes_of(items, done) <= limit


def test_no_more_runs_are_made_than_allowed():
    items = network()
    meter = Meter(truth(items, wrong=0.5))
    done = correct(items, limit_of(items, 4.0), meter, CorrectionSettings(rounds=2, trials=7))
    assert meter.calls == len(done.runs) <= 1 + 5 + 2 + 7
    assert done.measured == min(run.measured for run in done.runs if run.bytes <= limit_of(items, 4.0))


def test_roles_that_no_run_tells_of_get_the_factor_of_all():
    shares = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    factors = fit_factors(shares, np.array([2.0, 2.0]))
    assert factors == pytest.approx([2.0, 2.0, 2.0])


def test_factors_stay_in_a_sane_range_where_runs_contradict():
    shares = np.array([[1.0, 1.0], [1.0, 0.0]])
    assert (fit_factors(shares, np.array([1.0, 2.0])) > 0).all()


def test_enough_bytes_for_everything_take_the_best():
    items = network()
    done = correct(items, 10**9, Meter(truth(items)), CorrectionSettings())
    assert set(done.types.values()) == {"q8"}
    assert len(done.runs) == 1


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(InputError, match="too few"):
        correct(network(), 1000, Meter(network()), CorrectionSettings())


def test_a_measured_loss_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="nan"):
        correct(network(), limit_of(network(), 4.0), lambda types: math.nan, CorrectionSettings())
