from dataclasses import replace
from typing import Any

import pytest
import torch

from llmlite.formats.gguf.types import pack
from llmlite.quantize.grid import fit
from llmlite.quantize.rtn import nearest, round_to_nearest
from llmlite.quantize.solve import SolverSettings, damped, in_order, solve
from llmlite.quantize.types import Grid, Moments, Ranges
from tests.quantize.synthetic import GGUF, GRIDS, OTHER, inputs, moments_of, row_losses, weights

ROWS, WIDTH = 8, 256


def problem(tokens: int, name: str = "q4_0", seed: int = 0) -> tuple[torch.Tensor, Any, Grid]:
    """A weight, moments with an eighth of the tokens held out, and a grid."""
    x = inputs(WIDTH, tokens + tokens // 8, seed)
    grid = GRIDS[name]
    grid = replace(grid, group=64) if grid.group == 128 else grid
    return weights("student", ROWS, WIDTH, seed), moments_of(x[:tokens], held=x[tokens:]), grid


def plain_of(weight: torch.Tensor, moments: Any, grid: Grid) -> torch.Tensor:
    """Rounded to nearest, the damped second moments of its channels as weights in the choice of the scales."""
    importance = damped(moments.xxt, SolverSettings().damping).diagonal()
    return nearest(weight, fit(weight, grid, importance), grid).dequantize()


@pytest.mark.parametrize("tokens", [60, 800])
@pytest.mark.parametrize("name", GRIDS)
def test_never_worse_than_weighted_rounding_on_the_held_out_tokens_row_by_row(name: str, tokens: int):
    """With fewer tokens than channels too. The error that is reported is the one on them."""
    weight, moments, grid = problem(tokens, name)
    solved = solve(weight, moments, grid)
    if name in GGUF:
        pack(solved, name)
    mine = row_losses(weight, solved.dequantize(), moments.held.xxt)
    plain = row_losses(weight, plain_of(weight, moments, grid), moments.held.xxt)
    assert (mine <= plain * (1 + 1e-4)).all()
    if tokens > WIDTH:
        assert mine.sum() < 0.9 * plain.sum()
    whole = row_losses(weight, torch.zeros_like(weight), moments.held.xxt).sum()
    assert solved.error == pytest.approx((mine.sum() / whole).item(), rel=1e-3)


def test_a_row_that_fitting_spoils_falls_back_to_plain_rounding():
    """With few tokens: a row is the solver's or plainly rounded, whichever loses less on those held out."""
    x, grid = inputs(WIDTH, 68), GRIDS["q4_0"]
    weight, moments = weights("student", 64, WIDTH), moments_of(x[:60])
    judged: Any = moments_of(x[:60], held=x[60:])
    plain = plain_of(weight, moments, grid)
    free, solved = (solve(weight, these, grid).dequantize() for these in (moments, judged))
    theirs, mine = (row_losses(weight, values, judged.held.xxt) for values in (free, plain))
    assert 0 < (theirs < mine).sum() < 64
    sure = (theirs - mine).abs() > 1e-4 * mine
    assert torch.equal(solved[sure], torch.where((theirs < mine)[:, None], free, plain)[sure])


def test_without_held_out_tokens_the_moments_themselves_judge():
    weight, moments, grid = problem(600)
    moments = replace(moments, held=None)
    solved = solve(weight, moments, grid)
    mine, plain = (row_losses(weight, v, moments.xxt) for v in (solved.dequantize(), plain_of(weight, moments, grid)))
    assert (mine < plain).all()
    whole = row_losses(weight, torch.zeros_like(weight), moments.xxt).sum()
    assert solved.error == pytest.approx((mine.sum() / whole).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q6_k", "nf4", "gptq-3-asymmetric"])
def test_dead_channels_and_dead_layers(name: str):
    weight, moments, grid = problem(800, name)
    dead = torch.arange(5, WIDTH, 9)
    alive = torch.ones(WIDTH)
    alive[dead] = 0
    half = replace(moments, xxt=moments.xxt * alive * alive[:, None])
    half = replace(half, held=replace(moments.held, xxt=moments.held.xxt * alive * alive[:, None]))
    none = Moments(torch.zeros(WIDTH, WIDTH), 800)
    seen = solve(weight, half, grid).dequantize()
    assert torch.isfinite(seen).all()
    assert (seen - weight)[:, dead].square().sum() < 0.4 * weight[:, dead].square().sum()
    assert (
        row_losses(weight, seen, half.held.xxt)
        <= row_losses(weight, plain_of(weight, half, grid), half.held.xxt) * 1.0001
    ).all()
    solved = solve(weight, none, grid)
    seen = solved.dequantize()
    plain = round_to_nearest(weight, None, grid, torch.ones(WIDTH)).dequantize()
    assert (seen - weight).square().sum() <= (plain - weight).square().sum() * 1.0001
    assert solved.error == 0
    with_drift = solve(weight, replace(none, cross=torch.zeros(WIDTH, WIDTH)), grid)
    assert torch.equal(with_drift.dequantize(), seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["xxt", "cross", "held"])
def test_moments_that_are_not_finite_are_refused(place: str, value: float):
    x = inputs(WIDTH, 300)
    moments = moments_of(x, y=x.clone(), held=x[:40])
    bad: Any = moments.held if place == "held" else moments
    (bad.cross if place == "cross" else bad.xxt)[3, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        solve(weights("normal", ROWS, WIDTH), moments, GRIDS["q4_0"])


@pytest.mark.parametrize("with_cross", [False, True])
@pytest.mark.parametrize(("share", "refused"), [(0.001, False), (10.0, True)])
def test_moments_with_a_negative_eigenvalue(share: float, refused: bool, with_cross: bool):
    """``share`` of the median diagonal: less than the damping is made good by it, more is refused in words."""
    weight, moments, grid = problem(2000)
    values, vectors = torch.linalg.eigh(moments.xxt)
    values[0] = -share * moments.xxt.diagonal().median()
    xxt = vectors @ values.diag() @ vectors.T
    xxt = (xxt + xxt.T) / 2
    moments = replace(moments, xxt=xxt, cross=xxt.clone() if with_cross else None)
    if refused:
        with pytest.raises(ValueError, match="not positive definite"):
            solve(weight, moments, grid)
    else:
        assert solve(weight, moments, grid).error < 0.1


@pytest.mark.parametrize("name", ["gptq-4", "gptq-3-asymmetric", "compressed-4-bfloat16"])
def test_desc_act_makes_groups_of_channels_by_falling_second_moment(name: str):
    weight, moments, grid = problem(800, name)
    moments = replace(moments, cross=moments.xxt + 1.0)
    settings = SolverSettings(desc_act=True)
    solved = solve(weight, moments, grid, settings)
    index, diagonal = solved.group_index, moments.xxt.diagonal()
    assert index is not None and grid.group is not None
    assert index.dtype == torch.int64
    assert index.bincount().tolist() == [grid.group] * (WIDTH // grid.group)
    for group in range(len(index.bincount()) - 1):
        assert diagonal[index == group].min() >= diagonal[index == group + 1].max()
    order = torch.argsort(diagonal, descending=True)
    turned = solve(weight[:, order], in_order(moments, order), grid)
    assert torch.equal(solved.dequantize()[:, order], turned.dequantize())
    assert solved.error == turned.error
    assert solve(weight, moments, grid).group_index is None


@pytest.mark.parametrize("name", ["nf4", "q4_0"])
def test_scales_from_snap_are_kept(name: str):
    weight, moments, grid = problem(800, name)
    seen: list[torch.Tensor] = []

    def snap(scales: torch.Tensor) -> Ranges:
        seen.append(scales)
        return Ranges((scales * 1.07).half().float())

    solved = solve(weight, moments, grid, snap=snap)
    assert len(seen) == 1
    costs = unexplained(damped(moments.xxt, SolverSettings().damping).double())
    torch.testing.assert_close(seen[0], fit(weight, grid, costs.float()).scales)
    assert torch.equal(solved.scales, (seen[0] * 1.07).half().float())
    assert solved.error < 0.9 * nearest_error(weight, moments, solved.ranges, grid)


def unexplained(matrix: torch.Tensor) -> torch.Tensor:
    """Of each channel's second moment what the channels with smaller ones can't make good."""
    order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
    costs = torch.empty(len(matrix), dtype=matrix.dtype)
    for place, channel in enumerate(order):
        later = order[place + 1 :]
        cross = matrix[channel, later]
        costs[channel] = matrix[channel, channel] - cross @ torch.linalg.solve(matrix[later][:, later], cross)
    return costs


def nearest_error(weight: torch.Tensor, moments: Any, ranges: Ranges, grid: Grid) -> float:
    lost = row_losses(weight, nearest(weight, ranges, grid).dequantize(), moments.held.xxt).sum()
    return (lost / row_losses(weight, torch.zeros_like(weight), moments.held.xxt).sum()).item()


def test_damping_adds_its_share_of_the_median_diagonal():
    """The median: one massive activation does not drown the other channels."""
    xxt = moments_of(inputs(64, 100)).xxt
    xxt[0, 0] = 1e6
    want = xxt.double() + 0.05 * xxt.double().diagonal().median() * torch.eye(64, dtype=torch.float64)
    before = xxt.clone()
    torch.testing.assert_close(damped(xxt, 0.05).double(), want)
    assert torch.equal(xxt, before)


def test_where_nothing_drifted_or_none_is_wanted_the_moments_of_the_original_inputs_change_nothing():
    x, y = inputs(WIDTH, 600), inputs(WIDTH, 600, seed=1)
    weight = weights("normal", ROWS, WIDTH)
    want = solve(weight, moments_of(x), GRIDS["q4_0"]).codes
    assert torch.equal(solve(weight, moments_of(x, y=y), GRIDS["q4_0"], SolverSettings(drift=0)).codes, want)
    same = solve(weight, moments_of(x, y=x), GRIDS["q4_0"])
    assert torch.equal(same.codes, want)


def test_nothing_that_was_given_is_changed():
    weight, moments, grid = problem(300)
    x = inputs(WIDTH, 300)
    moments = replace(moments, cross=x.T @ x)
    before = [t.clone() for t in (weight, moments.xxt, moments.cross, moments.held.xxt)]
    solve(weight, moments, grid)
    solve(weight, moments, grid, SolverSettings(desc_act=True))
    for had, has in zip(before, (weight, moments.xxt, moments.cross, moments.held.xxt), strict=True):
        assert torch.equal(had, has)


def test_more_sweeps_lose_less_and_the_gptq_grids_take_half_precision_weights():
    weight, moments, _ = problem(1200)
    moments = replace(moments, held=None)
    grid = OTHER["gptq-3-asymmetric"]
    lost = [solve(weight, moments, grid, SolverSettings(sweeps=n)).error for n in (0, 1, 4)]
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.97 * lost[0]
    assert torch.isfinite(solve(weight.half(), moments, grid).dequantize()).all()
