"""Figures that llmlite.json holds are used again as long as they are valid; what the command says of bad input."""

import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from llmlite.checkpoint.artifact import read_manifest, write_manifest
from llmlite.cli import main
from llmlite.evals.evaluate import EvalSettings, evaluate, save_in_manifest
from llmlite.evals.speed import Speed
from llmlite.evals.table import show_worst
from llmlite.evals.tasks.run import TaskScore
from tests import gguf_models
from tests.tiny import edit_config, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "cats.v1.txt"
    file.write_text("the cat sat on the mat and the dog ran to the house. " * 200)
    return str(file)


@pytest.fixture
def artifact(tiny, tmp_path):
    """A copy of the tiny model that has a manifest."""
    out = tmp_path / "artifact"
    shutil.copytree(tiny, out)
    write_manifest(out, {"kind": "artifact"})
    return out


def test_figures_that_are_still_valid_are_not_measured_again(artifact, tiny, text, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.txt"
    other.write_text("the dog sat on the cat. " * 200)
    settings = EvalSettings(base=str(tiny), text=(text,), windows=2, window=64)
    first = evaluate(artifact, settings)
    save_in_manifest(artifact, first)
    with monkeypatch.context() as patch:
        patch.setattr("llmlite.evals.evaluate.open_engine", lambda *_, **__: pytest.fail("measured again"))
        again = evaluate(artifact, settings)
    assert again.scores == first.scores
    assert again.reused == ("cats_v1",)
    assert "not measured again, as nothing has changed: cats_v1 (--again" in capsys.readouterr().err

    both = evaluate(artifact, replace(settings, text=(str(other), text)))
    assert both.reused == ("cats_v1",)
    assert list(both.scores) == ["other", "cats_v1"]
    save_in_manifest(artifact, evaluate(artifact, replace(settings, text=(str(other),))))
    assert evaluate(artifact, replace(settings, text=(str(other), text))).reused == ("other", "cats_v1"), (
        "both are kept"
    )
    assert evaluate(artifact, replace(settings, again=True)).reused == ()


@pytest.mark.parametrize(
    "change", ["artifact", "config", "base", "no base", "text", "protocol", "window", "windows", "version"]
)
def test_figures_that_something_changed_for_are_measured_again(artifact, tiny, text, tmp_path, monkeypatch, change):
    settings = EvalSettings(base=str(tiny), text=(text,), windows=2, window=64)
    save_in_manifest(artifact, evaluate(artifact, settings))
    assert evaluate(artifact, settings).reused, "the test needs figures to reuse"
    if change == "artifact":
        data = bytearray((artifact / "model.safetensors").read_bytes())
        data[-3] ^= 1
        (artifact / "model.safetensors").write_bytes(data)
    elif change == "config":
        edit_config(artifact, rms_norm_eps=1e-3)
    elif change == "base":
        settings = replace(settings, base=str(save_tiny(tmp_path / "base", seed=5)))
    elif change == "text":
        file = tmp_path / "cats.v1.txt"
        file.write_text("the cat sat. " * 300)
        settings = replace(settings, text=(str(file),))
    elif change == "version":
        monkeypatch.setattr("llmlite.evals.evaluate.engine_version", lambda name: f"{name} 9.9")
    else:
        changes = {
            "no base": {"base": None}, "protocol": {"protocol": "paper"}, "window": {"window": 65}, "windows": {"windows": 3}
        }  # fmt: skip
        settings = replace(settings, **changes[change])
    assert evaluate(artifact, settings).reused == ()


def test_figures_of_changed_weights_do_not_stay_beside_new_ones(artifact, tiny, text):
    settings = EvalSettings(text=(text,), windows=2, window=64)
    first = evaluate(artifact, settings)
    speed = Speed(prompt_tps=10.0, generate_tps=2.0, first_token_s=51.2)
    save_in_manifest(artifact, replace(first, speed=speed))
    edit_config(artifact, rms_norm_eps=1e-3)
    save_in_manifest(artifact, evaluate(artifact, settings))
    assert "speed" not in read_manifest(artifact)["evals"]["llama.cpp"]


def test_figures_of_another_engine_do_not_become_those_of_this_one(artifact, text, monkeypatch):
    settings = EvalSettings(text=(text,), windows=2, window=64)
    save_in_manifest(artifact, evaluate(artifact, settings))
    with monkeypatch.context() as patch:
        patch.setattr("llmlite.evals.evaluate.engine_version", lambda name: f"{name} 9.9")
        save_in_manifest(artifact, evaluate(artifact, EvalSettings()))
        assert evaluate(artifact, settings).reused == ()


def test_a_base_of_long_contexts_is_not_made_the_base_of_earlier_texts(artifact, tiny, text, tmp_path):
    settings = EvalSettings(text=(text,), windows=2, window=64)
    first = evaluate(artifact, settings)
    save_in_manifest(artifact, first)
    save_in_manifest(artifact, replace(first, scores={}, base=str(tiny), base_sha256="another"))
    kept = read_manifest(artifact)["evals"]["llama.cpp"]
    assert kept["base_sha256"] == "another"
    assert "texts" not in kept


def test_tasks_that_were_not_run_again_stay(artifact):
    measured = evaluate(artifact, EvalSettings())
    scored = TaskScore(3, None, False, "lm_eval 0", {})
    save_in_manifest(artifact, replace(measured, tasks={"one": scored}))
    save_in_manifest(artifact, replace(measured, tasks={"two": scored}))
    assert list(read_manifest(artifact)["evals"]["llama.cpp"]["tasks"]) == ["one", "two"]


def test_earlier_figures_by_other_keys_are_measured_again(artifact, tiny, text):
    settings = EvalSettings(base=str(tiny), text=(text,), windows=2, window=64)
    save_in_manifest(artifact, evaluate(artifact, settings))
    manifest = read_manifest(artifact)
    del manifest["evals"]["llama.cpp"]["texts"]["cats_v1"]["divergence"]["worst"]
    write_manifest(artifact, manifest)
    assert evaluate(artifact, settings).reused == ()


def test_the_tokens_that_suffered_most_are_shown(artifact, tiny, text, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    edit_config(artifact, rms_norm_eps=1e-1)
    measured = evaluate(artifact, EvalSettings(base=str(tiny), text=(text,), windows=2, window=64))
    show_worst(measured)
    worst = measured.scores["cats_v1"].divergence.worst[0]
    shown = capsys.readouterr().out
    assert "cats_v1: the tokens that suffered most" in shown
    rows = [line for line in shown.splitlines() if "%" in line]
    assert len(rows) == 5
    for word in (f"{worst.kl:.3f}", worst.before[-32:].strip(), f"{worst.base_probability:.1%}"):
        assert word in rows[0], "cut short in a narrow terminal"


def test_the_command_says_what_is_wrong_with_status_2(tiny, text, tmp_path, capsys):
    for name, content in (("empty.txt", " \n"), ("short.txt", "the cat")):
        (tmp_path / name).write_text(content)
    other = gguf_models.save_tiny("llama3", tmp_path / "other")
    larger, smaller = save_tiny(tmp_path / "larger"), save_tiny(tmp_path / "smaller", vocab_size=280)
    assert len(AutoTokenizer.from_pretrained(smaller)) > 280, "it must know tokens that the model has no row for"
    stranger = save_tiny(tmp_path / "stranger")
    tiny_tokenizer("the dog sat on a house and the mat ran to the cat. " * 20).save_pretrained(stranger)
    capsys.readouterr()  # what saving models printed
    for arguments, sentence in (
        ([str(tmp_path / "none.gguf"), "--text", text], "none.gguf: there is no such file"),
        ([str(tiny), "--text", str(tmp_path / "none.txt")], "none.txt: no such text file"),
        ([str(tiny), "--text", str(tmp_path / "empty.txt")], "empty.txt: holds no text"),
        (
            [str(tiny), "--text", str(tmp_path / "short.txt")],
            "text 'short' has 2 tokens, and protocol llama.cpp needs 512",
        ),
        ([str(tiny), "--text", text, "--base", str(other)], "puts token 1 in front of a text, the artifact's nothing"),
        ([str(tiny), "--text", text, "--base", str(stranger)], "tokenize the text differently from token"),
        ([str(smaller), "--text", text, "--base", str(larger)], "not the model it was made from"),
        ([str(tiny), "--text", text, "--base", "./none"], "./none: no such directory"),
    ):
        assert main(["eval", *arguments]) == 2
        said = capsys.readouterr().err
        assert sentence in said.replace("\n", " ")
        assert said.count("\n") == 1, "one sentence on one line"


def test_no_cache_leaves_nothing_and_cache_names_the_place(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    common = ["eval", str(tiny), "--base", str(tiny), "--text", text, "--window", "64", "--windows", "2", "--json", "-"]
    assert main([*common, "--no-cache"]) == 0
    assert not (tmp_path / "xdg").exists()
    assert main([*common, "--cache", str(tmp_path / "here")]) == 0
    assert not (tmp_path / "xdg").exists()
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert main(common) == 0
    assert len(list((tmp_path / "xdg" / "llmlite" / "base").iterdir())) == 1
