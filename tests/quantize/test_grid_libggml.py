"""The importance-weighted fit, held against what libggml finds with the same importance matrix."""

import pytest
import torch

from llmlite.formats.gguf.types import pack, unpack
from llmlite.quantize.rtn import round_to_nearest
from tests.formats.test_gguf_types import Ggml
from tests.quantize.synthetic import GGUF, weights

ROWS, WIDTH = 16, 1024


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.mark.parametrize("kind", ["normal", "student", "positive"])
@pytest.mark.parametrize("name", GGUF)
def test_the_weighted_error_is_no_worse_than_libggmls(name: str, kind: str, ggml: Ggml):
    weight, importance = (
        weights(kind, ROWS, WIDTH),
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)).exp(),
    )

    def lost(values: torch.Tensor) -> float:
        return ((values - weight).double().square() * importance).sum().item()

    mine = unpack(pack(round_to_nearest(weight, None, GGUF[name], importance), name), name, (ROWS, WIDTH))
    theirs = unpack(ggml.quantize(weight, name, importance), name, (ROWS, WIDTH))
    assert lost(mine) <= 1.02 * lost(theirs)
