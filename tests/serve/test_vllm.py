"""`--engine vllm` with a stand-in for vLLM: its options, its restarts, its end with the server's in every way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "serve.py"
FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm") / "tiny-w4"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    return directory


@pytest.fixture
def path(tmp_path):
    shutil.copy(FAKE, tmp_path / "vllm")
    return f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"


def start(path, *arguments, **env):
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--engine", "vllm", "--port", "0"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PATH": path, **env}
    )


@contextmanager
def served(path, artifact, *options):
    process = start(path, artifact, *options)
    try:
        line = process.stdout.readline()
        assert " on vLLM, at " in line, process.communicate(timeout=10)
        yield process, line.strip().split(" at ")[1]
    finally:
        process.kill()
        process.communicate(timeout=30)


def chat(url, text="hello", model="tiny-w4"):
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=30)


def facts(answer):
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["choices"][0]["message"]["content"])


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_its_options_its_restart_and_an_end_by_sigterm(path, artifact):
    with served(path, artifact, "--name", "mine", "--context", "128", "--parallel", "3") as (process, url):
        first = facts(chat(url, model="mine"))
        assert first["artifact"] == str(artifact)
        options = first["options"]
        assert options.pop("--port").isdigit()
        assert options == {"--host": "127.0.0.1", "--served-model-name": "mine", "--max-model-len": "128", "--max-num-seqs": "3"}  # fmt: skip
        (card,) = httpx.get(f"{url}/models").json()["data"]
        assert card["id"] == "mine"
        assert str(artifact) not in str(card)
        assert chat(url, "die", "mine").status_code == 502
        assert wait(lambda: chat(url, model="mine").status_code == 200)
        second = facts(chat(url, model="mine"))
        assert second["pid"] != first["pid"]
        assert wait(lambda: gone(first["worker"])), "what the one that died had started is still there"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "started again" in err
        assert wait(lambda: gone(second["pid"]) and gone(second["worker"]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_it_does_not_outlive_a_server_that_is_killed(path, artifact):
    with served(path, artifact) as (process, url):
        found = facts(chat(url))
        os.kill(found["worker"], signal.SIGKILL)  # the stand-in doesn't end its worker when it is told to end
        process.kill()
        assert wait(lambda: gone(found["pid"]))


def test_one_that_ends_before_it_is_ready(path, artifact):
    process = start(path, artifact, FAKE_VLLM="fail")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")
    assert err.splitlines() == [
        "no accelerator here", "vLLM ended with status 1 before it was ready; its lines above say why"
    ]  # fmt: skip


def test_what_it_cannot_be_started_for(path, artifact, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for arguments, where, told in [
        ([artifact], "/usr/bin:/bin", "install vLLM"),
        ([tmp_path / "model.gguf"], path, "takes safetensors"),
        (["http://127.0.0.1:1/v1"], path, "takes one artifact"),
        ([artifact, artifact], path, "takes one artifact"),
    ]:
        out, err = start(where, *arguments).communicate(timeout=60)
        assert (out, err.count("\n")) == ("", 1), err
        assert told in err
