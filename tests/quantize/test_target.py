from typing import Any

import pytest
import torch

from llmlite.quantize.solve import SolverSettings, damped, solve
from llmlite.quantize.target import corrected
from llmlite.quantize.types import Moments
from tests.quantize.synthetic import GRIDS, inputs, weights

ROWS, WIDTH = 8, 128


def drifted(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs x as they are, y as they were (x is y mixed, with noise), and r, what the residual stream has lost."""
    y = inputs(WIDTH, tokens)
    chance = torch.Generator().manual_seed(8)
    mix = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=chance) / WIDTH**0.5
    x = y @ mix + 0.3 * torch.randn(tokens, WIDTH, generator=chance)
    r = x @ torch.randn(WIDTH, ROWS, generator=chance) * 0.01 + 0.02 * torch.randn(tokens, ROWS, generator=chance)
    return x, y, r


def moments_of(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor | None, held: Moments | None = None) -> Moments:
    residual = None if r is None else r.T @ x
    return Moments(x.T @ x, len(x), y.T @ x, residual, held)


def split(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor | None) -> Moments:
    """The last eighth of the tokens held out."""
    cut = len(x) * 7 // 8
    judge = moments_of(x[cut:], y[cut:], None if r is None else r[cut:])
    return moments_of(x[:cut], y[:cut], None if r is None else r[:cut], judge)


def test_where_nothing_drifted_the_target_is_the_weight():
    x, _, _ = drifted(600)
    weight, nothing = weights("normal", ROWS, WIDTH), torch.zeros(len(x), ROWS)
    for moments in (split(x, x, None), split(x, x, nothing), moments_of(x, x, None)):
        target = corrected(weight, moments, damped(moments.xxt, 0.02), 1.0)
        torch.testing.assert_close(target, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_with_many_tokens_it_is_the_least_squares_solution(share: float, with_residual: bool):
    """T x = W y (+ r) over the tokens, hardly damped; ``share`` of the way there."""
    x, y, drawn = drifted(16000)
    r = drawn if with_residual else None
    weight, moments = weights("normal", ROWS, WIDTH), split(x, y, r)
    goal = y.double() @ weight.double().T + (0 if r is None else r.double())
    best = torch.linalg.lstsq(x.double(), goal).solution.T
    target = corrected(weight, moments, damped(moments.xxt, 1e-6), share).double()
    change, want = target - weight, share * (best - weight)
    assert (best - weight).norm() > 0.1 * weight.norm()
    assert (change - want).norm() <= 0.1 * want.norm() + 1e-6

    def lost(values: torch.Tensor) -> float:
        return (x.double() @ values.T - goal).square().sum().item()

    if share == 1:
        assert lost(target) < 1.01 * lost(best)
        assert lost(best) < 0.9 * lost(weight.double())


@pytest.mark.parametrize("tokens", [80, 200, 1000])
def test_with_few_tokens_it_is_never_worse_than_the_weight_on_those_held_out(tokens: int):
    x, y, r = drifted(tokens)
    weight, moments = weights("normal", ROWS, WIDTH), split(x, y, r)
    target = corrected(weight, moments, damped(moments.xxt, 0.02), 1.0)
    cut = tokens * 7 // 8
    goal = y[cut:] @ weight.T + r[cut:]
    lost, before = ((x[cut:] @ values.T - goal).square().sum() for values in (target, weight))
    assert lost <= before * 1.0001


def test_noise_is_not_taken_for_drift():
    """Where y has nothing to do with what x lacks, the tokens held out keep the weight as it is, or near."""
    x, _, _ = drifted(150)
    noise = torch.randn(150, ROWS, generator=torch.Generator().manual_seed(2))
    weight, moments = weights("normal", ROWS, WIDTH), split(x, x, noise)
    target = corrected(weight, moments, damped(moments.xxt, 0.02), 1.0)
    fitted = torch.linalg.lstsq(x[:131].double(), noise[:131].double()).solution.T
    assert (target - weight).norm() < 0.1 * fitted.norm()


def test_a_rounded_layer_loses_less_on_new_tokens():
    x, y, r = drifted(6000)
    weight, moments = weights("normal", ROWS, WIDTH), split(x[:3000], y[:3000], r[:3000])
    goal, lost = y[3000:] @ weight.T + r[3000:], {}
    for drift in (0.0, 1.0):
        solved: Any = solve(weight, moments, GRIDS["q5_0"], SolverSettings(drift=drift))
        lost[drift] = (x[3000:] @ solved.dequantize().T - goal).square().sum()
    assert lost[1.0] < 0.8 * lost[0.0]
