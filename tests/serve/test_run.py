"""The server as a process: how it starts, how it refuses to, how it ends."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from llmlite.errors import InputError
from llmlite.serve import run
from llmlite.serve.run import model_specs
from llmlite.serve.settings import ServeSettings
from tests.gguf_models import gguf_of, save_tiny

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "serve.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = save_tiny("llama", tmp_path_factory.mktemp("served"))
    gguf_of(directory)
    return directory


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--threads", "1", "--log-level", "warning"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_says_one_line_and_finishes_what_runs_on_sigterm(checkpoint):
    process = start(checkpoint / "f32.gguf", "--port", "0", "--name", "tiny")
    line = process.stdout.readline().strip()
    assert line.startswith("tiny on llama.cpp (llama-cpp-python ")
    assert "context 512 tokens" in line
    url = line.split(" at ")[1]
    assert [model["id"] for model in httpx.get(f"{url}/models").json()["data"]] == ["tiny"]
    body = {
        "model": "tiny",
        "prompt": "a",
        "seed": 1,
        "max_tokens": 400,
        "stream": True,
        "logit_bias": {"0": -100, "2": -100},
    }
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_port_in_use_is_one_sentence(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(checkpoint, "--port", taken.getsockname()[1])
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.count("\n") == 1
    assert "in use" in err
    assert out == ""


def test_an_adapter_that_was_made_for_other_weights_is_refused_and_for_another_config_remarked(
    checkpoint, tmp_path, monkeypatch
):
    """Its shapes would fit; what it would make of the replies, nobody asked for."""
    warned: list[str] = []
    monkeypatch.setattr(run.log, "warning", lambda said, *_: warned.append(said))
    base = {"source": "its-base", "config_sha256": "0" * 64, "weights_sha256": {"model.safetensors": "0" * 64}}
    for adapter in (tmp_path, tmp_path / "adapter.gguf"):
        adapter.touch()
        settings = ServeSettings(lora=(f"tuned={adapter}",))
        (tmp_path / "llmlite.json").write_text(json.dumps({"kind": "error adapter", "base": base}))
        with pytest.raises(
            InputError, match=f"{tmp_path}: makes good what rounding cost its-base, and .* other weights"
        ):
            model_specs(checkpoint, settings)
        (tmp_path / "llmlite.json").write_text(json.dumps({"kind": "adapter", "base": base}))
        warned.clear()
        with pytest.raises(InputError, match="lora"):  # there is no adapter in it
            model_specs(checkpoint, settings)
        assert f"{tmp_path}: was made for its-base, and" in warned[0]


@pytest.mark.parametrize(
    "what", ["truncated gguf", "no gguf", "truncated safetensors", "empty", "missing", "long context"]
)
def test_a_broken_artifact_is_one_sentence_and_no_port(what, checkpoint, tmp_path):
    artifact = tmp_path / "artifact"
    options = []
    match what:
        case "truncated gguf":
            artifact = tmp_path / "model.gguf"
            artifact.write_bytes((checkpoint / "f32.gguf").read_bytes()[:-5000])
        case "no gguf":
            artifact = tmp_path / "model.gguf"
            artifact.write_bytes(b"GGML" * 100)
        case "truncated safetensors":
            artifact.mkdir()
            for file in checkpoint.glob("*.json"):
                (artifact / file.name).write_bytes(file.read_bytes())
            (artifact / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-5000])
        case "empty":
            artifact.mkdir()
        case "long context":
            artifact = checkpoint / "f32.gguf"
            options = ["--context", "513"]
    process = start(artifact, "--port", "0", *options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert err.count("\n") == 1, err
    assert (str(artifact) in err) != bool(options)
    assert out == ""
