from typing import Any

import numpy as np
import pytest
import torch

from llmlite.calibrate.stages import StagedLayer
from llmlite.calibrate.stream import LayerStream
from llmlite.checkpoint.checkpoint import open_checkpoint
from tests.tiny import FAMILIES, save_tiny, tiny_model

ROWS, LENGTH, BATCH = 5, 48, 2  # longer than the tiny gemma's window of 32; the last batch has one row


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, (ROWS, LENGTH))


def watched(model, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What each linear layer of the whole model takes in, and what each decoder layer takes in (in) and gives (out)."""
    seen: dict[str, torch.Tensor] = {}

    def taken(name: str):
        return lambda _module, args: seen.update({name: args[0].clone()})

    def given(name: str):
        return lambda _module, _args, out: seen.update({name: (out[0] if isinstance(out, tuple) else out).clone()})

    handles = []
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(taken(name)))
    for number, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_hook(given(f"layers.{number}.out")))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for handle in handles:
        handle.remove()
    return seen


def all_inputs(staged: StagedLayer, stage: int) -> torch.Tensor:
    return torch.cat([staged.inputs(stage, start, BATCH) for start in range(0, ROWS, BATCH)])


def all_outputs(staged: StagedLayer) -> torch.Tensor:
    return torch.cat([staged.outputs(start, BATCH) for start in range(0, ROWS, BATCH)])


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def changed(weight: torch.Tensor) -> torch.Tensor:
    """The weight with each value on a coarse grid, far from where it was."""
    step = 0.7 * weight.abs().max()
    return (weight / step).round() * step


def run(tmp_path, family: str, ids: np.ndarray, change: bool) -> None:
    """Every layer stage by stage beside a copy of the unchanged network, each held against a whole model."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family))
    original, model = tiny_model(family), tiny_model(family)
    ideal = watched(original, ids)
    stream = LayerStream(checkpoint)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    hidden = {name: stream.embed(ids, scratch / name, BATCH) for name in ("now", "copy")}
    for number in range(checkpoint.num_layers):
        where = f"layers.{number}"
        with stream.layer(number) as module, stream.layer(number, copy=True) as copy:
            now = StagedLayer(stream, number, module, hidden["now"], scratch / "a")
            other = StagedLayer(stream, number, copy, hidden["copy"], scratch / "b", fixed=True)
            for stage, names in enumerate(checkpoint.family.stages):
                want = watched(model, ids)  # with all that was changed before this stage
                x, y = all_inputs(now, stage), all_inputs(other, stage)
                assert x.shape == (ROWS, LENGTH, now.linear(stage).in_features)
                for name in names:
                    close(x, want[f"{where}.{name}"])
                    close(y, ideal[f"{where}.{name}"])
                for name in names if change else ():
                    weight: Any = module.get_submodule(name).weight
                    weight.data.copy_(changed(weight.data))
                    theirs = model.model.layers[number].get_submodule(name).weight
                    theirs.data.copy_(changed(theirs.data))
            after, untouched = all_outputs(now), all_outputs(other)
            close(after, watched(model, ids)[f"{where}.out"])
            close(untouched, ideal[f"{where}.out"])
            if change:
                assert (after - untouched).abs().max() > 0.1
            hidden["now"].write(0, after)
            hidden["copy"].write(0, untouched)
            now.close()
            other.close()
            assert sorted(file.name for file in scratch.iterdir()) == ["copy", "now"]
            close(stream.forward(number, copy, original_input(original, ids, number)), ideal[f"{where}.out"])
        for part in (module, copy):
            assert all(weight.is_meta for weight in part.parameters())


def original_input(model, ids: np.ndarray, number: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[number]


def test_inputs_and_outputs_are_the_whole_models(tmp_path, family: str, ids: np.ndarray):
    run(tmp_path, family, ids, change=False)


def test_later_stages_and_layers_see_changed_weights_and_the_copy_does_not(tmp_path, family: str, ids: np.ndarray):
    run(tmp_path, family, ids, change=True)


def test_a_closed_part_runs_no_more(tmp_path, ids: np.ndarray):
    """Attention runs for its own two stages only: after them its output is the projection of what was kept."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", "llama"))
    stream = LayerStream(checkpoint)
    hidden = stream.embed(ids, tmp_path / "hidden", BATCH)
    calls: list[int] = []
    module: Any
    with stream.layer(0) as module:
        staged = StagedLayer(stream, 0, module, hidden, tmp_path / "a")
        module.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        for stage, so_far in enumerate([0, 3, 3, 3]):
            all_inputs(staged, stage)
            assert len(calls) == so_far
        all_outputs(staged)
        assert len(calls) == 3
        staged.close()
        assert "forward" not in module.self_attn.__dict__
        stream.forward(0, module, hidden.read(0, BATCH))
        assert len(calls) == 4


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_the_whole_models_where_a_stage_adds_to_it(
    tmp_path, family: str, fixed: bool, ids: np.ndarray
):
    """Before the attention's output it is what entered the layer, before the feed-forward's what its norm takes in."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family))
    model, stream = tiny_model(family), LayerStream(checkpoint)
    want: dict[int, torch.Tensor] = {}
    layer: Any = model.model.layers[0]
    layer.input_layernorm.register_forward_pre_hook(lambda _, args: want.update({1: args[0].clone()}))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: want.update({3: args[0].clone()}))
    layer.register_forward_hook(lambda _, _args, out: want.update({5: out[0] if isinstance(out, tuple) else out}))
    hidden = stream.embed(ids, tmp_path / "hidden", BATCH)
    with stream.layer(0) as module:
        staged = StagedLayer(stream, 0, module, hidden, tmp_path / "a", fixed=fixed)
        model(torch.from_numpy(ids))
        for stage in range(4):
            all_inputs(staged, stage)
            if family == "gemma3_text" or stage in (0, 2):
                assert staged.residual(stage, 0, BATCH) is None
            else:
                starts = range(0, ROWS, BATCH)
                parts: list[Any] = [staged.residual(stage, start, BATCH) for start in starts]
                close(torch.cat(parts), want[stage].detach())
                parts = [part + staged.adds(stage, start, BATCH) for part, start in zip(parts, starts, strict=True)]
                close(torch.cat(parts), want[stage + 2].detach())
        staged.close()
    assert torch.equal(hidden.read(0, ROWS), stream.embed(ids, tmp_path / "again", BATCH).read(0, ROWS))
