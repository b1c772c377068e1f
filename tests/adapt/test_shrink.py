"""Students made from their teacher compute what they should, in transformers and in llama.cpp."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt.influence import LayerScores, droppable, measure_layers
from llmlite.adapt.shape import Shape, parameters, student_shape
from llmlite.adapt.shrink import Text, write_student
from llmlite.adapt.widths import Part, made_good
from llmlite.calibrate.moments import MomentSums
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.errors import InputError
from tests import gguf_models
from tests.tiny import save_tiny, tiny_model

IDS = np.random.default_rng(0).integers(0, 320, (8, 32))
TEXT = Text(IDS)
IDLE_LAYERS = (2, 3)


def saved(folder: Path, family: str, layers: int = 7, idle: bool = False, **changes) -> Checkpoint:
    """A tiny checkpoint; ``idle``: layers 2 and 3 do nothing, nor do every other FFN channel and the second head."""
    save_tiny(folder, family, num_hidden_layers=layers, **changes)
    if idle:
        model = tiny_model(family, num_hidden_layers=layers, **changes)
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                layer.mlp.down_proj.weight[:, number % 2 :: 2] = 0
                layer.self_attn.o_proj.weight[:, 32:] = 0
                if number in IDLE_LAYERS:
                    layer.mlp.down_proj.weight.zero_()
                    layer.self_attn.o_proj.weight.zero_()
        model.save_pretrained(folder)
    return open_checkpoint(folder)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(IDS[:2])).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_what_does_nothing_is_found_and_left_out_without_a_trace(family: str, tmp_path: Path):
    teacher = saved(tmp_path / "base", family, idle=True)
    scores = measure_layers(teacher, IDS, 4, tmp_path, "cpu", torch.float32)
    assert scores.drop(2) == IDLE_LAYERS
    assert all(abs(scores.influence[n]) < 1e-5 and abs(scores.divergence[n]) < 1e-5 for n in IDLE_LAYERS)
    kept = tuple(n for n in range(7) if n not in IDLE_LAYERS)
    shape = student_shape(teacher, layers=5, ffn=64, kv_heads=1)
    (tmp_path / "student").mkdir()
    cut = write_student(teacher, tmp_path / "student", kept, shape, TEXT)
    assert [part.kv_heads.tolist() for part in cut.kept] == [[0]] * 5
    torch.testing.assert_close(logits(tmp_path / "student"), logits(tmp_path / "base"), atol=1e-4, rtol=1e-4)
    student = open_checkpoint(tmp_path / "student")
    assert sum(np.prod(entry.shape) for entry in student.tensors.values()) == parameters(teacher, shape)
    assert student.config["head_dim"] == 16 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_llama_cpp_computes_a_student_as_transformers_does(name: str, tmp_path: Path, monkeypatch):
    pytest.importorskip("llama_cpp")
    kinds = ["full_attention" if layer in (1, 4) else "sliding_attention" for layer in range(5)]
    changes = {"layer_types": kinds} if name == "gemma3" else {}
    monkeypatch.setitem(gguf_models.CONFIGS, name, {**gguf_models.CONFIGS[name], **changes})
    teacher = open_checkpoint(gguf_models.save_tiny(name, tmp_path / "base", num_hidden_layers=5))
    (tmp_path / "student").mkdir()
    ids = np.random.default_rng(0).integers(0, 300, (8, 32))
    write_student(teacher, tmp_path / "student", (0, 2, 3, 4), Shape(4, 64, 1), Text(ids))
    reader = gguf_models.LlamaCpp(gguf_models.gguf_of(tmp_path / "student"))
    prompt = list(range(5, 40))
    found = reader.logits(prompt)
    reader.close()
    assert gguf_models.relative_gap(gguf_models.transformers_logits(tmp_path / "student", prompt), found) < 1e-3


def test_each_layer_keeps_its_kind_of_attention(tmp_path: Path):
    teacher = saved(tmp_path / "base", "gemma3_text")
    assert droppable(teacher) == (2, 3, 4)  # the sixth alone sees everything
    (tmp_path / "student").mkdir()
    write_student(teacher, tmp_path / "student", (0, 1, 4, 5, 6), Shape(5, 128, 2), TEXT)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert [kind.startswith("full") for kind in config["layer_types"]] == [False, False, False, True, False]
    with pytest.raises(InputError, match=r"--layers 3: .* 4 to 7 are right"):
        student_shape(teacher, layers=3)


def test_a_layer_that_changes_little_and_is_needed_stays():
    influence = (0.9, 0.2, 0.04, 0.03, 0.05, 0.06, 0.07, 0.3, 0.1, 0.9)
    divergence = {2: 0.2, 3: 1.6, 4: 0.3, 5: 0.1, 6: 0.05, 7: 0.9}
    assert LayerScores(influence, divergence).drop(2) == (2, 5)  # 6 costs least and is not among the four considered


def test_what_is_left_out_is_made_good_where_text_suffices():
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, 8, generator=chance)
    x[..., 5] = 2 * x[..., 1] - x[..., 2]
    weight = torch.randn(6, 8, generator=chance)
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])

    def part(rows: int) -> Part:
        sums = MomentSums(8, rows)
        sums.add(0, x[:rows, :16])
        return Part(weight, sums.moments())

    new, error = made_good(part(64), kept)
    assert error < 1e-3
    wanted = x @ weight.T
    assert float((x[..., kept] @ new[:, kept].T - wanted).norm() / wanted.norm()) < 0.02
    assert made_good(part(8), kept) is None  # 112 tokens for 8 channels


def test_sizes(tmp_path: Path):
    teacher = saved(tmp_path / "base", "llama", intermediate_size=384)
    whole = parameters(teacher, Shape(7, 384, 2))
    assert student_shape(teacher, share=0.85) == Shape(7, 256, 2)  # FFN channels go first
    smaller = student_shape(teacher, share=0.6)
    assert smaller.ffn == 256 and parameters(teacher, smaller) <= 0.6 * whole
    assert parameters(teacher, Shape(smaller.layers + 1, 256, 2)) > 0.6 * whole
    for share in (0.0, 0.1, 1.0):
        with pytest.raises(InputError, match="--shrink"):
            student_shape(teacher, share=share)
    with pytest.raises(InputError, match="leave out --layers"):
        student_shape(teacher, layers=6, share=0.5)
    with pytest.raises(InputError, match=r"--kv-heads 3: .* has 2"):
        student_shape(teacher, kv_heads=3)
    with pytest.raises(InputError, match=r"qwen2 .* leave out --kv-heads"):
        student_shape(saved(tmp_path / "qwen2", "qwen2"), kv_heads=1)
