"""What rounding cost comes back as an adapter: on text it was not fitted to, in peft and in llama.cpp."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.adapt.error_adapters import ErrorAdapterSettings
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.evals.kv import F32
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.formats.dequantized import dequantized_gguf, open_dequantized
from llmlite.formats.peft import read_adapter
from llmlite.quantize.low_rank import low_rank
from llmlite.run.error_adapters import Calibration, make_error_adapter
from llmlite.run.merge import MergeSettings, merge
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.gguf_models import relative_gap
from tests.tiny import save_tiny

pytest.importorskip("peft")

TEXT = Calibration(calibration_tokens=4096, row_length=64)
QERA = ErrorAdapterSettings("qera", rank=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def artifact(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "w3"
    quantize(base, out, QuantizeSettings("gptq:w3g32", calibration_tokens=4096, row_length=64))
    return out


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    from llmlite.calibrate.corpus import default_corpora
    from llmlite.calibrate.rows import token_rows
    from tests.tiny import tiny_tokenizer

    return torch.from_numpy(token_rows(default_corpora(), tiny_tokenizer(), 2048, 64, seed=9).ids)


def divergence(base: Path, checkpoint, adapter: Path | None, ids: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
        pairs = read_adapter(adapter).pairs if adapter else {}
        for name in checkpoint.tensors:
            weight, pair = checkpoint.read(name), pairs.get(name.removesuffix(".weight"))
            model.get_parameter(name).data.copy_(weight if pair is None else pair.applied(weight))
        q = model(ids).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_divergence_falls_and_more_where_inputs_weigh(base, artifact, held_out, tmp_path):
    rounded, found = open_dequantized(artifact), {}
    for init in ("qera", "loftq"):
        done = make_error_adapter(str(artifact), str(base), tmp_path / init, replace(QERA, init=init), TEXT)
        found[init] = divergence(base, rounded, tmp_path / init, held_out)
        assert done.before.keys() == done.after.keys() == read_adapter(tmp_path / init).pairs.keys()
        assert sum(done.after.values()) < 0.9 * sum(done.before.values())
        assert not list((tmp_path / init).glob(".*"))
    before = divergence(base, rounded, None, held_out)
    assert found["qera"] < 0.7 * before
    assert found["qera"] < found["loftq"] < before


def test_eora_is_the_same_product(base, artifact, tmp_path):
    weights = []
    for init in ("qera", "eora"):
        make_error_adapter(str(artifact), str(base), tmp_path / init, replace(QERA, init=init), TEXT)
        weights.append((tmp_path / init / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_loftq_is_the_plain_truncation_of_each_error(base, artifact, tmp_path):
    make_error_adapter(str(artifact), str(base), tmp_path / "out", replace(QERA, init="loftq"), TEXT)
    whole, rounded = open_checkpoint(base), open_dequantized(artifact)
    for module, pair in read_adapter(tmp_path / "out").pairs.items():
        weight = rounded.read(f"{module}.weight")
        b, a = low_rank(whole.read(f"{module}.weight") - weight, 8)
        assert torch.allclose(pair.applied(weight), weight + b @ a, atol=1e-3)


def test_of_a_gguf_artifact_llama_cpp_computes_the_same(base, tmp_path, held_out):
    quantize(base, tmp_path / "q4", QuantizeSettings("gguf:q4_0", solver="rtn"))
    make_error_adapter(str(tmp_path / "q4"), str(base), tmp_path / "out", QERA, TEXT)
    rounded = dequantized_gguf(open_checkpoint(base), tmp_path / "q4" / "model.gguf")
    assert divergence(base, rounded, tmp_path / "out", held_out) < 0.7 * divergence(base, rounded, None, held_out)
    llama = Llama(tmp_path / "q4" / "model.gguf", LlamaSettings(128, threads=1, kv=F32))
    ids = held_out[0].numpy()
    plain = llama.decode(ids, 0, np.ones(len(ids), bool)).copy()
    llama.clear()
    llama.use_lora(tmp_path / "out" / "adapter.gguf")
    adapted = llama.decode(ids, 0, np.ones(len(ids), bool)).copy()
    llama.close()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(held_out[:1]).logits[0].numpy()
    assert relative_gap(wanted, adapted) < 0.8 * relative_gap(wanted, plain)


def test_it_belongs_to_one_artifact(base, artifact, tmp_path):
    make_error_adapter(str(artifact), str(base), tmp_path / "adapter", replace(QERA, init="loftq"), TEXT)
    with pytest.raises(InputError, match="makes good what rounding cost"):
        merge(base, tmp_path / "adapter", tmp_path / "out", MergeSettings())
    merge(artifact, tmp_path / "adapter", tmp_path / "out", MergeSettings())
    manifest = json.loads((tmp_path / "adapter" / "llmlite.json").read_text())
    assert manifest["bytes"] == sum(t.nbytes for t in _tensors(tmp_path / "adapter"))
    assert manifest["relative_error"]["after"] < manifest["relative_error"]["before"]


def _tensors(adapter: Path) -> list:
    from llmlite.checkpoint.safetensors_index import read_header

    return list(read_header(adapter / "adapter_model.safetensors").values())


def test_what_makes_no_sense_is_refused(base, artifact, tmp_path):
    def refused(said: str, model: Path, of: Path, settings: ErrorAdapterSettings = QERA) -> None:
        with pytest.raises(InputError, match=said):
            make_error_adapter(str(model), str(of), tmp_path / "out", settings, TEXT)
        assert not list(tmp_path.glob("*out*"))

    refused(r"rank 40: .* from 1 to 32 is right", artifact, base, ErrorAdapterSettings(rank=40))
    refused("is not quantized", base, base)
    other = save_tiny(tmp_path / "other", vocab_size=330)
    refused("was not made from .*other", artifact, other)
    (artifact / "llmlite.json").rename(tmp_path / "aside")
    narrow = save_tiny(tmp_path / "narrow", intermediate_size=96)
    refused("an artifact of another base", artifact, narrow)
    (tmp_path / "aside").rename(artifact / "llmlite.json")


def test_the_verb_makes_it_and_training_goes_on_from_it(base, artifact, tmp_path, capsys):
    words = ["lora", str(artifact), "--init", "qera", "--rank", "8", "--calibration-tokens", "4096"]
    made, trained = tmp_path / "made", tmp_path / "trained"
    assert main([*words, "--base", str(base), "--steps", "0", "-o", str(made), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["relative_error"]["after"] < 0.9 * facts["relative_error"]["before"]
    chats = tmp_path / "chats.jsonl"
    lines = [{"instruction": f"say {n} and {n + 3}", "output": f"the cat {n}, the dog {n + 3}"} for n in range(12)]
    chats.write_text("\n".join(map(json.dumps, lines)))
    more = ["--data", str(chats), "--steps", "1", "--rate", "1e-9", "--length", "64", "--dtype", "float32"]
    assert main([*words, "--base", str(base), *more, "-o", str(trained)]) == 0
    first, second = (read_adapter(folder).pairs for folder in (made, trained))
    for module, pair in first.items():
        zero = torch.zeros(pair.shape)
        assert torch.allclose(pair.applied(zero), second[module].applied(zero), atol=1e-4)
    assert json.loads((trained / "llmlite.json").read_text())["kind"] == "error adapter"
    capsys.readouterr()
    for wrong, said in (
        (["--steps", "0"], "--base is missing"),
        (["--base", str(base), "--kind", "dora", "--steps", "0"], "--kind: does not go with --init qera"),
        (["--base", str(base), "--data", "chats.jsonl", "--steps", "0"], "--data: with --steps 0 nothing is trained"),
        (["--base", str(base), "--revision", "main", "--steps", "0"], "--revision: does not go with --init qera"),
        (
            ["--base", str(base), "--init", "loftq", "--steps", "0"],
            "--calibration-tokens: does not go with --init loftq",
        ),
    ):
        assert main([*words, *wrong, "-o", str(tmp_path / "none")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert main(["lora", str(artifact), "--data", str(chats), "--base", str(base), "-o", str(tmp_path / "none")]) == 2
    assert "--base: says what --init" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()
