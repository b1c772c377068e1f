"""`llmlite import`: what is refused, what a stopped run leaves, and the memory it takes."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmlite.checkpoint import artifact, gguf_import
from llmlite.checkpoint.checkpoint import expected_shapes, open_checkpoint
from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.errors import InputError
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.types import encode, nbytes
from llmlite.formats.gguf.writer import GgufWriter
from llmlite.run.import_gguf import ImportSettings, run_import
from tests.gguf_models import TEMPLATE, gguf_of, save_tiny, write_dense

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(base):
    return gguf_of(base)


def test_no_config_before_the_last_weight_is_on_the_disk(file, tmp_path, monkeypatch):
    """What a killed run leaves must open nowhere; the partial directory is looked into at every tensor."""
    partial = tmp_path / ".out.partial"
    seen, real = [], gguf_import._weight

    def looking(*arguments):
        seen.append(sorted(os.listdir(partial)))
        with pytest.raises(InputError):
            open_checkpoint(partial)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(gguf_import, "_weight", looking)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(file, tmp_path / "out")
    assert len(seen) == 9
    assert all("model.safetensors" in names and "config.json" not in names for names in seen)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_said_before_work(file, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**10))
    with pytest.raises(InputError, match=r"MiB free and .* MiB are needed"):
        run_import(file, tmp_path / "new" / "out", ImportSettings())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("dtype", "value", "way_out"), [("float16", 1e5, "bfloat16 or float32"), ("bfloat16", 3.4e38, "float32")]
)
def test_a_weight_that_the_dtype_cannot_hold_is_refused(base, tmp_path, dtype, value, way_out):
    checkpoint = open_checkpoint(base)
    model = describe(checkpoint)
    layout = {model.gguf_name(name): ("f32", entry.shape) for name, entry in checkpoint.tensors.items()}
    with GgufWriter(tmp_path / "m.gguf", model.metadata, layout) as writer:
        for name in checkpoint.tensors:
            tensor = model.to_gguf(name, checkpoint.read(name)).clone()
            if "layers.1.mlp.up_proj" in name:
                tensor[3, 4] = -value
            writer.write(model.gguf_name(name), encode(tensor, "f32"))
    with pytest.raises(InputError, match=f"'blk.1.ffn_up.weight' holds .* too large for {dtype}; use {way_out}$"):
        run_import(tmp_path / "m.gguf", tmp_path / "out", ImportSettings(dtype=dtype))
    assert os.listdir(tmp_path) == ["m.gguf"]
    run_import(tmp_path / "m.gguf", tmp_path / "out", ImportSettings())
    assert open_checkpoint(tmp_path / "out").read("model.layers.1.mlp.up_proj.weight")[3, 4] == torch.tensor(-value)


def test_named_chat_templates_come_through(base, tmp_path):
    """Both ways: a checkpoint's additional_chat_templates are GGUF keys, and they are files again after an import."""
    source = tmp_path / "base"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("*.gguf"))
    (source / "additional_chat_templates").mkdir()
    tool = "{# tools #}" + TEMPLATE
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(tool)
    file = write_dense(open_checkpoint(source), tmp_path / "m.gguf")
    import_gguf(file, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == tool
    metadata = describe(open_checkpoint(tmp_path / "out")).metadata
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == tool


def write_deep(base, file, layers: int) -> int:
    """A GGUF file of so many wide layers, every weight zero; how many bytes its float32 weights take."""
    size = {"num_hidden_layers": layers, "hidden_size": 384, "intermediate_size": 1152, "head_dim": 96}
    checkpoint = open_checkpoint(base)
    checkpoint = replace(checkpoint, config=checkpoint.config | size, tensors={})
    shapes = expected_shapes(checkpoint.config, checkpoint.family, str(base))
    model = describe(checkpoint)
    layout = {model.gguf_name(n): ("f32" if len(shape) == 1 else "q8_0", shape) for n, shape in shapes.items()}
    with GgufWriter(file, model.metadata, layout) as writer:
        for name, spec in layout.items():
            writer.write(name, np.zeros(nbytes(*spec), dtype=np.uint8))
    return 4 * sum(math.prod(shape) for shape in shapes.values())


PEAK = """if True:
    import sys
    from pathlib import Path
    from llmlite.run.import_gguf import ImportSettings, run_import
    run_import(Path(sys.argv[1]), Path(sys.argv[2]), ImportSettings(reorder=0))
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def test_peak_memory_does_not_grow_with_the_number_of_layers(base, tmp_path):
    peaks = {}
    for layers in (6, 24):
        file = tmp_path / f"{layers}.gguf"
        weights = write_deep(base, file, layers)
        command = [sys.executable, "-c", PEAK, str(file), str(tmp_path / f"out{layers}")]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr
        peaks[layers] = int(run.stdout.split()[-1]) * 1024
    assert weights > 0.25 * peaks[6]  # a run that held them all would show
    assert peaks[24] < 1.1 * peaks[6]
