from typing import Any

import numpy as np
import pytest
import torch

from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import open_checkpoint
from tests.tiny import FAMILIES, save_tiny, tiny_model

ROWS, LENGTH = 5, 48  # longer than the tiny gemma's window of 32


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_gives_the_models_own_hidden_states(tmp_path, family):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family))
    ids = np.random.default_rng(0).integers(0, 320, (ROWS, LENGTH))
    with torch.no_grad():
        want = tiny_model(family)(torch.from_numpy(ids), output_hidden_states=True).hidden_states

    stream = LayerStream(checkpoint)
    inputs = stream.embed(ids, tmp_path / "a0", batch=2)
    for number in range(checkpoint.num_layers):
        torch.testing.assert_close(inputs.read(0, ROWS), want[number], rtol=1e-4, atol=1e-4)
        outputs = Activations(tmp_path / f"a{number + 1}", inputs.shape)
        with stream.layer(number) as module:
            for start in range(0, ROWS, 2):
                outputs.write(start, stream.forward(number, module, inputs.read(start, 2)))
        assert all(weight.is_meta for weight in module.parameters())
        inputs = outputs
    final = tiny_model(family).model.norm
    torch.testing.assert_close(final(inputs.read(0, ROWS)), want[-1], rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_layer_has_weights_of_its_own(tmp_path):
    stream = LayerStream(open_checkpoint(save_tiny(tmp_path / "model")))
    module: Any
    copy: Any
    again: Any
    with stream.layer(1) as module, stream.layer(1, copy=True) as copy:
        had = copy.mlp.up_proj.weight.clone()
        assert torch.equal(module.mlp.up_proj.weight, had)
        module.mlp.up_proj.weight.data.zero_()
        assert torch.equal(copy.mlp.up_proj.weight, had)
    with stream.layer(1) as again:
        assert torch.equal(again.mlp.up_proj.weight, had)


def test_activations_keep_what_is_written(tmp_path):
    kept = Activations(tmp_path / "x", (5, 3, 4))
    want = torch.randn(5, 3, 4)
    kept.write(2, want[2:])
    kept.write(0, want[:2])
    assert torch.equal(kept.read(0, 5), want)
    assert torch.equal(kept.read(4, 3), want[4:])
    kept.remove()
    assert not (tmp_path / "x").exists()
