"""An artifact read as real numbers computes what its own reader computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.formats.dequantized import dequantized_gguf, gguf_file, open_dequantized
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.gguf_models import gguf_of, relative_gap
from tests.gguf_models import save_tiny as save_real
from tests.tiny import save_tiny

IDS = torch.arange(3, 60)[None]
READ = ["compressed-tensors:w4a16g32", "bnb:nf4", "bnb:int8", "compressed-tensors:w8a8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def made(base: Path, out: Path, to: str) -> Path:
    quantize(base, out, QuantizeSettings(to, solver="rtn"))
    return out


def logits(checkpoint, base: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in checkpoint.tensors:
        value = checkpoint.read(name)
        assert value.shape == checkpoint.tensors[name].shape
        model.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        return model(IDS).logits[0]


@pytest.mark.parametrize("to", READ)
def test_it_computes_what_transformers_computes(base, tmp_path, to):
    artifact = made(base, tmp_path / "out", to)
    mine = logits(open_dequantized(artifact), base)
    its = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = its(IDS).logits[0].float()
    own = logits(open_checkpoint(base), base)
    limit = 0.15 if "w8a8" in to else 0.05  # transformers rounds the inputs too
    assert (mine - wanted).norm() < limit * wanted.norm()
    assert (mine - own).norm() > 0.002 * own.norm()


@pytest.mark.parametrize("to", ["gptq:w3g32", "gptq:w4", "gguf:q4_0"])
def test_a_weight_is_the_nearest_on_its_grid(base, tmp_path, to):
    artifact = made(base, tmp_path / "out", to)
    file = gguf_file(artifact)
    whole = open_checkpoint(base)
    read = open_dequantized(artifact) if file is None else dequantized_gguf(whole, file)
    for name in whole.tensors:
        weight, seen = whole.read(name).float(), read.read(name).float()
        if "_proj" in name:
            assert 0.02 < (weight - seen).norm() / weight.norm() < 0.3
            assert len(seen[0, :32].unique()) <= 16
        elif not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.allclose(weight, seen, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_gguf_file_comes_back_in_the_checkpoints_order(tmp_path, name):
    directory = save_real(name, tmp_path / "base")
    whole = open_checkpoint(directory)
    read = dequantized_gguf(whole, gguf_of(directory))
    for tensor in whole.tensors:
        assert relative_gap(whole.read(tensor).numpy(), read.read(tensor).numpy()) < 1e-6


def test_what_is_not_as_the_config_says_is_refused(base, tmp_path):
    artifact = made(base, tmp_path / "out", "gptq:w4g32")
    config = json.loads((artifact / "config.json").read_text())
    for change, said in (
        ({"quant_method": "awq"}, "'awq' in a way that is not read here"),
        ({"bits": 5}, "of a kind that is not read here"),
    ):
        changed = {**config, "quantization_config": config["quantization_config"] | change}
        (artifact / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            open_dequantized(artifact)
    changed = {**config, "quantization_config": config["quantization_config"] | {"bits": 8}}
    (artifact / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"up_proj.qweight.* its config implies"):
        open_dequantized(artifact).read("model.layers.0.mlp.up_proj.weight")
    (artifact / "config.json").write_text(json.dumps(config))
    tensors = load_file(artifact / "model.safetensors")
    gone = "model.layers.1.self_attn.v_proj"
    save_file({n: t for n, t in tensors.items() if not n.startswith(gone)}, artifact / "model.safetensors")
    with pytest.raises(InputError, match=f"{gone}.weight' is missing"):
        open_dequantized(artifact)
    other = save_tiny(tmp_path / "other", intermediate_size=64)
    with pytest.raises(InputError, match="not made from"):
        dequantized_gguf(open_checkpoint(other), gguf_file(made(base, tmp_path / "g", "gguf:q4_0")))
