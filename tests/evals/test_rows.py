"""What rows of log-probabilities lose when they are normalized, compared and kept as codes."""

import math

import numpy as np
import pytest
import torch

from llmlite.evals.divergence import compare_rows
from llmlite.evals.kept import decode, encode
from llmlite.evals.rows import best_token, log_softmax


def random_rows(rows, vocab, spread=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(rows, vocab, generator=generator).double() * spread, dim=-1).float()


@pytest.mark.parametrize("target", [1e-4, 1e-3, 1e-1])
def test_codes_change_a_mean_kl_by_less_than_a_tenth_of_a_percent_and_a_position_by_one(target):
    p = random_rows(64, 49_152)
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    q = log_softmax(p + noise * math.sqrt(2 * target))
    back = decode(*encode(p))

    def kl(base):
        return compare_rows(base, q, torch.zeros(len(q), dtype=torch.int64), q.shape[-1]).kl

    exact = (p.double().exp() * (p.double() - q.double())).sum(-1).numpy()
    assert exact.mean() == pytest.approx(target, rel=0.5), "the test must be about this divergence"
    assert kl(back).mean() == pytest.approx(exact.mean(), rel=1e-3, abs=1e-7)
    assert np.abs(kl(back) - exact).max() < 0.01 * target + 1e-6
    assert kl(p) == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_codes_add_less_than_1e_6_to_two_equal_models_and_keep_the_best_token():
    p = random_rows(64, 49_152)
    back = decode(*encode(p))
    floor = (p.double().exp() * (p.double() - back.double())).sum(-1)
    assert float(floor.abs().max()) < 1e-6
    assert torch.equal(back.argmax(-1), p.argmax(-1))
    torch.testing.assert_close(back.exp().sum(-1), torch.ones(64), rtol=0, atol=1e-5)
    likely = p > math.log(0.01)
    assert float((back - p)[likely].abs().max()) < 3e-4


def test_codes_of_certain_and_of_impossible_tokens_stay_finite():
    rows = torch.full((2, 8), -math.inf)
    rows[0, 3] = 0.0
    rows[1, :4] = math.log(0.25)
    back = decode(*encode(rows))
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back.exp(), rows.exp(), rtol=1e-5, atol=1e-12)
    flat = torch.full((1, 8), math.log(1 / 8))
    torch.testing.assert_close(decode(*encode(flat)), flat)


@pytest.mark.parametrize("vocab", [8, 256, 400, 49_152])
def test_rows_are_normalized_and_their_best_token_found(vocab):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(2)) * 5
    logits[3, vocab - 1] = logits[4, 0] = logits[4, 5] = 60.0
    rows = log_softmax(logits)
    assert float(rows.double().exp().sum(-1).log().abs().max()) < 2e-6
    torch.testing.assert_close(rows, torch.log_softmax(logits.double(), -1).float(), rtol=1e-6, atol=2e-6)
    value, token = best_token(rows)
    assert torch.equal(token, rows.argmax(-1))
    assert torch.equal(value, rows.amax(-1))


def test_rows_of_impossible_tokens_are_compared():
    p = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    q = torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    found = compare_rows(p, q, torch.tensor([0]), 3)
    assert found.kl[0] == pytest.approx(0.5 * math.log(2))
