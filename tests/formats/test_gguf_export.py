"""A checkpoint exported to GGUF computes and tokenizes in llama.cpp as it does in transformers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.checkpoint import pretokenizers
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.types import TYPES, encode, grid_of, pack, unpack
from llmlite.formats.gguf.writer import GgufWriter
from llmlite.quantize.rtn import round_to_nearest
from tests.gguf_models import (
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

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

SLIDING = ["sliding_attention"] * 3
# Channels of a super-block, and weights small enough that the activations' rounding to 8 bits is not blown up.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "initializer_range": 0.04}
PROMPT = [1, 200, 37, 300, 301, 77, 78, 250, 9, 12, 280, 5, 60, 199, 31, 330]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny checkpoints and their f32 GGUF files, made once; ``wide``: 256 input channels everywhere."""
    made = {}

    def get(name, wide=False):
        if (name, wide) not in made:
            directory = save_tiny(name, tmp_path_factory.mktemp(name), **(WIDE if wide else {}))
            made[name, wide] = directory, gguf_of(directory)
        return made[name, wide]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, tiny):
    directory, file = tiny(name)
    reader = LlamaCpp(file)
    wanted, found = transformers_logits(directory, PROMPT), reader.logits(PROMPT)
    first = reader.logits(PROMPT[:1])
    reader.close()
    assert relative_gap(wanted, found) < 1e-3
    assert relative_gap(wanted[:1], first) < 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_token_ids_equal_those_of_transformers(name, tiny):
    directory, file = tiny(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reader = LlamaCpp(file, vocab_only=True)
    for text in [*TEXTS, *CHATS, "x <tool_call>{}<table> "]:
        assert reader.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
        assert reader.tokenize(text, add=True) == tokenizer(text).input_ids, text
    reader.close()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_type_loads_and_computes_with_the_rounded_weights(kind, name, tiny, tmp_path):
    """Against transformers on the dequantized weights; llama.cpp rounds activations to 8 bits beside grids."""
    directory, _ = tiny(name, wide=TYPES[kind].grid is not None)
    checkpoint = open_checkpoint(directory)
    described = describe(checkpoint)
    layout = {
        described.gguf_name(n): ("f32" if len(entry.shape) == 1 else kind, entry.shape)
        for n, entry in checkpoint.tensors.items()
    }
    state = {}
    with GgufWriter(tmp_path / "m.gguf", described.metadata, layout) as writer:
        for n in checkpoint.tensors:
            tensor = checkpoint.read(n)
            target = described.gguf_name(n)
            if tensor.ndim == 1 or TYPES[kind].grid is None:
                data = encode(described.to_gguf(n, tensor), layout[target][0])
                state[n] = unpack(data, layout[target][0], tensor.shape)
            else:
                rounded = round_to_nearest(described.to_gguf(n, tensor), None, grid_of(kind))
                data = pack(rounded, kind)
                state[n] = rounded.dequantize()
            rows = described.rows(n)
            if rows is not None:
                state[n] = state[n][rows.argsort()]
            writer.write(target, data)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
    reader = LlamaCpp(tmp_path / "m.gguf")
    found = reader.logits(PROMPT)
    reader.close()
    assert relative_gap(wanted, found) < {"f32": 1e-5, "f16": 3e-3, "bf16": 2e-2}.get(kind, 4e-2)


def test_rows_may_be_ordered_before_or_after_rounding(tiny):
    checkpoint = open_checkpoint(tiny("llama")[0])
    described = describe(checkpoint)
    name = "model.layers.1.self_attn.k_proj.weight"
    weight, rows = checkpoint.read(name), described.rows(name)
    assert torch.equal(described.to_gguf(name, weight), weight[rows])
    assert not torch.equal(rows, torch.arange(len(rows)))
    whole = round_to_nearest(weight, None, grid_of("q4_1"))
    assert torch.equal(round_to_nearest(weight[rows], None, grid_of("q4_1")).codes, whole.codes[rows])
    assert described.rows("model.layers.1.self_attn.v_proj.weight") is None


def test_metadata_says_what_the_tokenizer_does(tiny):
    described = describe(open_checkpoint(tiny("llama3")[0])).metadata
    assert described["tokenizer.ggml.pre"] == "llama-bpe"
    assert described["tokenizer.ggml.add_bos_token"] is True
    assert described["tokenizer.chat_template"] == TEMPLATE
    assert described["tokenizer.ggml.eot_token_id"] == described["tokenizer.ggml.eos_token_id"] == 2
    assert described["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert described["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    gemma = describe(open_checkpoint(tiny("gemma3")[0])).metadata
    assert gemma["tokenizer.ggml.model"] == "llama"
    assert gemma["tokenizer.ggml.add_space_prefix"] is False
    assert gemma["gemma3.attention.sliding_window_pattern"] == [True, False, True]


@pytest.fixture
def copy_of(tiny, tmp_path):
    """A checkpoint with one JSON file changed by a function."""

    def make(name, file, change):
        shutil.copytree(tiny(name)[0], tmp_path / "copy", ignore=shutil.ignore_patterns("*.gguf"))
        path = tmp_path / "copy" / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return tmp_path / "copy"

    return make


def set_split(spec):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\p{L}+"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2", set_split, "no known name in llama.cpp"),
        ("qwen2", lambda spec: spec.update(normalizer={"type": "NFKC"}), "no known name in llama.cpp"),
        ("qwen2", lambda spec: spec["model"].update(ignore_merges=True), "no known name in llama.cpp"),
        ("qwen2", lambda spec: spec.update(pretokenizers.to_json(pretokenizers.BY_NAME["gpt-2"])), "by other rules"),
        ("gemma3", lambda spec: spec["model"]["merges"].pop(7), "not those of a SentencePiece model"),
        ("gemma3", lambda spec: spec.update(pre_tokenizer={"type": "WhitespaceSplit"}), "no equal of it"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_equal_of_is_refused(name, change, words, copy_of):
    directory = copy_of(name, "tokenizer.json", change)
    with pytest.raises(InputError, match=words):
        describe(open_checkpoint(directory))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
            "sliding",
        ),
        ("gemma3", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar 20"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute_are_refused(name, change, words, copy_of):
    directory = copy_of(name, "config.json", lambda config: config.update(change))
    with pytest.raises(InputError, match=words):
        describe(open_checkpoint(directory))


def test_missing_tokenizer_and_missing_template(copy_of):
    directory = copy_of("llama", "config.json", lambda config: None)
    (directory / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in describe(open_checkpoint(directory)).metadata
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="neither tokenizer"):
        describe(open_checkpoint(directory))
