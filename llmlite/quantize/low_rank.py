"""The low-rank part of a rounding error: the product of rank r that gives back most of what a layer's output lost.

QERA-exact (Zhang et al. 2024, arXiv:2410.06040, theorem 1) minimizes tr((E - L) H (E - L)T) over the products L of
rank r, H the second moments of the layer's inputs: the best rank-r approximation of E S, times the inverse of S, for
any S with S ST = H. EoRA (Liu et al. 2024, arXiv:2410.21271) takes for S the eigenvectors of H times the roots of its
eigenvalues, where QERA has the symmetric root; the two differ by a rotation, so that L is the same.

No inverse is needed for it. With U the r leading left singular vectors of E S, U UT (E S) inv(S) = U UT E: the error is
projected on those outputs in which it is largest. LoftQ's step (Li et al. 2023, arXiv:2310.08659, algorithm 1) is the
same with H the identity.
"""

from __future__ import annotations

import torch


def low_rank(error: torch.Tensor, rank: int, xxt: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """b [out, rank] and a [rank, in], float32, whose product b @ a lies nearest to ``error`` [out, in].

    Nearest by the second moments ``xxt`` [in, in] of the inputs, or with equal weight for every channel without them.
    Row i of a is as long as column i of b. ValueError unless rank is from 1 to min(out, in), and for NaN and
    infinite values.
    """
    out, width = error.shape
    if not 1 <= rank <= min(out, width):
        raise ValueError(f"rank {rank} of a weight [{out}, {width}]: from 1 to {min(out, width)} is right")
    exact = error.double()
    if not torch.isfinite(exact).all() or (xxt is not None and not torch.isfinite(xxt).all()):
        raise ValueError("the error or the second moments of its inputs are not finite")
    leading = _leading_outputs(exact, rank, None if xxt is None else xxt.double())
    a = leading.T @ exact
    length = a.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return (leading * length).float(), (a / length[:, None]).float()


def _leading_outputs(error: torch.Tensor, rank: int, xxt: torch.Tensor | None) -> torch.Tensor:
    """Orthonormal directions [out, rank] in which the error on the inputs is largest: the smaller of two problems."""
    out, width = error.shape
    if out <= width:
        weighted = error if xxt is None else error @ xxt
        return torch.linalg.eigh(weighted @ error.T).eigenvectors[:, -rank:].flip(1)
    if xxt is not None:
        values, vectors = torch.linalg.eigh(xxt)
        error = error @ (vectors * values.clamp(min=0).sqrt())
    right = torch.linalg.eigh(error.T @ error).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(error @ right).Q
