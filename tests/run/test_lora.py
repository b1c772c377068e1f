"""The verb lora on tiny models: what it writes, how it goes on, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmlite.adapt.lora import AdapterTask
from llmlite.adapt.training_state import STATE
from llmlite.checkpoint.artifact import partial_of
from llmlite.cli import main
from llmlite.errors import InputError, OutsideError
from llmlite.run.lora import LoraSettings, lora
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.tiny import save_tiny, tiny_tokenizer

PROMPT = [{"role": "user", "content": "say 1 the house"}]
ANSWERS = ("the cat sat on the mat", "the dog ran to the house", "the mat and the dog sat")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [{"prompt": f"say {n} the house", "completion": ANSWERS[n % 3]} for n in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(data: Path, **changes) -> LoraSettings:
    wanted = {"steps": 12, "rate": 1e-2, "length": 128, "judge_every": 4, "save_every": 2, "rank": 4, "threads": 1}
    return LoraSettings(data=(str(data),), dtype="float32", device="cpu", **{**wanted, **changes})


def test_an_adapter_that_peft_and_the_server_load(base, data, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    from llmlite.serve.engines.base import Piece
    from llmlite.serve.engines.transformers import TransformersEngine
    from llmlite.serve.settings import ServeSettings

    done = lora(base, tmp_path / "out", settings(data))
    assert done.trained.after < 0.8 * done.trained.before and done.counts.used == 24
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "llmlite.json", "loss.png"}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    place = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert place == str(base.resolve())
    ids = tiny_tokenizer().apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), tmp_path / "out").eval()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0, -1]
    engine = TransformersEngine(base, ServeSettings(threads=1, lora=(f"tuned={tmp_path / 'out'}",)))
    ours = engine.step([Piece(engine.open(ids, adapter="tuned"), ids, 1)])[0][0]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)
    assert tiny_tokenizer().decode(theirs.argmax()).strip() in ("the", "t")


def test_the_manifest_says_what_was_done(base, data, tmp_path):
    done = lora(base, tmp_path / "out", settings(data, kind="rslora", targets=("q_proj", "v_proj")))
    manifest = json.loads((tmp_path / "out" / "llmlite.json").read_text())
    assert manifest["kind"] == "adapter" and manifest["base"]["kept"] == "16 bits"
    assert list(manifest["base"]["weights_sha256"]) == ["model.safetensors"]
    assert manifest["training"]["losses"] == list(done.trained.losses) and len(done.trained.losses) == 12
    assert manifest["training"]["judged"][0] == [0, done.trained.before]
    assert manifest["settings"]["kind"] == "rslora" and manifest["settings"]["targets"] == ["q_proj", "v_proj"]
    assert manifest["data"]["packed"] is True and manifest["data"]["conversations"]["used"] == 24
    assert manifest["data"]["sources"][0]["source"] == str(data)


def next_token(model: Path, adapter: Path | None) -> str:
    """What the server's engine answers first."""
    from llmlite.serve.engines.base import Piece
    from llmlite.serve.engines.transformers import TransformersEngine
    from llmlite.serve.settings import ServeSettings

    ids = tiny_tokenizer().apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    engine = TransformersEngine(model, ServeSettings(threads=1, lora=() if adapter is None else (f"tuned={adapter}",)))
    sequence = engine.open(ids, adapter=None if adapter is None else "tuned")
    return tiny_tokenizer().decode(engine.step([Piece(sequence, ids, 1)])[0][0].argmax())


@pytest.mark.parametrize("to", ["bnb:nf4", "gptq:w4g32", "compressed-tensors:w4a16g32", "on the fly"])
def test_an_adapter_of_a_quantized_base(base, data, tmp_path, to):
    if to in ("bnb:nf4", "on the fly"):
        pytest.importorskip("bitsandbytes")
    model = base
    if to != "on the fly":
        model = tmp_path / "quantized"
        quantize(base, model, QuantizeSettings(to, solver="rtn"))
    done = lora(model, tmp_path / "out", settings(data, quantize="bnb:nf4" if to == "on the fly" else None))
    assert done.trained.after < 0.8 * done.trained.before
    if to in ("bnb:nf4", "compressed-tensors:w4a16g32"):
        answer = next_token(model, tmp_path / "out")
        assert answer.strip() in ("the", "t") and next_token(model, None) != answer
    assert done.base == {"gptq:w4g32": "gptq, 4 bits", "compressed-tensors:w4a16g32": "compressed-tensors, 4 bits"}.get(
        to, "bnb:nf4"
    )


class Stop:
    """Lets some forward passes through, then raises what an interrupt raises."""

    def __init__(self, monkeypatch, passes: int):
        self.left, inner = passes, AdapterTask.loss

        def loss(task, rows):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return inner(task, rows)

        monkeypatch.setattr(AdapterTask, "loss", loss)


def test_an_interrupted_run_goes_on_with_the_same_losses(base, data, tmp_path, capsys, monkeypatch):
    expected = lora(base, tmp_path / "whole", settings(data)).trained
    with monkeypatch.context() as patched:
        Stop(patched, 7)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            lora(base, tmp_path / "out", settings(data))
    assert not (tmp_path / "out").exists() and (partial_of(tmp_path / "out") / STATE).is_file()
    with pytest.raises(InputError, match=r"differs in settings\.rate"):
        lora(base, tmp_path / "out", settings(data, resume=True, rate=2e-2))
    with monkeypatch.context() as patched:
        counting = Stop(patched, 100)
        found = lora(base, tmp_path / "out", settings(data, resume=True)).trained
    assert (found.losses, found.judged) == (expected.losses, expected.judged) and counting.left == 100 - 6
    assert "resumed" in capsys.readouterr().err
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "llmlite.cli", "lora", str(base), "--data", str(data), "-o", str(out), "--steps", "40",
        "--length", "128", "--rank", "4", "--rate", "0.01", "--save-every", "1", "--threads", "1", "--device", "cpu",
        "--dtype", "float32", "--patience", "0", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_with_the_same_losses(base, data, tmp_path):
    subprocess.run(command(base, data, tmp_path / "whole"), check=True)
    process = subprocess.Popen(command(base, data, tmp_path / "out"))
    state = partial_of(tmp_path / "out") / STATE
    while not state.is_file():
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(command(base, data, tmp_path / "out", "--resume"), check=True)
    losses = [
        json.loads((tmp_path / name / "llmlite.json").read_text())["training"]["losses"] for name in ("whole", "out")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 40


@pytest.mark.slow
def test_two_processes_train_what_one_does(base, data, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    more = ("--batch-rows", "2", "--checkpointing", "off")
    subprocess.run(command(base, data, tmp_path / "one", *more), check=True)
    two = command(base, data, tmp_path / "two", *more)
    subprocess.run([*launch, "-m", *two[2:]], check=True)
    losses = [
        json.loads((tmp_path / name / "llmlite.json").read_text())["training"]["losses"] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def spoiled(folder: Path, *records: object) -> Path:
    file = folder / "spoiled.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_bad_input_is_one_sentence_and_leaves_nothing(base, data, tmp_path):
    empty = spoiled(tmp_path, {"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " "})
    cases = [
        (base, replace(settings(data), data=()), "--data is missing"),
        (base, settings(empty), "2 of 2 conversations have an empty answer"),
        (base, settings(tmp_path / "none.jsonl"), "no such text file"),
        (base, settings(data, length=10), "24 of 24 conversations are longer than --length 10"),
        (base, settings(data, length=9999), "the model reads 256 tokens at most"),
        (base, settings(data, held_out=0.0), "--held-out 0.0"),
        (base, settings(data, rank=0), "--rank 0"),
        (base, settings(data, targets=("w1",)), "--targets w1"),
        (base, settings(data, quantize="nf4"), "bnb:nf4 or bnb:int8 is right"),
        (Path("model.gguf"), settings(data), "GGUF files can't be trained on"),
        (tmp_path, settings(data), "has no config.json"),
    ]
    for model, wanted, told in cases:
        with pytest.raises(InputError, match=told):
            lora(model, tmp_path / "out", wanted)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["spoiled.jsonl"]


def test_without_a_chat_template_it_is_refused(data, tmp_path):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        lora(model, tmp_path / "out", settings(data))


def test_a_tokenizer_of_another_model_is_refused(data, tmp_path):
    model = save_tiny(tmp_path / "model", vocab_size=200)
    with pytest.raises(InputError, match=r"gives the data token id \d+, and the model has 200 tokens"):
        lora(model, tmp_path / "out", settings(data))
    assert not list(tmp_path.glob("*out*"))


def test_a_loss_that_is_not_a_number_is_exit_status_3_and_leaves_nothing(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AdapterTask, "loss", lambda task, rows: math.nan * next(iter(task.parameters().values())).sum())
    arguments = ["lora", str(base), "--data", str(data), "-o", str(tmp_path / "out"), "--length", "128"]
    assert main(arguments) == OutsideError.exit_status == 3
    assert "the loss is nan at step 1" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(base, data, tmp_path, capsys):
    facts = tmp_path / "facts.json"
    arguments = ["lora", str(base), "--data", str(data), "-o", str(tmp_path / "out"), "--steps", "2", "--length", "128"]
    assert main([*arguments, "--json", str(facts)]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert json.loads(facts.read_text())["steps"] == 2
