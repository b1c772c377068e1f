"""A GGUF file declared first and filled in any order, read back by the package gguf."""

import os

import numpy as np
import pytest
import torch

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.errors import InputError
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.types import encode, nbytes
from llmlite.formats.gguf.writer import GgufWriter
from tests.gguf_models import LlamaCpp, save_tiny

gguf = pytest.importorskip("gguf")

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.scores": [0.5, -1.0],
    "tokenizer.ggml.token_type": [1, 3],
}
LAYOUT = {"x.weight": ("f16", (3, 5)), "norm.weight": ("f32", (5,)), "y.weight": ("f16", (7, 2))}


def test_reader_sees_what_was_written(tmp_path):
    tensors = {name: torch.randn(shape) for name, (_, shape) in LAYOUT.items()}
    with GgufWriter(tmp_path / "m.gguf", METADATA, LAYOUT) as writer:
        for name in reversed(LAYOUT):
            writer.write(name, encode(tensors[name], LAYOUT[name][0]))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {**METADATA, "general.file_type": 1}
    for tensor in reader.tensors:
        kind, shape = LAYOUT[tensor.name]
        assert list(reversed(tensor.shape.tolist())) == list(shape)
        stored = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)).reshape(shape)
        wanted = tensors[tensor.name]
        assert torch.equal(stored, wanted.half().float() if kind == "f16" else wanted)


def test_mistakes_are_caught(tmp_path):
    with pytest.raises(ValueError, match="not a multiple of 32"):
        GgufWriter(tmp_path / "m.gguf", METADATA, {"x": ("q4_0", (4, 5))})
    writer = GgufWriter(tmp_path / "m.gguf", METADATA, LAYOUT)
    with pytest.raises(ValueError, match="not declared"):
        writer.write("z", np.zeros(1, dtype=np.uint8))
    with pytest.raises(ValueError, match="20 bytes, declared were 30"):
        writer.write("x.weight", np.zeros(20, dtype=np.uint8))
    writer.write("x.weight", np.zeros(30, dtype=np.uint8))
    with pytest.raises(ValueError, match="twice"):
        writer.write("x.weight", np.zeros(30, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"never written: norm.weight, y.weight \(2 in all\)"):
        writer.close()
    writer.abandon()


def test_a_file_opens_nowhere_before_close(tmp_path):
    file = tmp_path / "m.gguf"
    writer = GgufWriter(file, METADATA, LAYOUT)
    for name, (kind, shape) in LAYOUT.items():
        writer.write(name, encode(torch.ones(shape), kind))
    with pytest.raises(InputError, match="not a GGUF file"):
        read_gguf(file)
    with pytest.raises(ValueError, match="magic"):
        gguf.GGUFReader(file)
    writer.close()
    assert list(read_gguf(file).tensors) == list(LAYOUT)


def test_llama_cpp_does_not_load_a_file_that_was_abandoned(tmp_path):
    """Vocabulary only, so that a tiny header is enough: the closed file loads, the abandoned one does not."""
    pytest.importorskip("llama_cpp")
    for end in ("close", "abandon"):
        checkpoint = open_checkpoint(save_tiny("llama", tmp_path / end))
        layout = {"token_embd.weight": ("f32", (2, 64))}
        writer = GgufWriter(tmp_path / f"{end}.gguf", describe(checkpoint).metadata, layout)
        writer.write("token_embd.weight", np.zeros(2 * 64 * 4, dtype=np.uint8))
        (writer.close if end == "close" else writer.abandon)()
    LlamaCpp(tmp_path / "close.gguf", vocab_only=True).close()
    with pytest.raises(AssertionError, match="does not load"):
        LlamaCpp(tmp_path / "abandon.gguf", vocab_only=True)


def test_a_disk_that_is_too_small_says_so_at_the_start(tmp_path, monkeypatch):
    asked = []

    def full(handle, start, size):
        asked.append((start, size))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        GgufWriter(tmp_path / "m.gguf", METADATA, LAYOUT)
    assert asked[0][0] == 0
    assert asked[0][1] > sum(nbytes(*spec) for spec in LAYOUT.values())
