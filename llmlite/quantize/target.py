"""The weight to round: one that makes good what the layers before it lost when they were rounded."""

from __future__ import annotations

import torch

from llmlite.quantize.types import Moments

RIDGES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # added to the diagonal, as shares of its median; judged on held-out tokens
UNJUDGED_RIDGE, UNJUDGED_SHARE = 1.0, 0.3  # where no tokens were held out


def corrected(weight: torch.Tensor, moments: Moments, matrix: torch.Tensor, share: float) -> torch.Tensor:
    """The weight [out, in] whose output on the inputs as they are now comes closest to what it should be: float32.

    Should be: W y, y the unquantized network's inputs (GPTAQ, arXiv:2504.02692; Qronos, 2505.11695), and, where the
    output is added to the residual stream, also what that stream has lost. Least squares on the calibration tokens fits
    their noise as well, so the correction is W + a W (C - X) inv(M) + b R inv(M), X = sum of x xT, C of y xT and R of
    r xT, M the damped X with a ridge; a and b, from 0 to 1, and the ridge are those that do best on held-out tokens.
    ``share``: how much of it is applied, 0 to 1. ``matrix`` float32 [in, in] is the damped X; ValueError if it
    is not positive definite.
    """
    assert moments.cross is not None
    values, basis = torch.linalg.eigh(matrix)  # a ridge only adds to these values
    if values[0] <= 0:
        raise ValueError("the second moments are not positive definite")
    usual = moments.xxt.diagonal().median()
    pulls = [weight @ ((moments.cross - moments.xxt) @ basis)]
    if moments.residual is not None:
        pulls.append(moments.residual @ basis)
    held = moments.held
    if held is None or held.cross is None:
        change = UNJUDGED_SHARE * sum(pulls) / (values + UNJUDGED_RIDGE * usual)
        return weight + share * (change @ basis.T)
    goal = weight @ ((held.cross - held.xxt) @ basis)
    if held.residual is not None:
        goal += held.residual @ basis
    judge = _Judge(pulls, goal, basis.T @ held.xxt @ basis)
    best, change = 0.0, torch.zeros_like(weight)
    for ridge in RIDGES:
        inverse = 1 / (values + ridge * usual)
        gain, shares = judge(inverse)
        if gain > best:
            best = gain
            change = sum(part * pull for part, pull in zip(shares, pulls, strict=True)) * inverse
    return weight + share * (change @ basis.T)


class _Judge:
    """How much the best shares, 0 to 1, of the ways pull * inverse lower the squared error on held-out tokens.

    ``pulls`` and ``goal`` float32 [out, in], ``xxt`` float32 [in, in] the held-out moments, all in the same basis.
    tr(A D X D BT) of a diagonal D is a sum over X * (AT B), which no ridge changes: that is computed once.
    """

    def __init__(self, pulls: list[torch.Tensor], goal: torch.Tensor, xxt: torch.Tensor):
        self._pairs = [[xxt * (a.T @ b) for b in pulls] for a in pulls]
        self._goals = [(goal * pull).sum(0) for pull in pulls]

    def __call__(self, inverse: torch.Tensor) -> tuple[float, list[float]]:
        """The gain with the ridge that ``inverse`` float32 [in] has in it, and the shares."""
        square = torch.tensor(
            [[float(inverse @ (p @ inverse)) for p in row] for row in self._pairs], dtype=torch.float64
        )
        match = torch.tensor([float(goal @ inverse) for goal in self._goals], dtype=torch.float64)
        tiny = 1e-6 * square.diagonal().mean() + torch.finfo(torch.float64).tiny
        shares = torch.linalg.solve(square + tiny * torch.eye(len(match), dtype=torch.float64), match).clamp(0, 1)
        return float(2 * shares @ match - shares @ square @ shares), shares.tolist()
