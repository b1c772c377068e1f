import json
import os
import shutil
import sys
from collections import namedtuple

import pytest

from llmlite.cli import main
from tests.tiny import edit_config, save_tiny


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lie(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[64,64]', b'"shape":[64,96]', 1))


def full(directory, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


CHAT = '{"messages": [{"role": "user", "content": "the cat sat on the mat"}]}\n'
CASES = {
    "full disk": (lambda d: None, [], "MiB free"),
    "truncated": (truncate, [], "truncated"),
    "lying header": (lie, [], "needs 24,576 bytes"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), ["--calibration", "CHAT"], "no chat template"),
    "unknown architecture": (lambda d: edit_config(d, model_type="mamba9"), [], "unknown architecture"),
    "indivisible width": (lambda d: None, ["--to", "compressed-tensors:w4a16g128"], "a group of 64 divides"),
    "unknown option": (lambda d: None, ["--slover", "rtn"], "unrecognized arguments: --slover"),
    "wrong choice": (lambda d: None, ["--solver", "magic"], "'magic'"),
    "wrong target": (lambda d: None, ["--to", "gguf:q9_9"], "types of gguf are"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, case):
    spoil, words, said = CASES[case]
    base = save_tiny(tmp_path / "base")
    chat = base / "chat.jsonl"
    chat.write_text(CHAT * 50)
    spoil(base)
    if case == "full disk":
        full(base, monkeypatch)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    words = [str(chat) if word == "CHAT" else word for word in words]
    if "--to" not in words:
        words += ["--to", "compressed-tensors:w4a16g64"]
    capsys.readouterr()
    assert main(["quantize", str(base), "-o", str(tmp_path / "out"), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("llmlite: ")
    assert said in err
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["import", "nowhere.gguf", "-o", "OUT"], "nowhere.gguf"),
        (["eval", "nowhere"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
        (["imatrix", "nowhere", "-o", "OUT"], "nowhere"),
        (["quantize", "nowhere", "-o", "OUT", "--to", "gguf:q8_0"], "nowhere"),
        ([], "VERB"),
        (["quantise"], "quantise"),
    ],
)
def test_each_verb_refuses_what_is_not_there(tmp_path, capsys, words, said):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_quantize_then_eval_by_the_command_line(tmp_path, capsys):
    base, out, text = save_tiny(tmp_path / "base"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the house. " * 60)
    facts = tmp_path / "facts.json"
    assert main(["quantize", str(base), "--to", "gguf:q8_0", "-o", str(out), "--json", str(facts)]) == 0
    assert "q8_0" in capsys.readouterr().out
    assert json.loads(facts.read_text())["format"] == "gguf:q8_0"
    words = ["eval", str(out), "--base", str(base), "--text", str(text), "--window", "64", "--windows", "2"]
    assert main([*words, "--json", "-"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["texts"]["text"]["divergence"]["mean_kl"] < 0.05
    assert measured["engine"]["name"] == "llama.cpp"
    kept = json.loads((out / "llmlite.json").read_text())["evals"]["llama.cpp"]
    assert kept["texts"] == measured["texts"]


def test_a_gguf_file_is_a_model_too(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    assert main(["quantize", str(base), "--to", "gguf:f32", "-o", str(tmp_path / "f32")]) == 0
    gguf = tmp_path / "f32" / "model.gguf"
    assert main(["quantize", str(gguf), "--to", "compressed-tensors:w8a16", "-o", str(tmp_path / "w8")]) == 0
    assert json.loads((tmp_path / "w8" / "llmlite.json").read_text())["base"]["source"] == str(gguf)
    assert sorted(os.listdir(tmp_path)) == ["base", "f32", "w8"]
    assert main(["quantize", str(base), "--to", "gguf:f32", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "name a directory" in capsys.readouterr().err


def test_an_importance_matrix_is_measured(tmp_path, capsys):
    base, out = save_tiny(tmp_path / "base"), tmp_path / "imatrix.gguf"
    words = ["imatrix", str(base), "-o", str(out), "--calibration-tokens", "256", "--row-length", "64"]
    assert main(words) == 0
    assert "14 linear layers over 256 tokens" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"GGUF")
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base", "imatrix.gguf"]


def test_the_module_runs_as_a_command(tmp_path):
    import subprocess

    run = subprocess.run([sys.executable, "-m", "llmlite.cli", "--version"], capture_output=True, text=True)
    assert run.stdout.startswith("llmlite 0.")


def test_a_broken_disk_is_status_3(tmp_path, monkeypatch, capsys):
    import llmlite.run.quantize as module

    def fails(*_, **_named):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(module, "open_sink", fails)
    base = save_tiny(tmp_path / "base")
    assert main(["quantize", str(base), "--to", "compressed-tensors:w8a16", "-o", str(tmp_path / "out")]) == 3
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["base"]
