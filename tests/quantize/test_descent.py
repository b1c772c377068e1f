from typing import Any

import pytest
import torch

from llmlite.quantize.descent import _Work, descend
from llmlite.quantize.feedback import feedback
from llmlite.quantize.grid import fit
from llmlite.quantize.rtn import nearest
from llmlite.quantize.types import Rounded
from tests.quantize.dense import Dense, code_values, loss, optimal_brain, refit, sweep
from tests.quantize.synthetic import SMALL, matrix_of, row_losses, weights

WIDTH, ROWS, SWEEPS = 128, 12, 3


def problem(name: str, kind: str = "normal", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Rounded]:
    """A target, damped moments, and the target rounded to nearest: there is much left to gain."""
    target, matrix = weights(kind, ROWS, WIDTH, seed), matrix_of(WIDTH, 3 * WIDTH, seed)
    return target, matrix, nearest(target, fit(target, SMALL[name], matrix.diagonal()), SMALL[name])


@pytest.mark.parametrize("with_refit", [False, True], ids=["codes", "refit"])
@pytest.mark.parametrize("name", SMALL)
def test_no_sweep_raises_the_loss_of_any_row(name: str, with_refit: bool):
    target, matrix, start = problem(name, "student")
    losses = [row_losses(target, start.dequantize(), matrix)]
    for sweeps in range(1, 5):
        solved = descend(target, start, matrix, sweeps, refit=with_refit)
        losses.append(row_losses(target, solved.dequantize(), matrix))
        assert (losses[-1] <= losses[-2] * (1 + 1e-4)).all()
    assert losses[-1].sum() < 0.9 * losses[0].sum()
    assert torch.equal(descend(target, start, matrix, 0).dequantize(), start.dequantize())


@pytest.mark.parametrize("name", SMALL)
def test_no_choice_of_a_scale_raises_the_loss_of_any_row(name: str):
    """And what is carried along (values, slopes) is what the codes and ranges give."""
    target, matrix, start = problem(name)
    work = _Work(target, start, matrix)
    work.choose_codes()
    steps = [lambda g=g: work._refit_group(g) for g in range(WIDTH // work.size)]
    if work.grid.super_block is not None:
        steps = [lambda g=g: work._refit_whole_numbers(g) for g in range(WIDTH // work.size)]
        steps += [lambda n=n: work._refit_super_scales(n) for n in range(WIDTH // work.block)]
    first = last = row_losses(target, work.result().dequantize(), matrix)
    for step in steps:
        step()
        now = row_losses(target, work.result().dequantize(), matrix)
        assert (now <= last * (1 + 1e-5)).all()
        last = now
    assert last.sum() < 0.999 * first.sum()
    values = work.result().dequantize()
    torch.testing.assert_close(work.values.T, values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(work.slopes.T, (values - target) @ matrix, rtol=1e-3, atol=1e-3 * matrix.max().item())


@pytest.mark.parametrize("name", SMALL)
def test_after_many_sweeps_no_other_code_lowers_the_loss(name: str):
    target, matrix, start = problem(name)
    solved = descend(target, start, matrix, 60, refit=False)
    mine: Any
    given: Any
    for mine, given in zip(solved.ranges.tensors(), start.ranges.tensors(), strict=True):
        assert mine is given is None or torch.equal(mine, given)
    values, m = solved.dequantize().double(), matrix.double()
    slopes = (values - target.double()) @ m
    total = row_losses(target, values, matrix)
    size = solved.grid.group or WIDTH
    for c in range(WIDTH):
        offset = None if solved.offsets is None else solved.offsets[:, c // size]
        step = code_values(solved.grid, solved.scales[:, c // size], offset) - values[:, c : c + 1]
        change = step * step * m[c, c] + 2 * step * slopes[:, c : c + 1]
        assert (change.amin(1) >= -1e-5 * total).all()


def dense_of(rounded: Rounded) -> Dense:
    low = 1 if rounded.grid.scale_rule == "narrow" else 0
    return Dense(rounded.grid, rounded.codes.long() - low, rounded.ranges)


@pytest.mark.parametrize("name", SMALL)
def test_one_sweep_chooses_the_codes_that_trying_all_chooses(name: str):
    target, matrix, start = problem(name)
    want = dense_of(start)
    sweep(want, target, matrix)
    same = (descend(target, start, matrix, 1).dequantize() - want.values()).abs().amax(1) < 1e-5
    assert same.sum() >= ROWS - 2  # a tie may fall the other way in float32


@pytest.mark.parametrize("name", SMALL)
def test_one_refit_chooses_the_ranges_that_dense_least_squares_chooses(name: str):
    target, matrix, start = problem(name)
    start = descend(target, start, matrix, 1)
    want = dense_of(start)
    refit(want, target, matrix)
    work = _Work(target, start, matrix)
    work.choose_scales()
    values = work.result().dequantize()
    same = (values - want.values()).abs().amax(1) < 1e-3 * target.abs().max()
    assert same.sum() >= ROWS - 3
    got, best = row_losses(target, values, matrix).sum().item(), loss(target, want.values(), matrix).sum().item()
    assert got == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("name", SMALL)
def test_the_whole_way_loses_as_much_as_the_dense_oracle(name: str):
    """Error feedback, then sweeps over codes and ranges; float64, one step after another, against float32."""
    grid = SMALL[name]
    target, matrix = weights("normal", 64, WIDTH), matrix_of(WIDTH, 3 * WIDTH)
    want = optimal_brain(target, matrix, grid)
    for number in range(SWEEPS):
        if number:
            refit(want, target, matrix)
        sweep(want, target, matrix)
    solved = descend(target, feedback(target, matrix, grid), matrix, SWEEPS)
    got, best = row_losses(target, solved.dequantize(), matrix).sum().item(), loss(target, want.values(), matrix)
    assert got == pytest.approx(best.sum().item(), rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_rows_do_not_touch_each_other(name: str):
    target, matrix, start = problem(name)
    whole = descend(target, start, matrix, 2)
    part = descend(target[3:5], start.map(lambda t: t[3:5]), matrix, 2)
    near = (part.dequantize() - whole.dequantize()[3:5]).abs().amax(1)
    assert near.min() < 1e-5
