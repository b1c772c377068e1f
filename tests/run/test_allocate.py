import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD
from llmlite.errors import InputError
from llmlite.plan.correct import CorrectionSettings
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Grid
from llmlite.run import allocate as room
from llmlite.run.allocate import AllocateSettings, Allocation, Offer, allocate, allocated_names, role_of
from tests.tiny import save_tiny

BITS = {"two": 2, "three": 3, "four": 4, "six": 6}
IDS = np.random.default_rng(0).integers(0, 320, (12, 32))
FEW = AllocateSettings(measure_rows=4, correction=CorrectionSettings(trials=6))


def offer(checkpoint: Checkpoint) -> Offer:
    def size(name: str, kind: str) -> int:
        rows, width = checkpoint.tensors[name].shape
        return rows * width * BITS[kind] // 8 + rows * width // 32 * 2

    def rounded(name: str, kind: str, _importance: torch.Tensor | None = None) -> torch.Tensor:
        return round_to_nearest(checkpoint.read(name), None, Grid(BITS[kind], 32)).dequantize()

    return Offer(lambda name: list(BITS), size, rounded)


def divergence(checkpoint: Checkpoint, types: dict[str, str], ids: np.ndarray) -> float:
    """By loading the model twice and rounding the second."""
    whole, changed = (AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32) for _ in range(2))
    given = offer(checkpoint)
    with torch.no_grad():
        for name, kind in types.items():
            changed.get_parameter(name).copy_(given.rounder(name, kind))
        p, q = (torch.log_softmax(m(input_ids=torch.from_numpy(ids)).logits.double(), -1) for m in (whole, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("qwen2", False)], ids=str)
def done(request, tmp_path_factory) -> tuple[Checkpoint, int, Allocation]:
    family, tied = request.param
    checkpoint = open_checkpoint(save_tiny(tmp_path_factory.mktemp("model"), family, tie_word_embeddings=tied))
    given = offer(checkpoint)
    budget = sum(given.nbytes(name, "four") for name in allocated_names(checkpoint)) * 9 // 10
    return checkpoint, budget, allocate(checkpoint, budget, given, IDS, FEW)


def test_every_weight_has_a_type_and_the_bytes_keep_to_the_budget(done):
    checkpoint, budget, found = done
    names = [n for n, entry in checkpoint.tensors.items() if len(entry.shape) == 2]
    assert sorted(found.types) == sorted(names)
    assert list(found.types) == [row.name for row in found.rows] == allocated_names(checkpoint)
    given = offer(checkpoint)
    assert all(
        row.bytes == given.nbytes(row.name, row.type) and row.type == found.types[row.name] for row in found.rows
    )
    assert 0.97 * budget < sum(row.bytes for row in found.rows) == found.bytes <= budget


def test_what_is_told_as_measured_is_what_the_model_loses(done):
    checkpoint, budget, found = done
    assert found.fitted == pytest.approx(divergence(checkpoint, found.types, IDS[:4]), rel=1e-3)
    assert found.measured == pytest.approx(divergence(checkpoint, found.types, IDS[4:8]), rel=1e-3)
    assert found.fitted == min(run.measured for run in found.runs if run.bytes <= budget)


def test_the_choice_loses_less_than_one_type_for_all_and_than_chance(done):
    checkpoint, budget, found = done
    given = offer(checkpoint)
    names = allocated_names(checkpoint)
    uniform = divergence(checkpoint, dict.fromkeys(names, "three"), IDS[4:8])
    assert found.measured < 0.8 * uniform
    chance = np.random.default_rng(1)
    others: list[float] = []
    while len(others) < 10:
        types = {name: str(chance.choice(list(BITS))) for name in names}
        if 0.9 * budget < sum(given.nbytes(n, t) for n, t in types.items()) <= budget:
            others.append(divergence(checkpoint, types, IDS[4:8]))
    assert found.measured < 0.8 * min(others)


def test_the_manifest_part_is_json(done):
    _, _, found = done
    saved = json.loads(json.dumps(found.to_json()))
    assert saved["types"] == found.types
    assert [row["name"] for row in saved["rows"]] == list(found.types)
    assert len(saved["runs"]) == len(found.runs)
    assert "types" not in saved["runs"][0]


def test_roles():
    assert role_of("model.layers.12.mlp.down_proj.weight") == "mlp.down_proj"
    assert (role_of(EMBEDDING), role_of(HEAD)) == ("embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("model")))


def test_too_small_a_budget_is_refused_before_any_work(checkpoint, monkeypatch):
    monkeypatch.setattr(room, "_load", None)
    given = offer(checkpoint)
    least = sum(given.nbytes(name, "two") for name in allocated_names(checkpoint))
    with pytest.raises(InputError, match=f"{least:,} bytes"):
        allocate(checkpoint, least - 1, given, IDS, FEW)


def test_a_model_that_does_not_fit_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match="whole model"):
        allocate(checkpoint, 10**9, offer(checkpoint), IDS, FEW)


def test_a_text_with_too_few_rows_is_refused(checkpoint):
    with pytest.raises(InputError, match="3 rows"):
        allocate(checkpoint, 10**9, offer(checkpoint), IDS[:3], FEW)


def test_a_text_without_rows_to_judge_by_is_told(checkpoint, capsys):
    assert allocate(checkpoint, 10**9, offer(checkpoint), IDS[:4], FEW).measured is None
    assert "no rows left" in capsys.readouterr().err


def test_a_tensor_without_types_is_refused(checkpoint):
    given = offer(checkpoint)
    nothing = Offer(lambda name: [] if "down_proj" in name else list(BITS), given.nbytes, given.rounder)
    with pytest.raises(InputError, match="down_proj"):
        allocate(checkpoint, 10**9, nothing, IDS, FEW)
