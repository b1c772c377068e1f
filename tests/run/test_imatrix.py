"""`llmlite imatrix`: the sums are transformers' and llama-imatrix's own on the same tokens, and what is refused."""

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.formats.gguf.imatrix import read_imatrix
from llmlite.run.imatrix import ImatrixSettings, measure_imatrix
from tests.formats.test_imatrix import LENGTH, ROWS, program, run, text
from tests.gguf_models import gguf_of, save_tiny

SHORT = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny checkpoints, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def saved_ids(directory, file, rows, length):
    """Token rows of the text, as a .npy file and as they are."""
    ids = np.array(AutoTokenizer.from_pretrained(directory)(text()).input_ids[: rows * length]).reshape(rows, length)
    np.save(file, ids)
    return str(file), ids


def hooked_sums(directory, ids):
    """Sums of squared inputs of every linear layer but the head in transformers, float64, by GGUF name."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = {}

    def add(name):
        def hook(_, args):
            found[name] = found.get(name, 0) + args[0].double().flatten(0, 1).square().sum(0)

        return hook

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer, short = name.split(".")[0], SHORT[name.rpartition(".")[2]]
            module.register_forward_pre_hook(add(f"blk.{layer}.{short}.weight"))
    with torch.no_grad():
        for row in ids:
            model(torch.from_numpy(row)[None])
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_sums_are_those_of_transformers(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlite.run.imatrix.BATCH_TOKENS", 48)  # three batches, the last one shorter
    file, ids = saved_ids(tiny(name), tmp_path / "ids.npy", 5, 24)
    out = tmp_path / "imatrix.gguf"
    measure_imatrix(tiny(name), out, ImatrixSettings(calibration=(file,)))
    assert sorted(os.listdir(tmp_path)) == ["ids.npy", "imatrix.gguf"]
    found, wanted = read_imatrix(out), hooked_sums(tiny(name), ids)
    assert found.sums.keys() == wanted.keys()
    for tensor, sums in wanted.items():
        torch.testing.assert_close(found.sums[tensor].double(), sums, rtol=1e-4, atol=0)
    assert set(found.counts.values()) == {ids.size}
    assert (found.chunk_count, found.chunk_size, found.datasets) == (5, 24, (file,))
    found.check(open_checkpoint(tiny(name)))


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("qwen2", False)])
def test_llama_imatrix_writes_the_same(name, tied, tiny, tmp_path):
    assert open_checkpoint(tiny(name)).tied == tied
    file, _ = saved_ids(tiny(name), tmp_path / "ids.npy", ROWS, LENGTH)
    (tmp_path / "text.txt").write_text(text())
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 1, "-ngl", 0]
    size = ["-c", LENGTH, "-b", LENGTH, "-ub", LENGTH, "--chunks", ROWS, "--no-ppl"]
    run(program("llama-imatrix"), "-m", gguf_of(tiny(name)), "-f", tmp_path / "text.txt", "-o", tmp_path / "theirs.gguf",
        *exact, *size)  # fmt: skip
    ours = measure_imatrix(tiny(name), tmp_path / "ours.gguf", ImatrixSettings(calibration=(file,)))
    theirs = read_imatrix(tmp_path / "theirs.gguf")
    assert ours.sums.keys() == theirs.sums.keys()
    assert ours.counts == theirs.counts
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    for tensor, sums in theirs.sums.items():
        torch.testing.assert_close(ours.sums[tensor], sums, rtol=1e-3, atol=0)


def test_llama_quantize_rounds_by_it(tiny, tmp_path):
    file, _ = saved_ids(tiny("llama"), tmp_path / "ids.npy", 2, 24)
    measure_imatrix(tiny("llama"), tmp_path / "i.gguf", ImatrixSettings(calibration=(file,)))
    given = ["--imatrix", tmp_path / "i.gguf", gguf_of(tiny("llama")), tmp_path / "q.gguf", "q4_0", 1]
    said = run(program("llama-quantize"), *given)
    assert "loaded 21 importance matrix entries" in said
    assert "computed on 2 chunks" in said


def test_a_gguf_file_is_measured_as_the_checkpoint_is(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(text())
    settings = ImatrixSettings(calibration=(str(tmp_path / "text.txt"),), calibration_tokens=96, row_length=32)
    one = measure_imatrix(tiny("llama"), tmp_path / "one.gguf", settings)
    two = measure_imatrix(gguf_of(tiny("llama")), tmp_path / "two.gguf", settings)
    assert one.counts == two.counts
    for tensor, sums in one.sums.items():
        torch.testing.assert_close(two.sums[tensor], sums, rtol=1e-5, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["one.gguf", "text.txt", "two.gguf"]


def test_without_a_text_the_packaged_mix_is_read_and_named(tiny, tmp_path):
    settings = ImatrixSettings(calibration_tokens=256, row_length=32)
    done = measure_imatrix(tiny("llama"), tmp_path / "i.gguf", settings)
    assert done.chunk_count == 8
    assert all(name.startswith("default:") for name in done.datasets)
    other = measure_imatrix(
        tiny("llama"), tmp_path / "j.gguf", ImatrixSettings(calibration_tokens=256, row_length=32, seed=1)
    )
    assert not torch.equal(done.sums["blk.0.attn_q.weight"], other.sums["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": ("nowhere.txt",)}, "nowhere.txt: no such text file"),
        ({"calibration": ("EMPTY",)}, "holds no text"),
        ({"calibration": ("SHORT",)}, "less than one row of 512 tokens"),
        ({"calibration_tokens": 100}, "--calibration-tokens 100 with --row-length 512"),
        ({"row_length": 1}, "--row-length 1"),
        ({"device": "tpu"}, "--device tpu"),
        ({"threads": 0}, "--threads 0"),
    ],
)
def test_what_can_not_be_measured_is_refused_and_leaves_nothing(tiny, tmp_path, changes, said):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a few words")
    files = {"EMPTY": str(tmp_path / "empty.txt"), "SHORT": str(tmp_path / "short.txt")}
    changes = {key: tuple(files.get(v, v) for v in value) if key == "calibration" else value
               for key, value in changes.items()}  # fmt: skip
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=said):
        measure_imatrix(tiny("llama"), tmp_path / "i.gguf", ImatrixSettings(**changes))
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "short.txt"]
    assert torch.get_num_threads() == before


def test_a_file_that_is_there_is_not_replaced(tiny, tmp_path):
    (tmp_path / "i.gguf").write_text("mine")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "gone")
    for name in ("i.gguf", "link.gguf"):
        with pytest.raises(InputError, match=rf"{name}: is there already"):
            measure_imatrix(tiny("llama"), tmp_path / name, ImatrixSettings(calibration_tokens=64, row_length=32))
    assert (tmp_path / "i.gguf").read_text() == "mine"
    with pytest.raises(InputError, match="its folder is not there"):
        measure_imatrix(tiny("llama"), tmp_path / "no" / "i.gguf", ImatrixSettings())
    assert sorted(os.listdir(tmp_path)) == ["i.gguf", "link.gguf"]


def test_inputs_that_are_not_finite_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_tiny("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = ImatrixSettings(calibration_tokens=64, row_length=32)
    with pytest.raises(InputError, match=r"inputs of model.layers.1.mlp.down_proj.weight are not all finite"):
        measure_imatrix(base, tmp_path / "i.gguf", settings)
    assert os.listdir(tmp_path) == ["base"]
