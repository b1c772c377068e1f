import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt.repair import RepairSettings, repair
from llmlite.adapt.stored import open_safetensors, put_in_place, rewritten
from llmlite.adapt.student import Student
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError, OutsideError
from llmlite.plan.plan import stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.quantize.types import Rounded
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.tiny import save_tiny

ROWS = Rows(np.random.default_rng(0).integers(0, 320, (64, 32)), ())
HELD = torch.from_numpy(ROWS.ids[7::8])
SHORT = RepairSettings(steps=24, batch_rows=4, rate=1e-2, judge_every=6, held_rows=8)
TARGETS = ("gptq:w2g32", "gptq:w3g32", "gptq:w4-asym", "gptq:w8g64", "compressed-tensors:w4a16g32",
           "compressed-tensors:w4a16g32-asym", "compressed-tensors:w8a16", "bnb:nf4")  # fmt: skip


def made(folder: Path, target: str, desc_act: bool = False, family: str = "llama"):
    """A checkpoint, an artifact of it rounded to nearest, and the artifact's stored weights."""
    checkpoint = open_checkpoint(save_tiny(folder / "base", family))
    out = folder / "out"
    solver = "feedback" if desc_act else "rtn"
    calibration = folder / "ids.npy"
    np.save(calibration, ROWS.ids)
    text = {"calibration": (str(calibration),), "row_length": 32, "calibration_tokens": 2048} if desc_act else {}
    quantize(checkpoint.source, out, QuantizeSettings(to=target, solver=solver, desc_act=desc_act, **text))
    return checkpoint, out, stored_of(checkpoint, out, target, desc_act)


def stored_of(checkpoint: Checkpoint, out: Path, target: str, desc_act: bool = False):
    parsed = parse_target(target)
    return open_safetensors(checkpoint, out, type_table(parsed, stored_dtype(checkpoint, parsed), desc_act))


def bytes_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in read_index(out).items()}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_read_and_written_again_is_the_same_file(tmp_path, target):
    _, out, stored = made(tmp_path, target)
    before = (out / "model.safetensors").read_bytes()
    values = {name: stored.read(name) for name in stored.names()}
    assert sum(isinstance(value, Rounded) for value in values.values()) == 14
    if target == "bnb:nf4":  # its scales are rounded once more, all of a tensor together
        values = {name: value for name, value in values.items() if not isinstance(value, Rounded)}
    stored.rewrite(values)
    assert rewritten(out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("target", [*TARGETS, "gptq:w4g32 in activation order"])
def test_a_student_computes_what_a_reader_of_the_file_multiplies_out(tmp_path, target):
    target, _, order = target.partition(" ")
    checkpoint, out, stored = made(tmp_path, target, bool(order))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    form, grid = stored.types.format, stored.types.grid
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = stored.read(name)
            parameter.copy_(value.dequantize() if isinstance(value, Rounded) else value)
            if isinstance(value, Rounded) and grid is not None:
                seen = form.unpack(name.removesuffix(".weight"), bytes_of(out), grid)
                torch.testing.assert_close(value.dequantize(), seen, rtol=5e-3, atol=1e-4)  # a product in 16 bits
        want, got = model.model(HELD).last_hidden_state, Student(checkpoint, stored).hidden(HELD)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["gptq:w2g32", "gptq:w3g32", "compressed-tensors:w4a16g32-asym", "bnb:nf4"])
def test_repair_brings_the_artifact_nearer_and_changes_no_code(tmp_path, target):
    checkpoint, out, stored = made(tmp_path, target)
    size, before = (out / "model.safetensors").stat().st_size, bytes_of(out)
    told = repair(checkpoint, stored, ROWS.ids, SHORT, tmp_path)
    after = bytes_of(out)
    assert told.note is None and told.after < 0.99 * told.before
    assert (out / "model.safetensors").stat().st_size == size
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = (
        "scales",
        "weight_scale",
        "absmax",
        "norm.weight",
        "nested_absmax",
        "bitsandbytes__nf4",
        "layernorm.weight",
    )
    assert changed and all(name.endswith(kinds) for name in changed), changed
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_repair_is_a_step_of_quantize(tmp_path):
    base = save_tiny(tmp_path / "base")
    np.save(tmp_path / "ids.npy", ROWS.ids)
    settings = QuantizeSettings(
        to="gptq:w3g32", calibration=(str(tmp_path / "ids.npy"),), row_length=32, calibration_tokens=2048, repair=True,
        repair_steps=8,
    )  # fmt: skip
    done = quantize(base, tmp_path / "out", settings)
    assert done.repaired is not None and done.repaired.after <= done.repaired.before
    checkpoint = open_checkpoint(base)
    stored = stored_of(checkpoint, tmp_path / "out", "gptq:w3g32")
    assert torch.isfinite(Student(checkpoint, stored).hidden(HELD)).all()


def test_gemmas_gains_are_changed_as_what_they_multiply_with(tmp_path):
    checkpoint, _, stored = made(tmp_path, "gptq:w8g32", family="gemma3_text")
    student = Student(checkpoint, stored)
    change = student.vector_changes()["model.norm.weight"]
    was = student.values()["model.norm.weight"]
    with torch.no_grad():
        change.fill_(0.5)
    torch.testing.assert_close(student.values()["model.norm.weight"], (1 + was) * 1.5 - 1)


def test_weights_of_another_model_or_type_are_refused(tmp_path):
    checkpoint, out, _ = made(tmp_path, "gptq:w3g32")
    with pytest.raises(InputError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.qweight' of I32"):
        stored_of(checkpoint, out, "gptq:w4g32")
    other = open_checkpoint(save_tiny(tmp_path / "other", hidden_size=128))
    with pytest.raises(InputError, match="not made from"):
        stored_of(other, out, "gptq:w3g32")


def test_scales_that_grow_out_of_their_dtype_are_not_written(tmp_path):
    checkpoint, _, stored = made(tmp_path, "gptq:w3g32")
    student = Student(checkpoint, stored)
    with torch.no_grad():
        next(iter(student.factor_changes().values())).fill_(1e9)
    with pytest.raises(OutsideError, match="not finite in"):
        student.values()


def test_what_was_written_again_is_put_in_place(tmp_path):
    _, out, stored = made(tmp_path, "compressed-tensors:w8a16")
    value = stored.read("model.norm.weight") * 2
    stored.rewrite({"model.norm.weight": value})
    put_in_place(stored)
    assert torch.equal(read_index(out)["model.norm.weight"].read(), value)
    assert not rewritten(out / "model.safetensors").exists()
