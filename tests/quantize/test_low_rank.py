"""The low-rank part of an error against a dense oracle: the published formula, with square roots and inverses."""

import pytest
import torch

from llmlite.quantize.low_rank import low_rank
from tests.quantize.synthetic import inputs, weights

SHAPES = [(48, 96), (96, 48), (64, 64)]


def moments(width: int) -> torch.Tensor:
    x = inputs(width, 4 * width)
    return x.T @ x


def root_of(xxt: torch.Tensor, kind: str) -> torch.Tensor:
    """Some s with s @ s.T = xxt, float64: QERA's symmetric root, EoRA's eigenvectors, Cholesky's triangle."""
    if kind == "cholesky":
        return torch.linalg.cholesky(xxt.double())
    values, vectors = torch.linalg.eigh(xxt.double())
    scaled = vectors * values.sqrt()
    return scaled if kind == "eora" else scaled @ vectors.T


def oracle(error: torch.Tensor, rank: int, root: torch.Tensor) -> torch.Tensor:
    u, sizes, v = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (u[:, :rank] * sizes[:rank]) @ v[:rank] @ torch.linalg.inv(root)


def lost(error: torch.Tensor, product: torch.Tensor, xxt: torch.Tensor) -> float:
    rest = error.double() - product.double()
    return float(((rest @ xxt.double()) * rest).sum())


@pytest.mark.parametrize("kind", ["qera", "eora", "cholesky"])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_it_is_the_published_product_whatever_root_it_is_made_with(out, width, kind):
    error, xxt = weights("normal", out, width), moments(width)
    for rank in (1, 7, 40):
        b, a = low_rank(error, rank, xxt)
        assert b.shape == (out, rank) and a.shape == (rank, width)
        wanted = oracle(error, rank, root_of(xxt, kind))
        assert (b @ a - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_without_moments_it_is_the_truncated_svd(out, width):
    error = weights("student", out, width)
    b, a = low_rank(error, 9)
    wanted = oracle(error, 9, torch.eye(width, dtype=torch.float64))
    assert (b @ a - wanted).norm() < 1e-4 * wanted.norm()
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_no_other_product_loses_less(out, width):
    error, xxt = weights("normal", out, width), moments(width)
    b, a = low_rank(error, 8, xxt)
    best = lost(error, b @ a, xxt)
    plain_b, plain_a = low_rank(error, 8)
    assert best < 0.9 * lost(error, plain_b @ plain_a, xxt) < lost(error, torch.zeros_like(error), xxt)
    chance = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = (b + 0.02 * b.std() * torch.randn(b.shape, generator=chance)) @ (
            a + 0.02 * a.std() * torch.randn(a.shape, generator=chance)
        )
        assert lost(error, other, xxt) > best


def test_the_full_rank_gives_everything_back_and_moments_may_be_singular():
    for out, width in SHAPES:
        error, x = weights("normal", out, width), inputs(width, 10)
        b, a = low_rank(error, min(out, width), x.T @ x)
        assert lost(error, b @ a, x.T @ x) < 1e-9 * lost(error, torch.zeros_like(error), x.T @ x)
        b, a = low_rank(error, 10, x.T @ x)  # the inputs span ten dimensions
        assert lost(error, b @ a, x.T @ x) < 1e-7 * lost(error, torch.zeros_like(error), x.T @ x)
        b, a = low_rank(torch.zeros(out, width), 3, x.T @ x)
        assert not (b @ a).any() and torch.isfinite(a).all() and torch.isfinite(b).all()


def test_what_makes_no_sense_is_refused():
    error = weights("normal", 8, 16)
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank {rank} .* from 1 to 8"):
            low_rank(error, rank)
    with pytest.raises(ValueError, match="not finite"):
        low_rank(error, 2, torch.full((16, 16), torch.nan))
    error[3, 3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        low_rank(error, 2)
