"""A run that was cut off goes on at the next decoder layer, and ends in the bytes of one that was not."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from llmlite.adapt import repair as adapt_repair
from llmlite.checkpoint import artifact
from llmlite.checkpoint.artifact import JOURNAL
from llmlite.errors import InputError, OutsideError
from llmlite.run import quantize as run_quantize
from llmlite.run import sinks
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.interruptible import started
from tests.tiny import save_tiny

TARGETS = [
    ("compressed-tensors:w4a16g32", "feedback"),
    ("gguf:q4_0", "feedback"),
    ("gguf:iq4_nl-pure", "feedback"),  # the head too, after the layers
    ("bnb:nf4", "feedback"),
    ("gguf:q8_0", "rtn"),
    ("compressed-tensors:w8a16", "rtn"),
]
# Forks a run that kills itself where "moment" says, or is killed after such a share of the time
# that an uninterrupted run takes, and tells whether a journal was left.
RUNS = """
    import json, os, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from llmlite.checkpoint import artifact
    from llmlite.run import journal, sinks
    from llmlite.run.quantize import QuantizeSettings, quantize
    base, out, settings, moments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function):
        def both(*given, **named):
            function(*given, **named)
            die()
        return both

    def at(moment):
        write = journal.Journal.write
        if moment == "before the journal":
            journal.Journal.write = lambda self, to: die() if self.layers == 2 else write(self, to)
        elif moment == "after the journal":
            journal.Journal.write = after(write)
        elif moment == "after the last layer's journal":
            journal.Journal.write = lambda self, to: (write(self, to), die() if self.layers == 4 else None)
        elif moment == "in a layer":
            for kind in (sinks.GgufSink, sinks.SafetensorsSink):
                def rounded(self, row, weight, take=kind.rounded):
                    take(self, row, weight)
                    if "layers.2.mlp" in row.name:
                        die()
                kind.rounded = rounded
        elif moment == "when all is written":
            artifact._flush = die

    started = time.monotonic()
    quantize(base, f"{out}-whole", QuantizeSettings(**settings))
    whole = time.monotonic() - started
    for number, moment in enumerate(moments):
        child = os.fork()
        if child == 0:
            at(moment)
            quantize(base, out, QuantizeSettings(**settings, resume=number > 0))
            os._exit(0)
        if isinstance(moment, float):
            time.sleep(moment * whole)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print((artifact.partial_of(artifact.Path(out)) / artifact.JOURNAL).exists())
"""


def made(tmp_path, layers, **settings):
    """A tiny checkpoint, calibration rows, and the settings to compress it with."""
    save_tiny(tmp_path / "base", num_hidden_layers=layers)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 320, (12, 48)))
    calibration = {} if settings.get("solver") == "rtn" else {"calibration": [str(tmp_path / "ids.npy")]}
    return {"to": "gguf:q4_0", "sweeps": 1, "threads": 1, **calibration, **settings}


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def runs(tmp_path, settings, moments):
    """The journal's presence after each run of ``settings``, cut off at the moments."""
    given = [str(tmp_path / "base"), str(tmp_path / "out"), json.dumps(settings), json.dumps(moments)]
    command = [sys.executable, "-c", textwrap.dedent(RUNS), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [line == "True" for line in done.stdout.splitlines()], done.stderr.replace("\n", " ")


@pytest.mark.parametrize(("to", "solver"), TARGETS)
def test_cut_off_at_every_kind_of_moment_it_ends_in_the_same_bytes(tmp_path, to, solver):
    settings = made(tmp_path, 4, to=to, solver=solver)
    moments = ["after the journal", "before the journal", "in a layer", "after the journal"]
    moments += ["after the last layer's journal", "when all is written"]
    journals, said = runs(tmp_path, settings, [*moments, "at the end"])
    assert journals == [True] * 6 + [False]
    assert [f"goes on at layer {n} of 4" in said for n in range(5)] == [False, True, True, True, True]
    assert digests(tmp_path / "out") == digests(tmp_path / "out-whole")  # and nothing else is in it
    assert sorted(os.listdir(tmp_path)) == ["base", "ids.npy", "out", "out-whole"]


@pytest.mark.parametrize("to", [pytest.param("compressed-tensors:w4a16g32", marks=pytest.mark.slow), "gguf:q4_0"])
def test_killed_at_five_random_moments_it_ends_in_the_same_bytes(tmp_path, to):
    settings = made(tmp_path, 6, to=to)
    moments = [random.Random(n).uniform(0.1, 0.6) for n in range(5)]
    runs(tmp_path, settings, [*moments, "at the end"])
    assert digests(tmp_path / "out") == digests(tmp_path / "out-whole")


def cut_off(tmp_path):
    settings = made(tmp_path, 3)
    assert runs(tmp_path, settings, ["after the journal"])[0] == [True]
    return settings


def test_another_run_than_the_one_that_was_cut_off_is_refused(tmp_path):
    settings = cut_off(tmp_path)
    ids = np.load(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", ids[::-1])
    changed = {**settings, "damping": 0.05, "seed": 1}
    with pytest.raises(InputError, match=r"differs in calibration, settings.damping, settings.seed;"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**changed, resume=True))
    np.save(tmp_path / "ids.npy", ids)
    save_tiny(tmp_path / "base", num_hidden_layers=3, seed=1)
    with pytest.raises(InputError, match=r"differs in base.model.safetensors;"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings, resume=True))
    assert (tmp_path / ".out.partial" / JOURNAL).is_file()


@pytest.mark.parametrize(
    ("file", "said"), [("model.gguf", "laid out"), (".original-1", "activations"), (".rounded-1", "activations")]
)
def test_an_unfinished_run_whose_files_were_changed_is_not_gone_on_with(tmp_path, file, said):
    settings = cut_off(tmp_path)
    with open(tmp_path / ".out.partial" / file, "r+b") as changed:
        changed.truncate(1000)
    with pytest.raises(InputError, match=f"{file}.*{said}.*begin again without --resume"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings, resume=True))


def test_without_the_option_it_begins_again_and_says_what_it_removes(tmp_path, capsys):
    settings = cut_off(tmp_path)
    quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings))
    assert "is removed; --resume would have gone on at layer 1" in capsys.readouterr().err.replace("\n", " ")
    assert digests(tmp_path / "out") == digests(tmp_path / "out-whole")


def test_with_nothing_to_resume_it_begins_at_the_beginning_and_says_so(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings("gguf:q8_0", solver="rtn", resume=True))
    assert "no unfinished run" in capsys.readouterr().err.replace("\n", " ")
    assert "resume" not in json.loads((tmp_path / "out" / "llmlite.json").read_text())["settings"]


def test_a_full_disk_keeps_what_can_be_gone_on_with_and_says_so(tmp_path, monkeypatch):
    settings, flush, calls = made(tmp_path, 3), sinks.GgufSink.flush, []

    def full(sink):
        calls.append(sink)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(sink)

    quantize(tmp_path / "base", tmp_path / "whole", QuantizeSettings(**settings))
    monkeypatch.setattr(sinks.GgufSink, "flush", full)
    with pytest.raises(OutsideError, match=r"No space left on device\); what is done is kept, and --resume goes on"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings))
    assert json.loads((tmp_path / ".out.partial" / JOURNAL).read_text())["layers"] == 1
    quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings, resume=True))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_interrupt_keeps_what_can_be_gone_on_with_and_says_so(tmp_path):
    save_tiny(tmp_path / "base", num_hidden_layers=8)
    script = "import sys; from llmlite.cli import main; sys.exit(main(sys.argv[1:]))"
    given = ["quantize", str(tmp_path / "base"), "--to", "gguf:q4_0", "-o", str(tmp_path / "out"), "--threads", "1"]
    command = [sys.executable, "-c", script, *given]
    run = started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.partial" / JOURNAL).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[1].splitlines()[-1]
    assert run.returncode == 130
    layers = json.loads((tmp_path / ".out.partial" / JOURNAL).read_text())["layers"]
    assert said == f"llmlite: interrupted; --resume goes on at layer {layers}"
    assert subprocess.run([*command, "--resume"], capture_output=True, timeout=500).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_a_disk_that_is_full_for_the_repair_keeps_the_rounding(tmp_path, monkeypatch):
    settings = made(tmp_path, 2, repair=True, repair_steps=8)
    quantize(tmp_path / "base", tmp_path / "whole", QuantizeSettings(**settings))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(adapt_repair, "keep_on_disk", full)
    with pytest.raises(OutsideError, match="what is done is kept, and --resume goes on"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings))
    monkeypatch.undo()
    quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings, resume=True))
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()


def test_repaired_weights_are_not_taken_for_rounded_ones_by_a_run_that_goes_on(tmp_path, monkeypatch):
    text = (str(tmp_path / "ids.npy"),)
    settings = made(tmp_path, 2, to="gptq:w2g32", solver="rtn", calibration=text, repair=True, repair_steps=16)
    assert quantize(tmp_path / "base", tmp_path / "whole", QuantizeSettings(**settings)).repaired.best_step > 0

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_quantize, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):  # it promises nothing
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings))
    monkeypatch.undo()
    assert not (tmp_path / ".out.partial").exists()


def test_the_disk_that_repair_needs_is_asked_for_before_anything_is_rounded(tmp_path, monkeypatch):
    settings = made(tmp_path, 2, repair=True, repair_steps=8)
    usage = artifact.shutil.disk_usage(tmp_path)
    free = artifact.SPARE_BYTES + 2 * 2**20  # enough for the tiny model's rounding
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: usage._replace(free=free))
    quantize(tmp_path / "base", tmp_path / "rounded", QuantizeSettings(**{**settings, "repair": False}))
    monkeypatch.setattr(adapt_repair, "TOP", 4096)  # of the base's predictions more than the tiny one has
    with pytest.raises(InputError, match=r"MiB free and .* MiB are needed"):
        quantize(tmp_path / "base", tmp_path / "out", QuantizeSettings(**settings))
    assert not (tmp_path / ".out.partial").exists()
