import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt import repair as room
from llmlite.adapt import stored as files
from llmlite.adapt.artifact_task import ArtifactTask
from llmlite.adapt.linears import RoundedLinear
from llmlite.adapt.losses import divergence
from llmlite.adapt.repair import Repaired, RepairSettings, check_repair, memory_needed
from llmlite.adapt.repair import repair as repair_stored
from llmlite.adapt.stored import open_gguf, raw_bytes
from llmlite.adapt.student import Student
from llmlite.adapt.targets import Kept
from llmlite.adapt.teacher import held_rows, teach, trained_rows
from llmlite.adapt.training import row_at
from llmlite.calibrate.rows import Rows
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.families import EMBEDDING, HEAD
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.errors import InputError
from llmlite.formats.gguf import types as gguf
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.writer import GgufWriter
from llmlite.plan.target import parse_target
from llmlite.plan.types import GgufTypes, type_table
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Grid, Rounded
from tests.adapt.test_qat import killed_at
from tests.gguf_models import save_tiny as save_real
from tests.tiny import save_tiny

ROWS = Rows(np.random.default_rng(0).integers(0, 320, (64, 32)), ())
HELD = torch.from_numpy(ROWS.ids[7::8])
SHORT = RepairSettings(steps=24, batch_rows=4, rate=1e-2, judge_every=6, held_rows=8)


def made(base: Path, kind: str, values: str | None = None) -> tuple[Checkpoint, Path]:
    """A GGUF file of a checkpoint in a folder of its own: matrices as ``kind``, those in ``values`` for attention
    values and down projections, the embedding and the head as q8_0.
    """
    checkpoint = open_checkpoint(base)
    model = describe(checkpoint)
    kinds = {}
    for name, entry in checkpoint.tensors.items():
        outer, other = name in (EMBEDDING, HEAD), "v_proj" in name or "down_proj" in name
        kinds[name] = "f32" if len(entry.shape) == 1 else "q8_0" if outer else values if values and other else kind
    layout = {model.gguf_name(name): (kinds[name], entry.shape) for name, entry in checkpoint.tensors.items()}
    layout |= {name: ("f32", tuple(tensor.shape)) for name, tensor in model.extra().items()}
    file = base.parent / "out" / "model.gguf"
    file.parent.mkdir()
    with GgufWriter(file, model.metadata, layout) as writer:
        for name, found in kinds.items():
            tensor = model.to_gguf(name, checkpoint.read(name))
            dense = gguf.TYPES[found].grid is None
            data = gguf.encode(tensor, found) if dense else gguf.pack(rounded_to(tensor, found), found)
            writer.write(model.gguf_name(name), data)
        for name, tensor in model.extra().items():
            writer.write(name, gguf.encode(tensor, "f32"))
    return checkpoint, file


def repair(checkpoint: Checkpoint, file: Path, *rest) -> Repaired:
    return repair_stored(checkpoint, open_gguf(checkpoint, file), *rest)


def student_of(checkpoint: Checkpoint, file: Path) -> Student:
    return Student(checkpoint, open_gguf(checkpoint, file))


def rounded_to(weight: torch.Tensor, kind: str) -> Rounded:
    return round_to_nearest(weight, None, gguf.grid_of(kind))


def model_of(checkpoint: Checkpoint, file: Path, folder: Path) -> torch.nn.Module:
    """By importing the file and loading that with transformers."""
    import_gguf(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def divergence_of(checkpoint: Checkpoint, file: Path, folder: Path) -> float:
    """Over the whole vocabulary."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(HELD).logits, -1) for m in (base, model_of(checkpoint, file, folder)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> tuple[Checkpoint, Path, Path, Repaired]:
    folder = tmp_path_factory.mktemp("q4_0")
    checkpoint, file = made(save_tiny(folder / "base"), "q4_0")
    old = folder / "old.gguf"
    old.write_bytes(file.read_bytes())
    return checkpoint, old, file, repair(checkpoint, file, ROWS.ids, SHORT, folder)


def test_the_file_comes_nearer_to_its_base_on_rows_that_trained_nothing(repaired, tmp_path):
    checkpoint, old, new, told = repaired
    before = divergence_of(checkpoint, old, tmp_path / "old")
    after = divergence_of(checkpoint, new, tmp_path / "new")
    assert after < 0.96 * before
    assert told.before == pytest.approx(before, rel=0.02)
    assert told.after == pytest.approx(after, rel=0.02)
    assert told.note is None and 0 < told.best_step <= told.steps <= SHORT.steps


def test_only_real_numbers_of_layers_and_norms_change(repaired):
    _, old, new, _ = repaired
    before, after = read_gguf(old), read_gguf(new)
    start = min(tensor.start for tensor in before.tensors.values())
    assert old.stat().st_size == new.stat().st_size
    assert old.read_bytes()[:start] == new.read_bytes()[:start]
    changed = set()
    for name, tensor in before.tensors.items():
        a, b = raw_bytes(tensor), raw_bytes(after.tensors[name])
        if not np.array_equal(a, b):
            changed.add(name)
        if gguf.TYPES[tensor.type].grid is not None:
            codes = [gguf.read(raw, tensor.type, tensor.shape).codes for raw in (a, b)]
            assert torch.equal(*codes), name
    assert changed == before.tensors.keys() - {"token_embd.weight", "output.weight"}
    assert len(changed) > 10
    assert os.listdir(new.parent).count("model.gguf") == 1
    assert not [name for name in os.listdir(new.parent) + os.listdir(old.parent) if name.startswith(".")]


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3", "gemma3"])
def test_a_student_computes_what_the_file_says(tmp_path, family):
    checkpoint, file = made(save_real(family, tmp_path / "base", padding=0), "q4_1", "q5_0")
    student = student_of(checkpoint, file)
    want = model_of(checkpoint, file, tmp_path / "import")
    with torch.no_grad():
        torch.testing.assert_close(student.hidden(HELD), want.model(HELD).last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student.head, want.lm_head.weight)


@pytest.mark.parametrize(("family", "kinds"), [("llama", ("q4_k", "q6_k")), ("llama3", ("q4_1", "iq4_nl")), ("gemma3", ("q5_1", "q4_0"))], ids=str)  # fmt: skip
def test_changed_values_reach_the_file_in_their_places(tmp_path, family, kinds):
    if "q6_k" in kinds:
        base = save_tiny(tmp_path / "base", family, hidden_size=256, intermediate_size=256)
    else:
        base = save_real(family, tmp_path / "base", padding=0)
    checkpoint, file = made(base, *kinds)
    student = student_of(checkpoint, file)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for change in [*student.vector_changes().values(), *student.factor_changes().values()]:
            change.copy_(torch.randn(change.shape, generator=chance) * 0.05)
        want = student.hidden(HELD)
    new = open_gguf(checkpoint, file).rewrite(student.values()).file
    for name, tensor in read_gguf(file).tensors.items():
        if gguf.TYPES[tensor.type].grid is not None:
            raws = raw_bytes(tensor), raw_bytes(read_gguf(new).tensors[name])
            a, b = (gguf.read(raw, tensor.type, tensor.shape) for raw in raws)
            assert torch.equal(a.codes, b.codes)
            for x, y in ((a.ranges.scale_codes, b.ranges.scale_codes), (a.ranges.offset_codes, b.ranges.offset_codes)):
                assert (x is None and y is None) or torch.equal(x, y)
    with torch.no_grad():
        got = student_of(checkpoint, new).hidden(HELD)
        before = student_of(checkpoint, file).hidden(HELD)
    assert (got - want).norm() < 0.01 * (before - want).norm()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q6_k", "q4_k", "iq4_nl"])
def test_gradients_are_those_of_the_dense_weight(kind):
    weight, x = torch.randn(8, 256), torch.randn(3, 5, 256, requires_grad=True)
    rounded = round_to_nearest(weight, None, gguf.grid_of(kind))
    linear = RoundedLinear(rounded, torch.float32)
    pull = torch.randn(3, 5, 8)
    linear(x).backward(pull)
    dense = rounded.dequantize().requires_grad_()
    again = x.detach().clone().requires_grad_()
    (again @ dense.T).backward(pull)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    flat = replace(rounded, ranges=rounded.ranges.map(torch.clone))
    if flat.offsets is not None:
        flat.offsets.zero_()
    blocks = linear.scale_change.shape[1]
    offsets = rounded.dequantize() - flat.dequantize()
    for change, part in ((linear.scale_change, flat.dequantize()), (linear.offset_change, offsets)):
        if change is not None:  # a relative change of a factor scales its part of the block's weights
            torch.testing.assert_close(
                change.grad, (dense.grad * part).view(8, blocks, -1).sum(-1), rtol=1e-3, atol=1e-3
            )


def test_the_kept_predictions_give_the_divergence_of_the_whole_vocabulary_or_less(tmp_path):
    checkpoint, file = made(save_real("qwen2", tmp_path / "base", padding=0), "q4_0")
    base = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    other = model_of(checkpoint, file, tmp_path / "import")
    with torch.no_grad():
        p, q = torch.log_softmax(base(HELD).logits, -1), other(HELD).logits
    whole = (p.exp() * (p - torch.log_softmax(q, -1))).sum(-1)
    found = {}
    for top in (128, 1024):
        teacher = teach(checkpoint, HELD.numpy(), tmp_path, top)
        pairs = [Kept(*teacher.read(row)).compare(q[row], slice(None)) for row in range(len(HELD))]
        found[top] = torch.stack([divergence(known, seen, "kl") for known, seen in pairs])
    torch.testing.assert_close(found[1024], whole, rtol=1e-3, atol=1e-5)
    assert (found[128] < whole + 1e-5).all()
    assert found[128].mean() > 0.5 * whole.mean()


def test_a_file_that_is_near_already_is_never_worse(tmp_path):
    checkpoint, file = made(save_tiny(tmp_path / "base"), "q8_0")
    before = divergence_of(checkpoint, file, tmp_path / "old")
    was = digest(file)
    told = repair(checkpoint, file, ROWS.ids, replace(SHORT, steps=6, judge_every=3), tmp_path)
    assert told.after <= told.before
    assert (told.note is not None) == (digest(file) == was)
    assert divergence_of(checkpoint, file, tmp_path / "new") <= before * 1.001


def test_a_file_that_training_harms_stays_and_a_note_says_so(tmp_path):
    checkpoint, file = made(save_tiny(tmp_path / "base"), "q4_0")
    was = digest(file)
    told = repair(checkpoint, file, ROWS.ids, replace(SHORT, rate=1.0, judge_every=1), tmp_path)
    assert digest(file) == was
    assert (told.after, told.best_step, told.steps) == (told.before, 0, SHORT.patience)
    assert "it is as it was" in told.note


def test_a_run_that_is_killed_while_it_writes_leaves_the_file_whole(tmp_path, monkeypatch):
    checkpoint, file = made(save_tiny(tmp_path / "base"), "q4_0")
    was, values = digest(file), student_of(checkpoint, file).values()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the threads of OpenMP are not forked, and would be waited for
        monkeypatch.setattr(files.gguf, "pack", lambda *_: os._exit(9))
        open_gguf(checkpoint, file).rewrite(values)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert digest(file) == was


def test_a_repair_that_is_killed_goes_on_to_the_same_file(tmp_path, monkeypatch):
    settings, ends = replace(SHORT, steps=8, judge_every=4, save_every=2), []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        checkpoint, file = made(save_tiny(tmp_path / name / "base"), "q4_0")
        was = digest(file)
        if name == "cut":
            killed_at(6, monkeypatch, repair, checkpoint, file, ROWS.ids, settings, file.parent)
            assert digest(file) == was
            steps = counted(monkeypatch)
        told = repair(checkpoint, file, ROWS.ids, settings, file.parent)
        assert told.best_step and told.steps == 8
        assert os.listdir(file.parent) == [file.name]
        ends.append(digest(file))
    assert ends[0] == ends[1]
    assert len(steps) == 4  # those after the last state that was saved


def counted(monkeypatch) -> list:
    """The losses that are asked for from now on."""
    calls, loss = [], ArtifactTask.loss
    monkeypatch.setattr(ArtifactTask, "loss", lambda task, rows: calls.append(rows) or loss(task, rows))
    return calls


def test_a_failure_before_the_end_leaves_the_file_and_nothing_beside_it(tmp_path, monkeypatch):
    checkpoint, file = made(save_tiny(tmp_path / "base"), "q4_0")
    was, beside = digest(file), sorted(os.listdir(file.parent))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        repair(checkpoint, file, ROWS.ids, replace(SHORT, steps=6), tmp_path)
    assert digest(file) == was
    assert sorted(os.listdir(file.parent)) == beside


def test_what_cannot_be_repaired_is_refused_in_one_sentence(tmp_path, monkeypatch):
    checkpoint, file = made(save_tiny(tmp_path / "base"), "q4_0")
    types = GgufTypes("q4_0")

    def check(rows: np.ndarray, settings: RepairSettings, types=types) -> None:
        check_repair(checkpoint, types, rows, settings)

    for target, reason in (("bnb:int8", "bnb:nf4 is right"), ("compressed-tensors:w8a8", "w8a16 is right")):
        with pytest.raises(InputError, match=reason):
            check(ROWS.ids, SHORT, type_table(parse_target(target), torch.bfloat16, False))
    with pytest.raises(InputError, match="has 7 rows, and at least 8"):
        check(ROWS.ids[:7], SHORT)
    with pytest.raises(InputError, match="steps 0: at least 1"):
        check(ROWS.ids, replace(SHORT, steps=0))
    other = open_checkpoint(save_tiny(tmp_path / "other", hidden_size=128))
    with pytest.raises(InputError, match="not made from"):
        open_gguf(other, file)
    monkeypatch.setattr("llmlite.adapt.repair.free_memory", lambda _: 1000)
    with pytest.raises(InputError, match="needs about"):
        check(ROWS.ids, SHORT)


def test_rows_that_judge_train_nothing_and_come_from_all_of_the_text():
    ids = np.arange(800)[:, None]
    wanted = room._enough(ids, replace(SHORT, steps=400))
    assert np.array_equal(wanted, ids)
    held, others = held_rows(800, 5), trained_rows(800)
    trained = [others[row_at(place, len(others), 0)] for place in range(400 * SHORT.batch_rows)]
    assert (held[0], held[-1], len(held)) == (7, 799, 5)
    assert not {row for row in trained if row % 8 == 7}
    assert len(set(trained)) == 700
    few = room._enough(ids, replace(SHORT, steps=20))[:, 0]
    assert (few[0], few[-1], len(few), len(set(few))) == (0, 799, 92, 92)
    assert np.diff(few).max() <= 10


def test_the_memory_told_grows_with_the_model(tmp_path):
    sizes = [memory_needed(open_checkpoint(save_tiny(tmp_path / str(n), num_hidden_layers=n)), 64) for n in (1, 2, 3)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_grid_of_a_file_fits_a_step_of_eight_bits():
    for kind, row in gguf.TYPES.items():
        if isinstance(row.grid, Grid):
            lowest, highest = (-(row.grid.levels // 2), row.grid.levels // 2 - 1)
            if row.grid.zero == "minimum":
                lowest, highest = 0, row.grid.levels - 1
            assert (lowest >= -128 and highest <= 127) or row.grid.codebook, kind
