"""The server as a process: it drains, reloads, speaks TLS."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmlite.errors import InputError
from llmlite.serve.keys import StoredKey
from llmlite.serve.limits import Limits
from llmlite.serve.process import tls_context
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import error_of

GOOD, OTHER = "a-key-of-some-length-0001", "a-key-of-some-length-0002"
ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A server with the scripted engine, in a process of its own."""

    def __init__(self, settings):
        command = [sys.executable, "-m", "tests.serve.scripted_server", json.dumps(settings)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
        self.url = self.process.stdout.readline().strip()

    def signal(self, number):
        self.process.send_signal(number)

    def logged(self, what):
        """Reads the log up to a line that has ``what``."""
        for line in self.process.stderr:
            if what in line:
                return line
        raise AssertionError(f"never logged: {what}")

    def stream(self, prompt, events, **more):
        """Completes a prompt and puts the stream's events into a list as they come."""
        body = {"model": "model", "prompt": prompt, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60, **more) as answer:
            events += [line.removeprefix("data: ") for line in answer.iter_lines() if line]


@contextmanager
def serving(**settings):
    server = Process(settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def busy(server, count):
    wait(lambda: httpx.get(f"{server.url}/health").json().get("running", 0) == count)


def test_a_drain_finishes_what_runs_and_answers_503_to_the_rest():
    with serving(log_level="warning") as server:
        events, body = [], {"model": "model", "prompt": "say:a"}
        thread = threading.Thread(target=server.stream, args=("slow say:" + "x" * 60, events))
        thread.start()
        busy(server, 1)
        server.signal(signal.SIGTERM)
        wait(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        error_of(answer, 503, code="shutting_down")
        assert int(answer.headers["retry-after"]) > 0
        thread.join()
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "x" * 60
        out, err = server.process.communicate(timeout=20)
        assert (server.process.returncode, out, err) == (0, "", "")


def test_a_drain_ends_after_its_time_and_says_so_to_those_it_cuts_off():
    with serving(drain_seconds=0.3, log_level="warning") as server:
        events = []
        thread = threading.Thread(target=server.stream, args=("slow say:" + "x" * 390, events))
        thread.start()
        busy(server, 1)
        server.signal(signal.SIGTERM)
        thread.join()
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
        _, err = server.process.communicate(timeout=20)
        assert server.process.returncode == 0
        assert "1 requests are cut off" in err


def test_keys_are_read_again_on_sighup(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{StoredKey.of('a', GOOD, Limits())}\n")
    with serving(api_key_file=str(file)) as server:

        def status(key):
            return httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code

        assert (status(GOOD), status(OTHER)) == (200, 401)
        file.write_text("not a key file\n")
        server.signal(signal.SIGHUP)
        assert "line 1" in server.logged("API keys: the old stay")
        assert (status(GOOD), status(OTHER)) == (200, 401)
        file.write_text(f"{StoredKey.of('b', OTHER, Limits())}\n")
        server.signal(signal.SIGHUP)
        wait(lambda: status(OTHER) == 200)
        assert status(GOOD) == 401


def certificate(folder, name):
    """A certificate for localhost, signed by itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls_and_its_certificate_read_again(tmp_path):
    (cert, key), (new_cert, new_key) = certificate(tmp_path, "one"), certificate(tmp_path, "two")

    def status(trusted):
        context = ssl.create_default_context(cafile=str(trusted))
        return httpx.get(f"{server.url}/health", verify=context).status_code

    with serving(tls_cert=str(cert), tls_key=str(key)) as server:
        assert server.url.startswith("https://")
        assert status(cert) == 200
        old = shutil.copy(cert, tmp_path / "old.pem")
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health")
        os.replace(new_cert, cert)  # no longer the certificate of this key
        server.signal(signal.SIGHUP)
        server.logged("TLS certificate: the old stay")
        assert status(old) == 200
        os.replace(new_key, key)
        server.signal(signal.SIGHUP)
        server.logged("TLS certificate: read again")
        assert status(cert) == 200
        with pytest.raises(httpx.ConnectError):
            status(old)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_certificates_that_are_none(tmp_path):
    (cert, key), (_, other) = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    for broken in ((cert, other), (key, key), (cert, cert), (cert, tmp_path / "no"), (cert, locked)):
        with pytest.raises(InputError, match="are no certificate"):
            tls_context(ServeSettings(tls_cert=broken[0], tls_key=broken[1]))
    assert tls_context(ServeSettings(tls_cert=cert, tls_key=key)).minimum_version == ssl.TLSVersion.TLSv1_2
