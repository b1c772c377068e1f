"""A GGUF file declared first and filled in any order, read back by the package gguf."""

import numpy as np
import pytest
import torch

from llmlite.formats.gguf.types import encode
from llmlite.formats.gguf.writer import GgufWriter

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
