import numpy as np
import pytest
import torch

from llmlite.calibrate.moments import collect_moments
from llmlite.calibrate.stream import Activations, LayerStream
from llmlite.checkpoint.checkpoint import open_checkpoint
from tests.tiny import FAMILIES, save_tiny, tiny_model

ROWS, LENGTH = 5, 48  # longer than the tiny gemma's window of 32


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_gives_the_models_own_hidden_states_and_moments(tmp_path, family):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family))
    ids = np.random.default_rng(0).integers(0, 320, (ROWS, LENGTH))
    model = tiny_model(family)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        want = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states

    stream = LayerStream(checkpoint)
    inputs = stream.embed(ids, tmp_path / "a0", batch=2)
    for number in range(checkpoint.num_layers):
        torch.testing.assert_close(inputs.read(0, ROWS), want[number], rtol=1e-4, atol=1e-4)
        outputs = Activations(tmp_path / f"a{number + 1}", inputs.shape)
        with stream.layer(number) as module, collect_moments(module, checkpoint.family) as moments:
            done = 0
            for part in stream.run(number, module, inputs, batch=2):
                outputs.write(done, part)
                done += len(part)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            x = seen[f"model.layers.{number}.{name}"]
            torch.testing.assert_close(moments[name].xxt, x.T @ x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moments[name].absmax, x.abs().amax(0), rtol=1e-3, atol=1e-4)
            assert moments[name].count == ROWS * LENGTH
        assert moments["self_attn.q_proj"] is moments["self_attn.v_proj"]
        assert all(weight.is_meta for weight in module.parameters())
        inputs = outputs


def test_activations_keep_what_is_written(tmp_path):
    kept = Activations(tmp_path / "x", (5, 3, 4))
    want = torch.randn(5, 3, 4)
    kept.write(2, want[2:])
    kept.write(0, want[:2])
    assert torch.equal(kept.read(0, 5), want)
    assert torch.equal(kept.read(4, 3), want[4:])
    kept.remove()
    assert not (tmp_path / "x").exists()
