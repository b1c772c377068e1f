"""The verb distill on tiny models: what it writes, how it goes on, and what it refuses."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmlite.adapt.distill import Distillation
from llmlite.checkpoint.artifact import partial_of
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.cli import main
from llmlite.errors import InputError, OutsideError
from llmlite.run.distill import DistillSettings, _job, distill
from llmlite.run.students import _varied
from llmlite.run.training import describe_model, training_directory
from tests.tiny import save_tiny, tiny_tokenizer

FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "llmlite.json", "loss.png", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16, num_hidden_layers=6)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"{n} the cat sat on the mat and the dog ran {n * 7} times" for n in range(400)))
    return file


def settings(base: Path, text: Path, **changes) -> DistillSettings:
    wanted = {"layers": 4, "steps": 8, "rate": 1e-3, "judge_every": 4, "save_every": 2, "patience": 0, "threads": 1}
    more = {"data_tokens": 768, "row_length": 24, "dtype": "float32", "device": "cpu"}
    return DistillSettings(teacher=str(base), data=(str(text),), **{**wanted, **more, **changes})


def test_a_student_comes_nearer_and_is_a_checkpoint_like_any_other(base, text, tmp_path):
    asked = settings(base, text, ffn=64, steps=40)
    done = distill(tmp_path / "out", asked)
    assert done.after.kl < 0.9 * done.before.kl
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES and len(list(tmp_path.iterdir())) == 1
    student = open_checkpoint(tmp_path / "out")
    assert student.num_layers == 4 and student.dtype == torch.bfloat16
    manifest = json.loads((tmp_path / "out" / "llmlite.json").read_text())
    assert len(manifest["made"]["dropped"]) == 2
    assert 0 < min(manifest["made"]["reconstructed"]["distance_left"].values()) < 1
    assert manifest["teacher_logits"] == "disk"  # 40 steps use rows again
    assert manifest["held_out"]["after"]["kl"] == done.after.kl and len(manifest["training"]["losses"]) == 40
    job = _job(open_checkpoint(base), asked, "cpu")
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (base, tmp_path / "out")]
        p, q = (torch.log_softmax(model(torch.from_numpy(job.rows.ids[job.held])).logits, -1) for model in models)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(done.after.kl, rel=0.05)


def test_a_student_is_made_by_other_text_too(base, text, tmp_path):
    ids = tmp_path / "ids.npy"
    numpy.save(ids, numpy.random.default_rng(0).integers(0, 320, (32, 24)))
    for data, own in (((str(text),), 0.5), ((), 1.0), ((str(ids),), 1.0)):
        job = _job(open_checkpoint(base), replace(settings(base, text), data=data), "cpu")
        taught = {row.tobytes() for row in job.taught}
        rows = [row.tobytes() in taught for row in _varied(job)]
        assert sum(rows) == own * len(rows) and len(rows) == len(taught) / own  # each row once


def test_without_steps_the_student_is_as_it_is_made(base, text, tmp_path):
    said = f"distill --teacher {base} --shrink 0.8 --steps 0 --data {text} --data-tokens 768 --row-length 24"
    said += f" --threads 1 -o {tmp_path / 'out'} --json {tmp_path / 'facts'}"
    assert main(said.split()) == 0
    facts = json.loads((tmp_path / "facts").read_text())
    assert facts["training"] is None and facts["held_out"]["before"] == facts["held_out"]["after"]
    assert facts["parameters"]["student"] <= 0.8 * facts["parameters"]["teacher"]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_logits": "disk", "loss": "skew", "temperature": 2.0},
        {"hidden": 1.0, "attention": 1.0, "on_policy": 0.5, "data_share": 0.2},
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_losses(changes, base, text, tmp_path, monkeypatch):
    expected = distill(tmp_path / "whole", settings(base, text, **changes))
    left, inner = 5, Distillation.loss

    def loss(task, rows):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return inner(task, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "loss", loss)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            distill(tmp_path / "out", settings(base, text, **changes))
        left = 100
        with pytest.raises(InputError, match=r"differs in settings\.rate"):
            distill(tmp_path / "out", settings(base, text, **{**changes, "rate": 5e-4}, resume=True))
        found = distill(tmp_path / "out", settings(base, text, **changes, resume=True))
    assert left == 100 - 4 and found.trained.losses == expected.trained.losses
    assert (found.before, found.after) == (expected.before, expected.after)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_a_loss_that_is_no_number_keeps_nothing(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Distillation, "loss", lambda task, rows: next(iter(task.parameters().values())).sum() * torch.nan
    )
    with pytest.raises(OutsideError, match="loss is nan"):
        distill(tmp_path / "out", settings(base, text))
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": None}, "--student, --layers"),
        ({"student": "other"}, "leave out --layers"),
        ({"layers": 3}, "4 to 6 are right"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"hidden": math.inf}, "--hidden inf"),
        ({"data_share": 1.5}, "--data-share 1.5"),
        ({"hidden": 1.0, "teacher_logits": "disk"}, "live is right"),
        ({"data_tokens": 100}, "at least 8 rows"),
        ({"row_length": 512, "data_tokens": 5000}, "--row-length 512: the models read 256 tokens|has . rows"),
    ],
)
def test_refusals(changes, said, base, text, tmp_path):
    with pytest.raises(InputError, match=said):
        distill(tmp_path / "out", settings(base, text, **changes))
    assert not list(tmp_path.iterdir())


def test_a_student_of_other_tokens_is_refused(base, text, tmp_path):
    other = save_tiny(tmp_path / "other")
    tiny_tokenizer("entirely different words make other merges here " * 9).save_pretrained(other)
    with pytest.raises(InputError, match="are none of the teacher's"):
        distill(tmp_path / "out", settings(base, text, layers=None, student=str(other)))


def test_a_student_of_ones_own(base, text, tmp_path):
    own = save_tiny(tmp_path / "own", "qwen3", hidden_size=32)
    done = distill(tmp_path / "out", settings(base, text, layers=None, student=str(own), hidden=0.1))
    assert done.after.kl < done.before.kl
    assert open_checkpoint(tmp_path / "out").config["hidden_size"] == 32


def test_hidden_states_are_matched_where_the_text_alone_gives_the_logits_loss(base, text):
    teacher = open_checkpoint(base)
    assert _job(teacher, settings(base, text, data_share=1.0, hidden=1.0), "cpu").live
    assert not _job(teacher, settings(base, text, data_share=1.0, teacher_logits="live"), "cpu").live


def test_hidden_states_of_a_single_layer_are_refused(base, text, tmp_path):
    own = save_tiny(tmp_path / "own", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"--hidden: .* has one layer"):
        distill(tmp_path / "out", settings(base, text, layers=None, student=str(own), hidden=1.0))


def test_a_gguf_file_is_the_same_model_wherever_it_was_imported_to(base, tmp_path):
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF")
    again = shutil.copytree(base, tmp_path / "again", copy_function=shutil.copyfile)
    assert describe_model(str(base), base) != describe_model(str(base), again)
    assert describe_model(str(file), base, file) == describe_model(str(file), again, file)


def test_what_was_prepared_before_the_first_step_is_not_called_a_new_beginning(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), training_directory(tmp_path / "out", {"a": 1}, resume=False):
        raise KeyboardInterrupt
    capsys.readouterr()
    with training_directory(tmp_path / "out", {"a": 1}, resume=True):
        pass
    said = capsys.readouterr()
    assert "resumed: no step was saved yet" in said.err + said.out and "beginning" not in said.err + said.out


def test_a_teacher_of_no_numbers_is_refused_where_nothing_is_trained_too(text, tmp_path):
    broken = save_tiny(tmp_path / "broken", num_hidden_layers=6)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="divergence on held-out rows is nan before any training"):
        distill(tmp_path / "out", settings(broken, text, steps=0))
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_a_config_that_leaves_out_the_context_has_its_familys(text, tmp_path):
    silent = save_tiny(tmp_path / "silent", num_hidden_layers=6)
    config = json.loads((silent / "config.json").read_text())
    del config["max_position_embeddings"]
    (silent / "config.json").write_text(json.dumps(config))
    assert _job(open_checkpoint(silent), settings(silent, text), "cpu").rows.ids.shape[1] == 24
