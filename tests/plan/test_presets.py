"""Every preset against llama-quantize's own code: llama_model_quantize with an importance matrix, on tiny models."""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.errors import InputError
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.metadata import imatrix_metadata
from llmlite.formats.gguf.types import nbytes
from llmlite.formats.gguf.writer import GgufWriter
from llmlite.plan.presets import PRESETS, find_preset, more_bits, outline, preset_name, preset_types
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from tests.gguf_models import TOKENIZERS, write_dense
from tests.tiny import save_tiny

SMALL = {"hidden_size": 32, "intermediate_size": 32}
# Where 256 does not divide a width, the type with blocks of 32 still tells which k-quant was meant.
MODELS = {
    "blocks of 256 fit, tied, 4 heads share": (
        "qwen2", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
                  "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "256 fits one width only, untied": (
        "llama", {"hidden_size": 288, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                  "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "widths of 64, biases": ("qwen2", {"num_hidden_layers": 9, "tie_word_embeddings": False}),
    "gemma": ("gemma3_text", {"num_hidden_layers": 16}),
    "5 heads share": (
        "qwen3", {"num_hidden_layers": 12, "num_attention_heads": 5, "num_key_value_heads": 1,
                  "tie_word_embeddings": False},
    ),
    "no blocks fit": ("llama", {"hidden_size": 80, "num_hidden_layers": 8, "tie_word_embeddings": False}),
    "no blocks fit, tied": ("llama", {"hidden_size": 80, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "30 layers": ("llama", {**SMALL, "num_hidden_layers": 30}),
    "70B": ("llama", {**SMALL, "num_hidden_layers": 80}),
    "80 layers, each head its own": ("llama", {**SMALL, "num_hidden_layers": 80, "num_key_value_heads": 4}),
    "80 layers of qwen2": ("qwen2", {**SMALL, "num_hidden_layers": 80, "num_key_value_heads": 4}),
}  # fmt: skip
ENDS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
IMATRIX = imatrix_metadata(file="imatrix.gguf", dataset="a text", entries=3, chunks=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """name -> (checkpoint, its f32 GGUF file), made once."""

    @cache
    def made(name: str) -> tuple[Checkpoint, Path]:
        family, changes = MODELS[name]
        directory = tmp_path_factory.mktemp("base")
        tokenizer = TOKENIZERS[family.removesuffix("_text")]()
        save_tiny(directory, family, vocab_size=tokenizer.get_vocab_size(), **changes)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ENDS).save_pretrained(directory)
        checkpoint = open_checkpoint(directory)
        return checkpoint, write_dense(checkpoint, directory / "f32.gguf")

    return made


def llama_quantize(source: Path, out: Path, preset: str) -> Path:
    """What llama-quantize does after it has read its command line: an importance matrix and its four keys."""
    api = pytest.importorskip("llama_cpp")
    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, find_preset(preset).ftype, preset.endswith("-pure")
    widths = {t.name: t.shape[1] for t in read_gguf(source).tensors.values() if len(t.shape) == 2}
    ones = np.ones(max(widths.values()), np.float32)
    data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entries = [api.llama_model_imatrix_data(name.encode(), data, width) for name, width in widths.items()]
    matrix = (api.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    params.imatrix = matrix
    overrides = (api.llama_model_kv_override * (len(IMATRIX) + 1))()
    for override, (key, value) in zip(overrides, IMATRIX.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag, override.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            override.tag, override.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
    params.kv_overrides = overrides
    assert api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


def written(checkpoint: Checkpoint, preset: str, out: Path, extra: dict) -> Path:
    """The file as the plan has it, with zeros for weights."""
    described, types = describe(checkpoint), type_table(parse_target(f"gguf:{preset}"), checkpoint.dtype, False)
    kinds = types.assign(checkpoint).types
    layout = {described.gguf_name(name): (kind, checkpoint.tensors[name].shape) for name, kind in kinds.items()}
    with GgufWriter(out, {**described.metadata, **types.metadata, **extra}, layout) as writer:
        for name, place in layout.items():
            writer.write(name, np.zeros(nbytes(*place), np.uint8))
    return out


def assert_same_file(mine: Path, theirs: Path) -> None:
    ours, wanted = read_gguf(mine), read_gguf(theirs)
    assert {t.name: t.type for t in ours.tensors.values()} == {t.name: t.type for t in wanted.tensors.values()}
    assert ours.metadata == wanted.metadata
    assert mine.stat().st_size == theirs.stat().st_size


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_types_metadata_and_size_are_llama_quantizes(model, tmp_path, name, preset):
    checkpoint, source = model(name)
    theirs = llama_quantize(source, tmp_path / "theirs.gguf", preset)
    assert_same_file(written(checkpoint, preset, tmp_path / "mine.gguf", IMATRIX), theirs)


@pytest.mark.parametrize("preset", ["q4_0-pure", "q4_k_s-pure", "q2_k-pure"])
@pytest.mark.parametrize("name", ["blocks of 256 fit, tied, 4 heads share", "256 fits one width only, untied"])
def test_pure_has_one_type_for_every_matrix(model, tmp_path, name, preset):
    checkpoint, source = model(name)
    theirs = llama_quantize(source, tmp_path / "theirs.gguf", preset)
    assert_same_file(written(checkpoint, preset, tmp_path / "mine.gguf", IMATRIX), theirs)


def test_the_program_llama_quantize_writes_a_file_of_the_same_size(model, tmp_path):
    program = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if program is None:
        pytest.skip("llama-quantize is not on the PATH, nor named by LLAMA_QUANTIZE")
    checkpoint, source = model("blocks of 256 fit, tied, 4 heads share")
    matrix = tmp_path / "imatrix.gguf"
    write_ones(matrix, source)
    for preset in ("q4_k_m", "q2_k_s", "q4_0"):
        theirs = tmp_path / f"{preset}.gguf"
        command = [program, "--imatrix", str(matrix), str(source), str(theirs), preset.upper(), "1"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        entries = read_gguf(theirs).metadata["quantize.imatrix.entries_count"]
        extra = imatrix_metadata(str(matrix), "a text", entries, 7)
        assert_same_file(written(checkpoint, preset, tmp_path / f"mine-{preset}.gguf", extra), theirs)


def write_ones(file: Path, source: Path) -> None:
    """An importance matrix of ones for every layer's matrices, as llama-imatrix writes it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "imatrix")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["a text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in read_gguf(source).tensors.values():
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            writer.add_tensor(f"{tensor.name}.in_sum2", np.ones((1, tensor.shape[1]), np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_q4_k_m_of_thirty_layers(model):
    checkpoint, _ = model("30 layers")
    shape = outline(checkpoint)
    layers = [layer for layer in range(30) if more_bits(layer, shape)]
    assert layers == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    down = preset_types(checkpoint, "Q4_K_M")["model.layers.5.mlp.down_proj.weight"]
    assert down == "q8_0"  # q6_k, whose blocks do not divide the width


def test_a_tied_copy_of_the_head_is_not_in_the_table(model):
    checkpoint, _ = model("blocks of 256 fit, tied, 4 heads share")
    assert "lm_head.weight" not in preset_types(checkpoint, "q4_k_m")


@pytest.mark.parametrize(
    ("text", "name"),
    [("Q4_K_M", "q4_k_m"), ("Q4_K", "q4_k_m"), ("iq4_XS", "iq4_xs"), ("Q4_0-PURE", "q4_0-pure"),
     ("q4_k-pure", "q4_k_m-pure"), ("q9", None), ("f16-pure", None)],
)  # fmt: skip
def test_names_in_any_case(text, name):
    assert preset_name(text) == name


def test_an_unknown_preset_is_told_the_nearest():
    with pytest.raises(InputError, match="near: q4_k_m"):
        find_preset("q4km")


def test_long_paths_are_cut_as_llama_quantize_cuts_them():
    keys = imatrix_metadata("/" + "é" * 80, "", 1, 0)
    assert len(keys["quantize.imatrix.file"].encode()) == 127
    assert set(keys) == {"quantize.imatrix.file", "quantize.imatrix.entries_count"}
