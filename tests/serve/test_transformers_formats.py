"""The engine for safetensors checkpoints on compressed ones, and with low-rank adapters."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.errors import InputError
from llmlite.run.quantize import QuantizeSettings, quantize
from llmlite.serve.engines.base import Piece
from llmlite.serve.engines.transformers import TransformersEngine
from llmlite.serve.settings import ServeSettings
from tests.tiny import save_tiny

NEEDS = {"bnb": "bitsandbytes", "compressed-tensors": "compressed_tensors", "gptq": "gptqmodel"}
# Largest difference of a logit, of logits up to 6, from the same checkpoint's in one forward without a cache. With
# bitsandbytes a single token is multiplied by another kernel than many are, in bfloat16.
FORMATS = {"bnb:nf4": 0.3, "bnb:int8": 0.3, "compressed-tensors:w4a16g32": 1e-4, "gptq:w4g32": 0.05}


def ids(count, seed):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


@pytest.mark.parametrize("to", FORMATS)
def test_compressed_checkpoints(to, tmp_path):
    pytest.importorskip(NEEDS[to.partition(":")[0]])
    base = save_tiny(tmp_path / "base", "qwen3")
    quantize(base, tmp_path / "out", QuantizeSettings(to, solver="rtn", calibration_tokens=1024, row_length=64))
    engine = TransformersEngine(tmp_path / "out", ServeSettings(threads=1, parallel=3))
    prompts = [ids(count, count) for count in (40, 7, 90)]
    sequences = [engine.open(prompt) for prompt in prompts]
    engine.step([Piece(s, prompt, 0) for s, prompt in zip(sequences, prompts, strict=True)])
    for token in (5, 6):
        rows = engine.step([Piece(sequence, [token], 1) for sequence in sequences])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for sequence, row in zip(sequences, rows, strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([sequence.tokens], device=model.device)).logits[0, -1].float().cpu().numpy()
        np.testing.assert_allclose(row[0], wanted, atol=max(FORMATS[to], 0.05 * (model.device.type == "cuda")), rtol=0)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base and two adapters of it, one of them with a head of its own."""
    peft = pytest.importorskip("peft")
    top = tmp_path_factory.mktemp("lora")
    base = save_tiny(top / "base", "qwen3")
    for seed, (name, more) in enumerate({"short": {}, "long.er": {"modules_to_save": ["lm_head"]}}.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **more)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for weight in (w for n, w in model.named_parameters() if "modules_to_save" in n):
            weight.data.add_(0.05 * torch.randn_like(weight))
        model.save_pretrained(top / name)
    return top


def logits(adapted, name, tokens):
    import peft

    model = AutoModelForCausalLM.from_pretrained(adapted / "base")
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, adapted / name).merge_and_unload()
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0, -1].numpy()


def test_an_adapter_for_each_sequence(adapted):
    names = ("short", "long.er")
    lora = tuple(f"{name}={adapted / name}" for name in names)
    engine = TransformersEngine(adapted / "base", ServeSettings(threads=1, parallel=4, lora=lora))
    kinds = [None, *names]
    sequences = []
    for name in kinds:
        sequences.append(engine.open(ids(50, 1), adapter=name))
        assert sequences[-1].reused == 0, "keys and values of one adapter are not another's"
        engine.step([Piece(sequences[-1], ids(50, 1), 0)])
    for token in (7, 9):
        rows = [engine.step([Piece(sequence, [token], 1)])[0] for sequence in sequences]
    wanted = [logits(adapted, name, sequences[0].tokens) for name in kinds]
    for row, want in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row[0], want, atol=1e-4, rtol=0)
    assert min(np.abs(wanted[a] - wanted[b]).max() for a, b in [(0, 1), (0, 2), (1, 2)]) > 0.1
    plain = TransformersEngine(adapted / "base", ServeSettings(threads=1))
    vectors = [list(model.embed([ids(40, 2)]))[-1] for model in (engine, plain)]
    np.testing.assert_allclose(*vectors, atol=1e-6)  # embeddings are the plain model's
    other = engine.open(ids(60, 1), adapter="short")
    assert other.reused == 50
    engine.close(other, keep=False)
    unknown = engine.open([5], adapter="none")
    with pytest.raises(InputError, match="'none': is not loaded"):
        engine.step([Piece(unknown, [5], 1)])


def make_other_rank(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))


def make_pissa(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))


def make_pickle(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def make_prompt_tuning(directory):
    (directory / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')


REFUSALS = [
    (lambda directory: (directory / "adapter_config.json").unlink(), "must be a directory with an adapter_config.json"),
    (make_pickle, "weights in pickle files are not read"),
    (make_prompt_tuning, "is a PROMPT_TUNING adapter; LORA is served"),
    (make_other_rank, "does not fit this model: it has another shape of .*lora_A"),
    (make_pissa, "belongs to weights that peft changes"),
]


@pytest.mark.parametrize(("break_it", "told"), REFUSALS, ids=["none", "pickle", "prompt tuning", "other rank", "pissa"])
def test_what_is_no_adapter_of_this_model_is_refused(break_it, told, adapted, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (adapted / "short").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    break_it(broken)
    with pytest.raises(InputError, match=told):
        TransformersEngine(adapted / "base", ServeSettings(threads=1, lora=(f"x={broken}",)))


def test_without_peft_the_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    base = save_tiny(tmp_path / "base")
    with pytest.raises(InputError, match=r"need the Python package peft.*pip install '\.\[lora\]'"):
        TransformersEngine(base, ServeSettings(threads=1, lora=("x=y",)))
