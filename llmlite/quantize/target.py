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
    ``share``: how much of it is applied, 0 to 1. ``matrix`` float32 [in, in] is the damped X.
    """
    assert moments.cross is not None
    pulls = [weight @ (moments.cross - moments.xxt)]
    if moments.residual is not None:
        pulls.append(moments.residual)
    held = moments.held
    if held is None or held.cross is None:
        ways = _ways(pulls, _with_ridge(matrix, moments, UNJUDGED_RIDGE))
        return weight + share * UNJUDGED_SHARE * sum(ways)
    goal = weight @ (held.cross - held.xxt)
    if held.residual is not None:
        goal += held.residual
    best, change = 0.0, torch.zeros_like(weight)
    for ridge in RIDGES:
        ways = _ways(pulls, _with_ridge(matrix, moments, ridge))
        gain, shares = _judged(ways, goal, held.xxt)
        if gain > best:
            best = gain
            change = sum((part * way for part, way in zip(shares, ways, strict=True)), torch.zeros_like(weight))
    return weight + share * change


def _with_ridge(matrix: torch.Tensor, moments: Moments, ridge: float) -> torch.Tensor:
    out = matrix.clone()
    out.diagonal().add_(ridge * moments.xxt.diagonal().median())
    return out


def _ways(pulls: list[torch.Tensor], matrix: torch.Tensor) -> list[torch.Tensor]:
    try:
        lower = torch.linalg.cholesky(matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the second moments are not positive definite: {error}") from None
    return [torch.cholesky_solve(pull.T, lower).T for pull in pulls]


def _judged(ways: list[torch.Tensor], goal: torch.Tensor, xxt: torch.Tensor) -> tuple[float, list[float]]:
    """How much the best shares of the ways, each from 0 to 1, lower the squared error on these moments; the shares."""
    bent = [way @ xxt for way in ways]
    square = torch.tensor([[float((a * way).sum()) for way in ways] for a in bent], dtype=torch.float64)
    match = torch.tensor([float((goal * way).sum()) for way in ways], dtype=torch.float64)
    tiny = 1e-6 * square.diagonal().mean() + torch.finfo(torch.float64).tiny
    shares = torch.linalg.solve(square + tiny * torch.eye(len(ways), dtype=torch.float64), match).clamp(0, 1)
    return float(2 * shares @ match - shares @ square @ shares), shares.tolist()
