import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

from llmlite.adapt.qat import QatSettings, qat
from llmlite.adapt.stored import open_stored
from llmlite.adapt.student import Student
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.run import qat as run_qat
from llmlite.run.qat import TrainCodesSettings, train_quantized
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qat")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 320, (256, 32)))
    return save_tiny(folder / "base")


def words(base: Path, out: Path, to: str, *more: str) -> list[str]:
    data = ["--data", str(base.parent / "ids.npy"), "--row-length", "32", "--data-tokens", "8192", "--dtype", "float32"]
    short = ["--steps", "24", "--judge-every", "8", "--batch-rows", "16", "--rate", "0.01"]
    return ["distill", "--teacher", str(base), "--to", to, "-o", str(out), *data, *short, *more]


@pytest.mark.parametrize("target", ["gptq:w3g32", "gguf:q4_0"])
def test_distill_to_a_type_writes_an_artifact_of_it_that_is_nearer_than_its_rounding(base, tmp_path, capsys, target):
    rounded = tmp_path / "rounded"
    quantize(base, rounded, QuantizeSettings(to=target, solver="rtn"))
    more = ("--student", str(rounded), "--json", str(tmp_path / "facts.json"))
    assert main(words(base, tmp_path / "out", target, *more)) == 0
    told = json.loads((tmp_path / "facts.json").read_text())["training"]
    assert told["after"] < told["before"] and told["best_step"] > 0
    manifest = json.loads((tmp_path / "out" / "llmlite.json").read_text())
    assert manifest["kind"] == "artifact" and manifest["format"].lower() == target
    assert manifest["trained"]["after"] == told["after"] and manifest["evals"] == {}
    sizes = [{f.name: f.stat().st_size for f in folder.glob("model*")} for folder in (rounded, tmp_path / "out")]
    assert sizes[0] == sizes[1]
    extra = {f.name for f in (tmp_path / "out").iterdir()} - {f.name for f in rounded.iterdir()}
    assert extra == {"loss.png"}
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    checkpoint = open_checkpoint(base)
    types = type_table(parse_target(target), torch.float16, False)
    ids = torch.arange(32)[None]
    one, other = (
        Student(checkpoint, open_stored(checkpoint, f, types)).hidden(ids) for f in (rounded, tmp_path / "out")
    )
    assert not torch.equal(one, other)


def test_without_an_artifact_to_begin_with_one_is_made_with_error_feedback(base, tmp_path):
    given = words(base, tmp_path / "out", "gptq:w3g32")
    given[given.index("--steps") + 1] = "2"
    assert main(given) == 0
    manifest = json.loads((tmp_path / "out" / "llmlite.json").read_text())
    assert {row["solver"] for row in manifest["plan"] if row["type"] == "w3g32"} == {"feedback"}
    assert manifest["trained"]["steps"] == 2
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "out" / "model.safetensors").is_file()


def test_an_artifact_that_is_there_is_begun_with_and_stays(base, tmp_path):
    start = tmp_path / "start"
    quantize(base, start, QuantizeSettings(to="gptq:w2g32", solver="rtn"))
    was = (start / "model.safetensors").read_bytes()
    settings = {"teacher": str(base), "data": (str(base.parent / "ids.npy"),), "row_length": 32, "data_tokens": 3072,
                "steps": 4, "judge_every": 2, "batch_rows": 8, "rate": 0.01, "dtype": "float32"}  # fmt: skip
    done = train_quantized(tmp_path / "out", TrainCodesSettings(to="gptq:w2g32", student=str(start), **settings))
    assert "2 bits by training through the rounding are experimental" in done.notes[0]
    assert done.notes[0] in json.loads((tmp_path / "out" / "llmlite.json").read_text())["notes"]
    assert (start / "model.safetensors").read_bytes() == was != (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="an artifact that llmlite quantize made with --to gptq:w3g32 is right"):
        train_quantized(tmp_path / "no", TrainCodesSettings(to="gptq:w3g32", student=str(start), **settings))
    other = save_tiny(tmp_path / "other", hidden_size=128)
    strange = TrainCodesSettings(to="gptq:w2g32", student=str(start), **{**settings, "teacher": str(other)})
    with pytest.raises(InputError, match="which has another config"):
        train_quantized(tmp_path / "no", strange)


def test_cut_off_while_the_artifact_is_put_together_it_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch):
    start = tmp_path / "start"
    quantize(base, start, QuantizeSettings(to="gptq:w3g32", solver="rtn"))
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    settings = TrainCodesSettings(
        teacher=str(base), to="gptq:w3g32", student=str(start), data=(str(base.parent / "ids.npy"),), row_length=32,
        data_tokens=3072, steps=4, judge_every=2, save_every=2, batch_rows=8, rate=0.01, dtype="float32",
    )  # fmt: skip
    train_quantized(tmp_path / "whole", settings)
    monkeypatch.setattr(run_qat, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_quantized(tmp_path / "out", settings)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    train_quantized(tmp_path / "out", replace(settings, resume=True))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())
    assert (out / "additional_chat_templates" / "tools.jinja").is_file()
    told, wanted = (json.loads((d / "llmlite.json").read_text()) for d in (out, whole))
    assert told["plan"] == wanted["plan"] and told.keys() == wanted.keys()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words_of", "reason"),
    [
        (("gptq:w1g32",), "by rounding alone one bit holds no model"),
        (("gptq:w3g32", "--layers", "1"), "--layers: is for smaller students"),
        (("bnb:nf4",), "its values are not evenly spaced"),
        (("gptq:w3g32", "--data-tokens", "128"), "has 4 rows"),
        (("gptq:w3g32", "--rate", "0"), "--rate 0"),
        (("gptq:w3g32", "--data-tokens", "10"), "--data-tokens 10 with --row-length 32"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_left(base, tmp_path, capsys, words_of, reason):
    data = str(base.parent / "few.npy")
    np.save(data, np.zeros((4, 32), dtype=np.int64))
    given = words(base, tmp_path / "out", *words_of)
    if "128" in words_of:
        given += ["--data", data]
    assert main(given) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_of_several_processes_the_first_alone_writes_what_the_base_predicts(tmp_path, monkeypatch):
    inside = []

    @contextmanager
    def first(_state):
        inside.append(True)
        yield
        inside.clear()

    def write(*_args):
        assert inside
        raise InterruptedError

    monkeypatch.setattr(PartialState, "main_process_first", first)
    monkeypatch.setattr("llmlite.adapt.qat.keep_on_disk", write)
    with pytest.raises(InterruptedError):
        qat(None, None, np.zeros((8, 4)), QatSettings(), tmp_path)


def test_scales_beyond_what_the_file_holds_end_with_one_sentence(base, tmp_path, capsys):
    start = tmp_path / "start"
    quantize(base, start, QuantizeSettings(to="gptq:w3g32", solver="rtn"))
    assert main(words(base, tmp_path / "out", "gptq:w3g32", "--student", str(start), "--rate", "1e30")) == 3
    assert "trained scales are not finite" in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["start"]
