"""An adapter in GGUF computes in llama.cpp as it does in peft, or is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.formats.gguf.lora import write_gguf_lora
from llmlite.formats.peft import AdapterWriter, read_adapter
from tests.adapters import EVERY, adapted, save_adapter
from tests.gguf_models import gguf_of, relative_gap, save_tiny

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("peft")

PROMPT = [1, 200, 37, 300, 301, 77, 78, 250, 9, 12, 280, 5, 60, 199, 31, 330]
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3, "1.mlp.up_proj": 5}},
    "few": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
            gguf_of(made[name])
        return made[name]

    return get


def exported(base: Path, adapter: Path, kind: str = "f32") -> Path:
    file = adapter / f"{kind}.gguf"
    write_gguf_lora(read_adapter(adapter), open_checkpoint(base).config, file, kind)
    return file


def llama_logits(base: Path, lora: Path | None) -> np.ndarray:
    from llmlite.evals.kv import F32

    llama = Llama(base / "f32.gguf", LlamaSettings(256, threads=1, kv=F32))
    if lora is not None:
        llama.use_lora(lora)
        llama.renew(128)  # an adapter outlives its context
    found = llama.decode(np.array(PROMPT), 0, np.ones(len(PROMPT), bool)).copy()
    llama.close()
    return found


def peft_logits(base: Path, adapter: Path) -> np.ndarray:
    with torch.no_grad():
        return adapted(base, adapter)(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.mark.parametrize(
    ("name", "settings"), [*(("llama", settings) for settings in SETTINGS), ("qwen3", "plain"), ("qwen3", "patterns")]
)
def test_llama_cpp_computes_what_peft_computes(bases, tmp_path, name, settings):
    base = bases(name)
    adapter = save_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    wanted, found = peft_logits(base, adapter), llama_logits(base, exported(base, adapter))
    assert relative_gap(wanted, llama_logits(base, None)) > 0.05
    assert relative_gap(wanted, found) < 1e-3


def test_an_untied_head_is_adapted_too(bases, tmp_path):
    base = bases("qwen2")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "v_proj"])
    assert relative_gap(peft_logits(base, adapter), llama_logits(base, exported(base, adapter))) < 1e-3


def test_float16_is_half_the_bytes_and_nearly_the_same(bases, tmp_path):
    base = bases("llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    half, whole = exported(base, adapter, "f16"), exported(base, adapter, "f32")
    sizes = [sum(t.nbytes for t in read_gguf(file).tensors.values()) for file in (half, whole)]
    assert 2 * sizes[0] == sizes[1]
    assert 0 < relative_gap(llama_logits(base, whole), llama_logits(base, half)) < 1e-2


def test_what_the_writer_writes_peft_and_llama_cpp_read(bases, tmp_path):
    base = bases("llama")
    shapes = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.2.mlp.down_proj": (64, 96)}
    torch.manual_seed(0)
    writer = AdapterWriter(tmp_path, shapes, 3, str(base))
    pairs = {m: (torch.randn(3, shape[1]), torch.randn(shape[0], 3)) for m, shape in shapes.items()}
    for module, pair in pairs.items():
        writer.write(module, *pair)
    writer.close()
    read = read_adapter(tmp_path)
    for module, (a, b) in pairs.items():
        got = read.pairs[module].applied(torch.zeros(read.pairs[module].shape))
        assert (got - b @ a).norm() < 1e-3 * (b @ a).norm()
    # peft puts a pair on layers 0 to 2 of both names: those that the file lacks do nothing
    assert relative_gap(peft_logits(base, tmp_path), llama_logits(base, exported(base, tmp_path))) < 1e-3


def test_dora_is_refused_for_llama_cpp_with_the_reason(bases, tmp_path):
    base = bases("llama")
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    with pytest.raises(InputError, match=r"DoRA.*only adds.*llmlite merge"):
        exported(base, adapter)
    assert not list(adapter.glob("*.gguf"))


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    other = save_tiny("llama", tmp_path / "other", hidden_size=32)
    adapter = save_adapter(other, tmp_path / "adapter")
    with pytest.raises(
        InputError, match=r"down_proj, a weight of \[32, 96\].*has a weight of \[64, 96\].*another base"
    ):
        exported(bases("llama"), adapter)
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=4)
    adapter = save_adapter(deeper, tmp_path / "deep")
    with pytest.raises(InputError, match=r"layers.3.*has no such layer"):
        exported(bases("llama"), adapter)
    tied = save_adapter(bases("qwen2"), tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(InputError, match="lm_head"):
        exported(bases("llama"), tied)


def test_adapters_that_are_more_than_pairs_are_refused(bases, tmp_path):
    base = bases("llama")
    whole = save_adapter(base, tmp_path / "whole", modules_to_save=["norm"])
    with pytest.raises(InputError, match=r"input_layernorm.weight.*whole tensors"):
        read_adapter(whole)
    embedding = save_adapter(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="embeddings can't be used"):
        read_adapter(embedding)
    plain = save_adapter(base, tmp_path / "plain", target_modules=EVERY[:1])
    config = json.loads((plain / "adapter_config.json").read_text())
    for key, value, said in (
        ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("peft_type", "LOHA", "peft_type LORA is right"),
    ):
        (plain / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=said):
            read_adapter(plain)
    for key, value, said in (
        ("r", 3, r"q_proj has a pair of rank 4; adapter_config.json says 3"),
        ("use_dora", True, "q_proj has no magnitudes; use_dora"),
        ("lora_alpha", None, "lora_alpha is None; a number is right"),
        ("init_lora_weights", "pissa_niter_4", "belongs to weights that peft changes"),
    ):
        (plain / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=said):
            read_adapter(plain)
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_adapter(plain / "adapter_model.safetensors")
    (plain / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_adapter(plain)
    (plain / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_adapter(plain)
    (plain / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(plain / "adapter_model.safetensors")
    lost = sorted(tensors)[0]
    save_file({name: t for name, t in tensors.items() if name != lost}, plain / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lacks a pair"):
        read_adapter(plain)


def test_the_verb_lora_writes_it_beside_peft_s_files(bases, tmp_path, capsys):
    base, chats = bases("llama"), tmp_path / "chats.jsonl"
    lines = [{"instruction": f"say {n} and {n + 3}", "output": f"the cat {n}, the dog {n + 3}"} for n in range(12)]
    chats.write_text("\n".join(map(json.dumps, lines)))
    words = ["lora", str(base), "--data", str(chats), "--steps", "3", "--rate", "0.05", "--gguf"]
    words += ["--length", "256", "--dtype", "float32", "-o", str(tmp_path / "out")]
    assert main([*words, "--kind", "dora"]) == 2
    assert "--gguf: llama.cpp only adds" in " ".join(capsys.readouterr().err.split())
    assert main(words) == 0
    wanted = peft_logits(base, tmp_path / "out")
    assert relative_gap(wanted, llama_logits(base, None)) > 0.02
    assert relative_gap(wanted, llama_logits(base, tmp_path / "out" / "adapter.gguf")) < 5e-3
