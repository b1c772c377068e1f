import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt.artifact_task import ArtifactTask
from llmlite.adapt.linears import TrainedLinear
from llmlite.adapt.qat import EXPERIMENTAL, QatSettings, check_qat, qat
from llmlite.adapt.stored import put_in_place
from llmlite.adapt.student import Student
from llmlite.adapt.teacher import held_rows, teach
from llmlite.errors import InputError
from llmlite.formats.gguf import types as gguf
from llmlite.plan.target import parse_target
from llmlite.plan.types import GgufTypes, type_table
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Grid, Rounded
from tests.adapt.test_stored import HELD, ROWS, made, stored_of

TEXT = np.random.default_rng(0).integers(0, 320, (256, 32))
FAST = QatSettings(
    steps=32, rate=0.01, batch_rows=16, judge_every=8, save_every=24, dtype="float32", scale_rate=0.1,
    norm_rate=0.1,
)  # fmt: skip
EVEN = (
    Grid(3, 32), Grid(2, 16, "integer"), Grid(4, None, "integer"), Grid(8, 32, scale_rule="narrow"),
    Grid(4, 32, scale_rule="signed"), Grid(4, 32, "minimum"), gguf.grid_of("q3_k"), gguf.grid_of("q2_k"),
    gguf.grid_of("q6_k"),
)  # fmt: skip


def logits_of_file(checkpoint, stored) -> torch.Tensor:
    """Of the plain model with the file's weights multiplied out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = stored.read(name)
            parameter.copy_(value.dequantize() if isinstance(value, Rounded) else value)
        return model(HELD).logits


@pytest.mark.parametrize(
    ("target", "left"), [("gptq:w3g32", 0.85), ("gptq:w2g32-asym", 0.85), ("compressed-tensors:w4a16g32", 0.9)]
)
def test_training_brings_the_artifact_much_nearer_at_the_same_bytes(tmp_path, target, left):
    checkpoint, out, stored = made(tmp_path, target)
    size = (out / "model.safetensors").stat().st_size
    told = qat(checkpoint, stored, TEXT, FAST, tmp_path)
    put_in_place(stored)
    assert told.after < left * told.before
    assert (out / "model.safetensors").stat().st_size == size
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    again = stored_of(checkpoint, out, target)  # what lies on the disk now, judged anew
    teacher = teach(checkpoint, TEXT, tmp_path, 256)
    student = Student(checkpoint, again, codes=True)
    judged = ArtifactTask(student, TEXT, teacher, FAST).judge()
    assert judged == pytest.approx(told.after, rel=0.02)  # norms are stored in 16 bits


@pytest.mark.parametrize("target", ["gptq:w3g32", "gptq:w4g32-asym", "compressed-tensors:w4a16g32", "gptq:w4g32 act"])
def test_the_trained_model_and_the_packed_one_are_the_same(tmp_path, target):
    target, _, order = target.partition(" ")
    checkpoint, _, stored = made(tmp_path, target, bool(order))
    student = Student(checkpoint, stored, codes=True)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for latent in student.latents().values():
            latent += torch.randn(latent.shape, generator=chance)
        for change in student.factor_changes().values():
            change += torch.randn(change.shape, generator=chance) * 0.1
        student.prepare()
        got = student.hidden(HELD) @ student.head.T
    old = {name: stored.read(name) for name in student.linears}
    new = stored.rewrite(student.values())
    torch.testing.assert_close(got, logits_of_file(checkpoint, new), rtol=1e-4, atol=1e-4)
    moved = [(old[name].codes != new.read(name).codes).float().mean().item() for name in old]
    assert min(moved) > 0.1


@pytest.mark.parametrize("grid", EVEN, ids=str)
def test_training_begins_at_the_codes_that_are_there_and_packs_what_it_computes_with(grid):
    weight = torch.randn(8, 256)
    rounded = round_to_nearest(weight, None, grid)
    off = (rounded.codes.int() + torch.randint(-1, 2, rounded.codes.shape)).clamp(
        1, grid.levels - 1
    )  # as feedback does
    rounded = replace(rounded, codes=off.to(torch.uint8))
    linear = TrainedLinear(rounded, weight, torch.float32)
    linear.prepare()
    assert torch.equal(linear.rounded().codes, rounded.codes)
    assert (linear.latent != linear.steps).float().mean() > 0.9, "it begins towards the weight"
    torch.testing.assert_close(linear(torch.eye(256)).T, rounded.dequantize())
    with torch.no_grad():
        linear.latent += torch.randn(linear.latent.shape) * 3
        linear.scale_change += 0.1
    linear.prepare()
    packed = linear.rounded()
    torch.testing.assert_close(linear(torch.eye(256)).T, packed.dequantize())
    assert int(packed.codes.max()) <= grid.levels - 1
    assert not torch.equal(packed.codes, rounded.codes)


def test_slopes_go_through_the_rounding_and_stop_beyond_the_last_code():
    weight, x = torch.randn(8, 64), torch.randn(5, 64, requires_grad=True)
    rounded = round_to_nearest(weight, None, Grid(3, 32))
    linear = TrainedLinear(rounded, weight, torch.float32)
    with torch.no_grad():
        linear.latent[0, 0] = 9.0
    linear.prepare()
    pull = torch.randn(5, 8)
    linear(x).backward(pull)
    slope = pull.T @ x.detach()
    scale = rounded.scales.repeat_interleave(32, 1)
    want = slope * scale
    assert linear.latent.grad[0, 0] == 0 and want[0, 0] != 0
    want[0, 0] = 0
    torch.testing.assert_close(linear.latent.grad, want)
    torch.testing.assert_close(x.grad, pull @ linear.rounded().dequantize())
    of_scales = (slope * linear.steps).view(8, 2, 32).sum(-1) * rounded.scales
    torch.testing.assert_close(linear.scale_change.grad, of_scales)


def test_rows_that_judge_are_never_trained_on(tmp_path):
    checkpoint, _, stored = made(tmp_path, "gptq:w3g32")
    teacher = teach(checkpoint, ROWS.ids, tmp_path, 64)
    task = ArtifactTask(Student(checkpoint, stored, codes=True), ROWS.ids, teacher, FAST)
    assert task.rows == 56 and not {row % 8 for row in task._trained} & {7}
    assert held_rows(64, 3) == [7, 39, 63]


def killed_at(call: int, monkeypatch, run, *given) -> None:
    """Run it in a process that ends, as by kill -9, when the loss is asked for so many times."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            dies_at(call, monkeypatch)
            run(*given)
        finally:  # or an error here would go on with the other tests, twice
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def dies_at(call: int, monkeypatch) -> None:
    calls, loss = [], ArtifactTask.loss

    def dies(self, rows):
        calls.append(rows)
        return os._exit(9) if len(calls) == call else loss(self, rows)

    monkeypatch.setattr(ArtifactTask, "loss", dies)


def test_a_killed_training_goes_on_to_the_same_artifact(tmp_path, monkeypatch):
    results = []
    settings = replace(FAST, steps=8, judge_every=4, save_every=2)
    for name in ("whole", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        checkpoint, out, stored = made(folder, "gptq:w3g32")
        if name == "cut":
            killed_at(6, monkeypatch, qat, checkpoint, stored, ROWS.ids, settings, folder)
        told = qat(checkpoint, stored, ROWS.ids, settings, folder)
        assert told.best_step
        put_in_place(stored)
        results.append((told.losses, (out / "model.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, monkeypatch):
    checkpoint, _, _ = made(tmp_path, "gptq:w3g32")

    def check(target: str, rows: int = 64) -> tuple[str, ...]:
        types = GgufTypes(target[5:]) if target.startswith("gguf:") else None
        types = types or type_table(parse_target(target), torch.float16, False)
        return check_qat(checkpoint, types, ROWS.ids[:rows], FAST)

    assert check("gptq:w3g32") == () and check("gguf:q4_0") == ()
    assert check("gptq:w2g32") == (EXPERIMENTAL,)
    for target, reason in (
        ("bnb:nf4", "not evenly spaced"), ("bnb:int8", "bnb:nf4 is right"), ("compressed-tensors:w8a8", "w8a16 is"),
        ("gguf:iq4_nl", "iq4_nl: its values are not evenly spaced"), ("gguf:f16", "no codes to train"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            check(target)
    with pytest.raises(InputError, match="has 7 rows"):
        check("gptq:w3g32", 7)
    monkeypatch.setattr("llmlite.adapt.qat.free_memory", lambda _: 1000)
    with pytest.raises(InputError, match="quantize --repair needs far less"):
        check("gptq:w3g32")
