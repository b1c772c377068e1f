import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.run import job, timing
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.interruptible import started
from tests.tiny import FAMILIES, edit_config, save_tiny, tiny_model

SMALL = {"calibration_tokens": 1024, "row_length": 64}
TARGETS = ["compressed-tensors:w4a16g32", "compressed-tensors:w8a16", "bnb:nf4", "bnb:int8"]


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60, device=model.device)[None]).logits.float().cpu()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_out_close_to_its_base_and_its_input_is_untouched(tmp_path, family, to):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_tiny(tmp_path / "base", family)
    before = digests(base)
    quantize(base, tmp_path / "out", QuantizeSettings(to, **SMALL))
    assert digests(base) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    want, got = logits(tiny_model(family)), logits(model)
    limit = 0.1 if "8" in to else 0.6
    assert (got - want).norm() < limit * want.norm()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_feedback_beats_rounding_to_nearest_on_text_that_it_was_not_calibrated_on(tmp_path):
    from transformers import AutoModelForCausalLM

    from llmlite.calibrate.corpus import default_corpora
    from llmlite.calibrate.rows import token_rows
    from tests.tiny import tiny_tokenizer

    base = save_tiny(tmp_path / "base")
    held_out = torch.from_numpy(token_rows(default_corpora(), tiny_tokenizer(), 1024, 64, seed=1).ids)
    with torch.no_grad():
        want = tiny_model()(held_out).logits.log_softmax(-1)
    divergence = {}
    for solver in ("rtn", "feedback"):
        settings = QuantizeSettings(
            "compressed-tensors:w4a16g32", solver=solver, calibration_tokens=8192, row_length=64
        )
        done = quantize(base, tmp_path / solver, settings)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / solver, dtype=torch.float32)
        with torch.no_grad():
            got = model(held_out).logits.log_softmax(-1)
        divergence[solver] = torch.nn.functional.kl_div(got, want, log_target=True, reduction="batchmean")
        assert all(0 < error < 0.1 for error in done.errors.values())
    sizes = [(tmp_path / s / "model.safetensors").stat().st_size for s in ("rtn", "feedback")]
    assert sizes[0] == sizes[1]
    assert divergence["feedback"] < 0.9 * divergence["rtn"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_few_bits_loses_less_of_the_logits_with_feedback(tmp_path, tied):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from llmlite.calibrate.corpus import default_corpora
    from llmlite.calibrate.rows import token_rows
    from tests.tiny import tiny_tokenizer

    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    held_out = torch.from_numpy(token_rows(default_corpora(), tiny_tokenizer(), 1024, 64, seed=1).ids)
    model = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        hidden = model.model(held_out).last_hidden_state.flatten(0, 1)
    rule = f"{'embed_tokens' if tied else 'lm_head'}=q4_0"
    lost = {}
    for solver in ("rtn", "feedback"):
        settings = QuantizeSettings(
            "gguf:q8_0", solver=solver, types=(rule,), calibration_tokens=8192, row_length=64, sweeps=1
        )
        done = quantize(base, tmp_path / solver, settings)
        (row,) = (row for row in done.plan.rows if row.type == "q4_0")
        assert row.solver == solver
        tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / solver / "model.gguf").tensors}
        tensor = tensors["token_embd.weight" if tied else "output.weight"]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        lost[solver] = float((hidden @ (model.lm_head.weight.detach() - weight).T).square().mean())
    assert lost["feedback"] < 0.7 * lost["rtn"]


def test_tokens_count_by_the_size_of_the_residual_stream_that_a_layer_writes_to(tmp_path, monkeypatch):
    base, model = save_tiny(tmp_path / "base", num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (4, 64)))
    np.save(tmp_path / "ids.npy", ids.numpy())
    taken, solve = [], job.solve
    monkeypatch.setattr(
        job, "solve", lambda weight, moments, *rest: (taken.append(moments), solve(weight, moments, *rest))[1]
    )
    quantize(
        base, tmp_path / "out", QuantizeSettings("compressed-tensors:w8a16", calibration=(str(tmp_path / "ids.npy"),))
    )
    seen = {}
    layer = model.model.layers[0]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach().flatten(0, 1)))
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0].detach().flatten(0, 1)))
    model(ids)
    x = seen["x"] / seen["stream"].square().mean(-1, keepdim=True).sqrt()
    got, want, alike = taken[-1].xxt, x.T @ x, seen["x"].T @ seen["x"]
    assert (got - want).norm() < 0.02 * want.norm()
    assert (got / got.norm() - alike / alike.norm()).norm() > 0.05, "else this would tell nothing"


def test_the_same_words_give_the_same_bytes(tmp_path):
    base = save_tiny(tmp_path / "base")
    settings = QuantizeSettings("gptq:w4g32", **SMALL)
    for name in ("a", "b"):
        quantize(base, tmp_path / name, settings)
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert a == b


def test_the_manifest_says_what_was_done(tmp_path):
    base = save_tiny(tmp_path / "base")
    done = quantize(base, tmp_path / "out", QuantizeSettings("gptq:w4g32-asym", desc_act=True, **SMALL))
    manifest = json.loads((tmp_path / "out" / "llmlite.json").read_text())
    assert manifest["format"] == "gptq:w4g32-asym"
    assert manifest["base"]["source"] == str(base)
    assert {row["name"] for row in manifest["plan"]} == open_checkpoint(base).tensors.keys()
    assert manifest["calibration"]["sources"][0]["source"] == "default:prose.jsonl"
    payload = sum(row["bytes"] for row in manifest["plan"])
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert payload < size < payload + 20_000
    assert done.plan.bytes == payload
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] is True
    assert config["sym"] is False


def test_a_base_on_a_low_bit_grid_is_recognized(tmp_path, capsys):
    from llmlite.quantize.rtn import round_to_nearest
    from llmlite.quantize.types import Grid

    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(round_to_nearest(weight, None, Grid(4, 32, "minimum")).dequantize())
    model.save_pretrained(tmp_path / "rounded")
    save_tiny(tmp_path / "trained")
    for name, flattered in (("rounded", True), ("trained", False)):
        settings = QuantizeSettings("compressed-tensors:w8a16", solver="rtn")
        done = quantize(tmp_path / name, tmp_path / f"{name}-out", settings)
        assert (done.on_low_bit_grid > 0.9) == flattered
        assert ("flatter" in capsys.readouterr().err) == flattered


def spoil_large(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] *= 1e30  # their product is beyond float32
    save_file(state, directory / "model.safetensors")


def spoil_nan(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "settings", "said"),
    [
        (spoil_nan, {}, "'model.layers.1.mlp.up_proj.weight' holds NaN"),
        (spoil_nan, {"solver": "rtn"}, "'model.layers.1.mlp.up_proj.weight' holds NaN"),
        (spoil_large, {}, r"the inputs of model.layers.1.mlp.down_proj are not all finite"),
        (spoil_large, {"solver": "imatrix"}, r"the inputs of model.layers.1.mlp.down_proj are not all finite"),
        (lambda d: (d / "chat_template.jinja").unlink(), {"calibration": "chat"}, "no chat template"),
        (lambda d: (d / "tokenizer.json").write_text("{"), {}, "tokenizer can't be loaded"),
        (lambda d: edit_config(d, vocab_size=300), {}, "vocab|shape"),
        (lambda d: None, {"desc_act": True}, "only gptq"),
        (lambda d: None, {"calibration_tokens": 3}, "at least one"),
        (lambda d: None, {"damping": 0.0}, "--damping"),
        (lambda d: None, {"solver": "rtn", "calibration": ("x.txt",)}, "only --solver feedback and imatrix use it"),
        (
            lambda d: None,
            {"to": "gptq:w8", "solver": "rtn", "desc_act": True},
            "only --solver feedback and imatrix use it",
        ),
        (lambda d: None, {"device": "tpu"}, "--device"),
    ],
)
def test_bad_input_ends_in_a_sentence_and_leaves_nothing(tmp_path, spoil, settings, said):
    base = save_tiny(tmp_path / "base")
    spoil(base)
    if isinstance(settings, dict):
        chat = tmp_path / "base" / "chat.jsonl"
        chat.write_text(json.dumps({"messages": [{"role": "user", "content": "the cat " * 200}]}) + "\n")
        if settings.get("calibration") == "chat":
            settings = {"calibration": (str(chat),)}
        settings = QuantizeSettings(**{"to": "compressed-tensors:w4a16g32", **SMALL, **settings})
    before = digests(base)
    with pytest.raises(InputError, match=said):
        quantize(base, tmp_path / "out", settings)
    assert os.listdir(tmp_path) == ["base"]
    assert digests(base) == before


@pytest.mark.parametrize("rows", [1, 7])
def test_fewer_rows_than_would_be_held_out_are_enough(tmp_path, rows):
    base = save_tiny(tmp_path / "base")
    settings = QuantizeSettings("gguf:q4_0", calibration_tokens=64 * rows, row_length=64, sweeps=1)
    errors = quantize(base, tmp_path / "out", settings).errors
    assert all(0 < error < 0.1 for error in errors.values())


def test_a_chat_that_the_template_refuses_is_one_sentence(tmp_path):
    base = save_tiny(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match=r"chat template \(no system role\)"):
        quantize(base, tmp_path / "out", QuantizeSettings("compressed-tensors:w4a16g32", **SMALL))


def test_values_beyond_float16_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][3] = 1e5
    save_file(state, base / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight has values beyond the range of torch.float16"):
        quantize(base, tmp_path / "out", QuantizeSettings("gptq:w4g32", solver="rtn"))
    assert os.listdir(tmp_path) == ["base"]


def test_a_model_without_a_chat_template_is_calibrated_on_the_default_text_alone(tmp_path):
    base = save_tiny(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    quantize(base, tmp_path / "out", QuantizeSettings("compressed-tensors:w4a16g32", **SMALL))
    sources = json.loads((tmp_path / "out" / "llmlite.json").read_text())["calibration"]["sources"]
    assert [s["source"] for s in sources] == [f"default:{name}.jsonl" for name in ("prose", "web", "code", "chinese")]


def test_too_little_disk_is_said_before_work(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    base = save_tiny(tmp_path / "base")
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="MiB free"):
        quantize(base, tmp_path / "out", QuantizeSettings("compressed-tensors:w8a16"))
    assert os.listdir(tmp_path) == ["base"]


def child(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_a_write_that_fails_midway_is_exit_status_3_and_leaves_nothing(tmp_path):
    base = save_tiny(tmp_path / "base")
    limit = 60_000  # bytes a file may have: less than the shard

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    script = "import sys; from llmlite.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "out"
    run = child(
        script, "quantize", str(base), "--to", "compressed-tensors:w8a16", "-o", str(out), preexec_fn=small_files
    )
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1] == f"llmlite: {out}: can't be written (File too large); nothing of it was kept"
    assert os.listdir(tmp_path) == ["base"]


KILLED = """
    import os, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from llmlite.run.quantize import QuantizeSettings, quantize
    base, out, to, wait = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
    settings = QuantizeSettings(to, calibration_tokens=4096, row_length=64, sweeps=1)
    for number, seconds in enumerate(map(float, wait)):
        child = os.fork()
        if child == 0:
            quantize(base, f"{out}{number}", settings)
            os._exit(0)
        time.sleep(seconds)
        os.kill(child, 9)
        os.waitpid(child, 0)
"""


@pytest.mark.parametrize("to", [pytest.param("compressed-tensors:w4a16g32", marks=pytest.mark.slow), "gguf:q4_0"])
def test_killed_at_five_random_moments_it_leaves_no_artifact_that_opens(tmp_path, to):
    from llmlite.evals.engines import open_engine

    base = save_tiny(tmp_path / "base", num_hidden_layers=8)
    before = digests(base)
    started = time.monotonic()
    quantize(base, tmp_path / "whole", QuantizeSettings(to, calibration_tokens=4096, row_length=64, sweeps=1))
    whole = time.monotonic() - started
    moments = [f"{random.Random(n).uniform(0.02, 0.9) * whole:.3f}" for n in range(5)]
    run = child(KILLED, str(base), str(tmp_path / "out"), to, *moments)
    assert run.returncode == 0, run.stderr
    assert digests(base) == before
    left = [path for path in tmp_path.iterdir() if path.name not in ("base", "whole")]
    finished = [path for path in left if not path.name.startswith(".")]
    assert len(finished) < 5, "no run was killed in time"
    for path in left:
        if path in finished:
            assert digests(path).keys() == digests(tmp_path / "whole").keys()
            continue
        unhidden = tmp_path / f"moved{path.name}"  # even under a name that nobody would refuse
        path.rename(unhidden)
        with pytest.raises(InputError):
            open_engine(unhidden)


PEAK = """
    import sys
    from llmlite.run.quantize import QuantizeSettings, quantize
    base, out, to = sys.argv[1:]
    quantize(base, out, QuantizeSettings(to, calibration_tokens=512, row_length=128, sweeps=0, threads=1))
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.parametrize("to", [pytest.param("compressed-tensors:w4a16g64", marks=pytest.mark.slow), "gguf:q4_0"])
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path, to):
    peaks, weights = {}, {}
    for layers in (3, 15):
        base = save_tiny(tmp_path / f"base{layers}", num_hidden_layers=layers, hidden_size=512, intermediate_size=1536)
        weights[layers] = (base / "model.safetensors").stat().st_size
        run = child(PEAK, str(base), str(tmp_path / f"out{layers}"), to)
        assert run.returncode == 0, run.stderr
        peaks[layers] = int(run.stdout.split()[-1]) * 1024
    # A run that held all the weights would grow by their whole difference, 150 MB; the heap alone differs by up to 40.
    assert peaks[15] - peaks[3] < 0.6 * (weights[15] - weights[3]), peaks


def test_an_interrupt_cleans_up(tmp_path):
    base = save_tiny(tmp_path / "base", num_hidden_layers=8)
    script = "import sys; from llmlite.cli import main; print('in', flush=True); sys.exit(main(sys.argv[1:]))"
    command = ["quantize", str(base), "--to", "compressed-tensors:w4a16g32", "-o", str(tmp_path / "out")]
    run = started([sys.executable, "-c", script, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert os.listdir(tmp_path) == ["base"]


def test_the_time_that_is_told_before_work_grows_with_layers_and_calibration_text(tmp_path, capsys):
    """On a clock that ticks once whenever it is read: each timed block takes one second."""

    def told(layers: int, tokens: int) -> float:
        base = save_tiny(tmp_path / f"base{layers}-{tokens}", num_hidden_layers=layers)
        out = tmp_path / f"out{layers}-{tokens}"
        settings = QuantizeSettings("compressed-tensors:w4a16g32", calibration_tokens=tokens, row_length=64, sweeps=1)
        with pytest.MonkeyPatch.context() as patch:
            ticks = itertools.count()
            patch.setattr(timing, "_now", lambda: float(next(ticks)))
            quantize(base, out, settings)
        assert not [file for file in out.iterdir() if file.name.startswith(".")]
        err = capsys.readouterr().err
        said = re.search(r"time: about (\d+) seconds for the rounding", err)
        assert said, err
        return float(said[1])

    # In each layer one load and four solutions, and for each batch four stages and two networks' outputs.
    assert told(2, 2048) == 2 * (1 + 4 + 6 * 2048 / job.BATCH_TOKENS)
    assert told(1, 4096) == 1 + 4 + 6 * 4096 / job.BATCH_TOKENS
