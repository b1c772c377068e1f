"""Files that are not what they say: each refused in one sentence, and nothing is written."""

import random
from dataclasses import replace

import numpy as np
import pytest

from llmlite.checkpoint import gguf_import
from llmlite.checkpoint.families import family_of_gguf
from llmlite.checkpoint.gguf_config import import_config
from llmlite.checkpoint.gguf_header import GgufTensor, read_gguf
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.checkpoint.gguf_names import ROPE_FREQS
from llmlite.checkpoint.gguf_tokenizer import import_tokenizer
from llmlite.errors import InputError
from tests.gguf_models import gguf_of, save_tiny

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return gguf_of(save_tiny("qwen2", tmp_path_factory.mktemp("qwen2")))


def rewritten(good, path, drop=(), tensors=None, **metadata):
    """A copy of a GGUF file with keys replaced (None: left out; dots as __), tensors dropped or replaced."""
    reader = gguf.GGUFReader(good)
    changes = {key.replace("__", "."): value for key, value in metadata.items()}
    fields = {k: (f.contents(), f.types) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    architecture = changes.pop("general.architecture", fields["general.architecture"][0])
    writer = gguf.GGUFWriter(path, architecture)
    for key, (value, types) in fields.items():
        value = changes.pop(key, value)
        if key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, types[0], types[1] if len(types) > 1 else None)
    for key, value in changes.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, (tensors or {}).get(tensor.name, tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(file, out) -> str:
    with pytest.raises(InputError) as error:
        import_gguf(file, out)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_header_agrees_with_the_reference_reader(good):
    ours, theirs = read_gguf(good), gguf.GGUFReader(good)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.start, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert list(mine.shape[::-1]) == tensor.shape.tolist()


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(good, tmp_path, share):
    raw = good.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(raw[: int(len(raw) * share)])
    assert "truncated" in refused(short, tmp_path / "out")


def test_any_damage_to_the_header_is_an_input_error_or_harmless(good, tmp_path):
    """300 files with bytes of the header overwritten at random: none may raise anything but InputError."""
    raw = bytearray(good.read_bytes())
    end = min(tensor.start for tensor in read_gguf(good).tensors.values())
    dice = random.Random(5)
    damaged = tmp_path / "damaged.gguf"
    errors = 0
    for _ in range(300):
        copy = bytearray(raw)
        for _ in range(dice.choice([1, 4, 16])):
            copy[dice.choice([dice.randrange(end), dice.randrange(200)])] = dice.randrange(256)
        damaged.write_bytes(copy)
        try:
            read_gguf(damaged)
        except InputError:
            errors += 1
    assert errors > 100


def test_not_gguf(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in refused(file, tmp_path / "out")
    assert "no such file" in refused(tmp_path / "none.gguf", tmp_path / "out")
    file.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    assert "version 1" in refused(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general__architecture": "mamba"}, ["unknown architecture 'mamba'", "qwen2"]),
        ({"qwen2__expert_count": 8}, ["qwen2.expert_count = 8"]),
        ({"qwen2__embedding_length": 32}, ["shape", "implies"]),
        ({"qwen2__block_count": 4}, ["says 4 layers", "tensors of 3"]),
        ({"qwen2__block_count": 4_000_000_000}, ["says 4000000000 layers"]),
        ({"qwen2__attention__head_count": None}, ["qwen2.attention.head_count is None"]),
        ({"qwen2__attention__head_count": 0}, ["qwen2.attention.head_count is 0"]),
        ({"qwen2__attention__head_count_kv": 3}, ["3 key heads"]),
        (
            {
                f"qwen2__{key}": 7
                for key in ("attention__key_length", "attention__value_length", "rope__dimension_count")
            },
            ["an even number of channels"],
        ),
        ({"qwen2__attention__value_length": 64}, ["value_length"]),
        ({"tokenizer__ggml__pre": "surprise"}, ["'surprise'", "smollm"]),
        ({"tokenizer__ggml__pre": "smollm"}, ["by other rules"]),
        ({"tokenizer__ggml__pre": None}, ["tokenizer.ggml.pre"]),
        ({"tokenizer__ggml__model": "bert"}, ["'bert'"]),
        ({"tokenizer__ggml__tokens": ["a"]}, ["tokenizer.ggml.tokens"]),
        ({"tokenizer__ggml__merges": ["a zz"]}, ["merge of 'a' and 'zz'"]),
        ({"split__count": 3}, ["3 parts"]),
        ({"split__count": "three"}, ["split.count is 'three'"]),
        ({"drop": ("blk.1.ffn_up.weight",)}, ["'blk.1.ffn_up.weight' is missing"]),
        ({"drop": ("token_embd.weight",)}, ["'token_embd.weight' is missing"]),
    ],
)
def test_headers_that_do_not_fit_are_refused_in_one_sentence(good, tmp_path, change, words):
    message = refused(rewritten(good, tmp_path / "x.gguf", **change), tmp_path / "out")
    for word in words:
        assert word in message


HOSTILE = (
    None, True, False, 0, 1, -1, 3, 2**63, -0.0, 0.5, -1.5, 1e300, float("nan"), float("inf"), "", "x", "\ud7ff\x00/..",
    [], [0], [-1], [2**40], [0.5, float("nan")], [True], [""], ["a", "b"], ["a b", "c"],
)  # fmt: skip
EXTRA = (
    "qwen2.rope.scaling.type", "qwen2.rope.scaling.factor", "qwen2.rope.scale_linear", "tokenizer.chat_templates",
    "qwen2.rope.scaling.original_context_length", "tokenizer.ggml.scores", "tokenizer.ggml.eot_token_id",
    "tokenizer.chat_template.x", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_space_prefix",
)  # fmt: skip


def test_keys_of_any_type_are_an_input_error_or_harmless(good, tmp_path):
    source = read_gguf(good)
    family = family_of_gguf("qwen2", str(good))
    messages = []
    for key in (*source.metadata, *EXTRA):
        for value in HOSTILE:
            for others in ({}, {"tokenizer.ggml.model": "llama"}, {"tokenizer.chat_templates": ["x"]}):
                changed = replace(source, metadata={**source.metadata, **others, key: value})
                try:
                    config = import_config(changed, family)
                    if key.startswith("qwen2."):
                        gguf_import._members(changed, family, config)
                    tokenizer = import_tokenizer(changed.metadata, str(good))
                    gguf_import._generation(tokenizer)
                    if "chat" in key:
                        tokenizer.save(tmp_path)
                except InputError as error:
                    messages.append(str(error))
    assert len(messages) > 1000
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("theta", [1.0, 1e4, 1e38])
def test_rope_factors_of_any_value_are_an_input_error_or_llama3s(good, tmp_path, theta):
    dice = np.random.default_rng(5)
    source = read_gguf(good)
    source.metadata["qwen2.rope.freq_base"] = theta
    file = tmp_path / "factors"
    messages = []
    for trial in range(200):
        factors = dice.choice([0, 1, 1.5, 2, 3, 4, 8, -1, 1e-38, 3e38, np.inf, np.nan], 8).astype(np.float32)
        (np.sort(factors) if trial % 2 else factors).tofile(file)
        tensors = {**source.tensors, ROPE_FREQS: GgufTensor(ROPE_FREQS, "f32", (8,), file, 0, 32)}
        try:
            import_config(replace(source, tensors=tensors), family_of_gguf("qwen2", str(good)))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 190
