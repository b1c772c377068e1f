"""GGUF to a Hugging Face checkpoint: the same weights, the same token ids, the same template."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gguf_models import (
    CHATS,
    CONFIGS,
    TEMPLATE,
    TEXTS,
    LlamaCpp,
    gguf_of,
    relative_gap,
    save_tiny,
    transformers_logits,
)
from transformers import AutoConfig, AutoTokenizer

from llmlite.checkpoint.artifact import read_manifest
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.errors import InputError

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
    """Tiny checkpoints, and the f32 GGUF files of them, made once."""
    made = {}

    def get(name):
        if name not in made:
            directory = save_tiny(name, tmp_path_factory.mktemp(name))
            made[name] = directory, gguf_of(directory)
        return made[name]

    return get


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
        elif key == "sliding_window" and now.get("layer_types") == ["full_attention"] * 3:
            continue
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
