"""What left-out layers did is taken over where it can be, and nothing else in the student is touched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt.reconstruct import reconstruct
from llmlite.adapt.shape import Shape
from llmlite.adapt.shrink import Text, write_student
from llmlite.calibrate.moments import HELD_EVERY
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests.tiny import save_tiny, tiny_model

IDS = np.random.default_rng(0).integers(0, 320, (32, 32))
DOWN = "model.layers.1.mlp.down_proj.weight"


def saved(folder: Path, family: str, *, repeats: bool = False) -> Checkpoint:
    """Five layers; ``repeats``: layer 2 puts out another linear map of the FFN channels that layer 1 has."""
    save_tiny(folder, family, num_hidden_layers=5)
    if repeats:
        model = tiny_model(family, num_hidden_layers=5)
        first, second = model.model.layers[1:3]
        with torch.no_grad():
            for layer in (first, second):
                layer.self_attn.o_proj.weight.zero_()
            first.mlp.down_proj.weight.mul_(1e-3)
            second.load_state_dict({**first.state_dict(), "mlp.down_proj.weight": second.mlp.down_proj.weight.clone()})
        model.save_pretrained(folder)
    return open_checkpoint(folder)


def student_of(teacher: Checkpoint, folder: Path, layers: tuple[int, ...], ffn: int = 128) -> Path:
    folder.mkdir()
    write_student(teacher, folder, layers, Shape(len(layers), ffn, 2), Text(IDS))
    return folder


def states(folder: Path, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(ids), output_hidden_states=True).hidden_states


def distance(theirs: torch.Tensor, mine: torch.Tensor) -> float:
    """Squares of what is missing, each token's by its own length."""
    return float(((theirs - mine) / theirs.norm(dim=-1, keepdim=True)).square().sum())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_linear_in_the_channels_that_stay_is_taken_over_whole(family: str, tmp_path: Path):
    teacher = saved(tmp_path / "base", family, repeats=True)
    folder = student_of(teacher, tmp_path / "student", (0, 1, 3, 4))
    left = reconstruct(teacher, folder, (0, 1, 3, 4), Text(IDS))
    assert left[1] < 1e-3
    whole = open_checkpoint(tmp_path / "base").read("model.layers.2.mlp.down_proj.weight")
    assert float((open_checkpoint(folder).read(DOWN) - whole).norm() / whole.norm()) < 0.1
    other = np.random.default_rng(1).integers(0, 320, (2, 32))
    theirs, mine = (states(path, other) for path in (tmp_path / "base", folder))
    assert distance(theirs[3], mine[2]) < 1e-3 * distance(theirs[3], theirs[1])


@pytest.mark.parametrize("ffn", [128, 64])
def test_what_is_said_to_be_left_is_left_on_rows_that_fitted_nothing(ffn: int, tmp_path: Path):
    teacher, layers = saved(tmp_path / "base", "llama"), (0, 1, 3, 4)
    folder = student_of(teacher, tmp_path / "student", layers, ffn)
    held = IDS[HELD_EVERY - 1 :: HELD_EVERY]
    theirs, before = (states(path, held) for path in (tmp_path / "base", folder))
    left = reconstruct(teacher, folder, layers, Text(IDS))
    after = states(folder, held)
    assert (
        list(left) == [1, 3] and left[1] < 0.98
    )  # the layers before and behind what is gone, by the teacher's numbers
    assert left[1] == pytest.approx(distance(theirs[3], after[2]) / distance(theirs[3], before[2]), rel=1e-3)
    assert distance(theirs[4], after[3]) < distance(theirs[4], before[3])


def test_nothing_else_is_touched(tmp_path: Path):
    teacher, layers = saved(tmp_path / "base", "llama"), (0, 1, 3, 4)
    folder = student_of(teacher, tmp_path / "student", layers)
    before = {name: open_checkpoint(folder).read(name) for name in open_checkpoint(folder).tensors}
    files = sorted(file.name for file in folder.iterdir())
    reconstruct(teacher, folder, layers, Text(IDS))
    after = open_checkpoint(folder)
    changed = {name for name, value in before.items() if not torch.equal(value, after.read(name))}
    assert changed == {DOWN, DOWN.replace("1", "2")} and list(after.tensors) == list(before)
    assert sorted(file.name for file in folder.iterdir()) == files


@pytest.mark.parametrize(
    ("family", "layers", "rows"),
    [("gemma3_text", (0, 1, 3, 4), 32), ("llama", (0, 1, 2, 3, 4), 32), ("llama", (0, 1, 3, 4), HELD_EVERY - 1)],
)
def test_a_student_stays_as_it_is(family: str, layers: tuple[int, ...], rows: int, tmp_path: Path):
    """A norm stands behind the projection; no layer is missing; no row can judge."""
    teacher = saved(tmp_path / "base", family)
    folder = student_of(teacher, tmp_path / "student", layers)
    before = (folder / "model.safetensors").read_bytes()
    assert reconstruct(teacher, folder, layers, Text(IDS[:rows])) == {}
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_layer_that_did_nothing_leaves_nothing_to_take_over(tmp_path: Path):
    """The layer that is gone did nothing."""
    model = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad():
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            model.model.layers[2].get_submodule(name).weight.zero_()
    save_tiny(tmp_path / "base", "llama", num_hidden_layers=5)
    model.save_pretrained(tmp_path / "base")
    teacher = open_checkpoint(tmp_path / "base")
    folder = student_of(teacher, tmp_path / "student", (0, 1, 3, 4))
    before = (folder / "model.safetensors").read_bytes()
    assert reconstruct(teacher, folder, (0, 1, 3, 4), Text(IDS)) == {}
    assert (folder / "model.safetensors").read_bytes() == before
