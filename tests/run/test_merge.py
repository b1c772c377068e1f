"""An adapter merged into its base: a checkpoint that computes what peft computes, or one that is rounded again."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.calibrate.corpus import default_corpora
from llmlite.calibrate.rows import token_rows
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.cli import main
from llmlite.errors import InputError, WriteError
from llmlite.formats.adapter_base import refuse_other_base, weights_sha256
from llmlite.formats.dequantized import dequantized_gguf, gguf_file, open_dequantized
from llmlite.formats.peft import read_adapter
from llmlite.run.merge import MergeSettings, merge
from llmlite.run.quantize import QuantizeSettings, quantize
from llmlite.run.sinks import GgufSink
from tests.adapters import adapted, save_adapter
from tests.tiny import edit_config, save_tiny, tiny_tokenizer

pytest.importorskip("peft")

IDS = torch.arange(3, 60)[None]
SMALL = {"calibration_tokens": 2048, "row_length": 64}
PLAIN = MergeSettings()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.flatten(0, 1).float()


def loaded(directory: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"use_rslora": True, "r": 9}),
        ("llama", {"use_dora": True}),
        ("qwen3", {"alpha_pattern": {"q_proj": 30}}),
    ],
    ids=str,
)
def test_the_merged_checkpoint_computes_what_peft_computes(tmp_path, family, settings):
    base = save_tiny(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    before = digests(base), digests(adapter)
    done = merge(base, adapter, tmp_path / "out", PLAIN)
    assert (digests(base), digests(adapter)) == before
    wanted = logits(adapted(base, adapter))
    assert gap(logits(loaded(base)), wanted) > 0.05
    assert gap(logits(loaded(tmp_path / "out")), wanted) < 1e-4
    assert done.changed == 14
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert open_checkpoint(tmp_path / "out").dtype == torch.float32


def test_it_is_stored_in_the_bases_dtype(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", PLAIN)
    whole, found = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert found.config["dtype"] == "bfloat16"
    for name, entry in found.tensors.items():
        assert entry.dtype == torch.bfloat16
        pair = read_adapter(adapter).pairs.get(name.removesuffix(".weight"))
        weight = whole.read(name)
        assert torch.equal(found.read(name), weight if pair is None else pair.applied(weight).bfloat16())


@pytest.mark.parametrize("to", ["gptq:w4g32", "gguf:q4_0"])
def test_of_an_artifact_the_weights_are_multiplied_out_first(base, adapter, tmp_path, to):
    quantize(base, tmp_path / "rounded", QuantizeSettings(to, solver="rtn"))
    merge(tmp_path / "rounded", adapter, tmp_path / "out", PLAIN)
    file = gguf_file(tmp_path / "rounded")
    rounded = dequantized_gguf(open_checkpoint(base), file) if file else open_dequantized(tmp_path / "rounded")
    found = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in found.config
    for module, pair in read_adapter(adapter).pairs.items():
        wanted = pair.applied(rounded.read(f"{module}.weight"))
        assert gap(found.read(f"{module}.weight").float(), wanted) < 4e-3  # stored in 16 bits
    assert 0.01 < gap(logits(loaded(tmp_path / "out")), logits(adapted(base, adapter))) < 0.5


def test_merged_and_rounded_again_with_feedback_it_is_nearer_than_to_nearest(base, adapter, tmp_path):
    text = torch.from_numpy(token_rows(default_corpora(), tiny_tokenizer(), 1024, 64, seed=1).ids)  # not calibrated on
    wanted, gaps = logits(adapted(base, adapter), text), {}
    for solver in ("rtn", "feedback"):
        settings = MergeSettings(
            "compressed-tensors:w4a16g32", solver=solver, **(SMALL if solver == "feedback" else {})
        )
        done = merge(base, adapter, tmp_path / solver, settings)
        gaps[solver] = gap(logits(loaded(tmp_path / solver), text), wanted)
        assert done.quantized is not None and done.quantized.errors
    assert gaps["feedback"] < 0.9 * gaps["rtn"]
    assert gaps["rtn"] < 0.5 * gap(logits(loaded(base), text), wanted)
    manifest = json.loads((tmp_path / "feedback" / "llmlite.json").read_text())
    assert manifest["adapter"]["sha256"] == read_adapter(adapter).sha256
    assert manifest["format"] == "compressed-tensors:w4a16g32"


@pytest.mark.parametrize("to", [None, "gguf:q8_0"], ids=["checkpoint", "gguf base"])
def test_what_a_full_disk_cuts_off_resume_ends_in_the_same_bytes(base, adapter, tmp_path, monkeypatch, to):
    model = base
    if to is not None:
        model = quantize(base, tmp_path / "base", QuantizeSettings(to, solver="rtn")).directory / "model.gguf"
    settings, flush, layers = MergeSettings("gguf:q4_0", **SMALL), GgufSink.flush, []
    merge(model, adapter, tmp_path / "whole", settings)

    def full(sink):
        layers.append(sink)
        if len(layers) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(sink)

    monkeypatch.setattr(GgufSink, "flush", full)
    with pytest.raises(WriteError, match="--resume goes on"):
        merge(model, adapter, tmp_path / "out", settings)
    other = save_adapter(base, tmp_path / "other", r=5)
    with pytest.raises(InputError, match="differs in base"):
        merge(model, other, tmp_path / "out", replace(settings, resume=True))
    merge(model, adapter, tmp_path / "out", replace(settings, resume=True))
    assert len(layers) == 3  # of the tiny model's two: the first was not done again
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_quantized_base_can_be_rounded_again_as_gguf(base, adapter, tmp_path):
    quantize(base, tmp_path / "rounded", QuantizeSettings("bnb:nf4", solver="rtn"))
    merge(tmp_path / "rounded", adapter, tmp_path / "out", MergeSettings("gguf:q8_0", solver="rtn"))
    found = dequantized_gguf(open_checkpoint(base), tmp_path / "out" / "model.gguf")
    rounded = open_dequantized(tmp_path / "rounded")
    for module, pair in read_adapter(adapter).pairs.items():
        assert gap(found.read(f"{module}.weight"), pair.applied(rounded.read(f"{module}.weight"))) < 0.03


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(base, adapter, tmp_path):
    def refused(model: Path, made: Path, said: str) -> None:
        with pytest.raises(InputError, match=said):
            merge(model, made, tmp_path / "out", PLAIN)
        assert not (tmp_path / "out").exists()

    other = save_tiny(tmp_path / "other", intermediate_size=96)
    refused(other, adapter, r"down_proj, a weight of \[64, 128\].*has a weight of \[64, 96\].*another base")
    head = save_adapter(
        save_tiny(tmp_path / "untied", tie_word_embeddings=False), tmp_path / "head", target_modules=["lm_head"]
    )
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    refused(tied, head, "lm_head")
    same_shapes = save_tiny(tmp_path / "same")
    edit_config(same_shapes, rope_theta=5e5)
    copy = save_adapter(base, tmp_path / "told")
    digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    (copy / "llmlite.json").write_text(
        json.dumps({"kind": "adapter", "base": {"source": "the-base", "config_sha256": digest}})
    )
    refused(same_shapes, copy, r"was made for the-base, .* another base")
    merge(base, copy, tmp_path / "right", PLAIN)
    quantize(base, tmp_path / "artifact", QuantizeSettings("gptq:w4g32", solver="rtn"))
    merge(tmp_path / "artifact", copy, tmp_path / "right too", PLAIN)
    tensors = {"model.safetensors": "0"}
    (copy / "llmlite.json").write_text(
        json.dumps({"kind": "adapter", "base": {"source": "twin", "config_sha256": digest, "weights_sha256": tensors}})
    )
    refused(base, copy, "was made for twin, and .* has other weights")
    told = {"source": "an-artifact", "config_sha256": digest, "weights_sha256": tensors}
    (copy / "llmlite.json").write_text(json.dumps({"kind": "error adapter", "base": told}))
    refused(base, copy, "makes good what rounding cost an-artifact, .* other weights")


def test_a_gguf_file_that_lies_alone_does_not_tell_what_it_is_and_goes_by_the_shapes(base, tmp_path):
    quantize(base, tmp_path / "artifact", QuantizeSettings("gguf:q8_0", solver="rtn"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "artifact" / "model.gguf").rename(alone / "tiny.gguf")
    adapter = save_adapter(base, tmp_path / "adapter")
    digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    (adapter / "llmlite.json").write_text(
        json.dumps({"kind": "adapter", "base": {"source": "the-base", "config_sha256": digest}})
    )
    refuse_other_base(adapter, str(alone / "tiny.gguf"))
    edit_config(save_tiny(alone), rope_theta=5e5)  # a config.json beside it tells
    with pytest.raises(InputError, match="was made for the-base"):
        refuse_other_base(adapter, str(alone / "tiny.gguf"))


def test_weights_that_change_after_they_were_read_are_noticed(tmp_path):
    base, adapter = save_tiny(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    told = {"source": "the-base", "config_sha256": digest, "weights_sha256": weights_sha256(str(base))}
    (adapter / "llmlite.json").write_text(json.dumps({"kind": "adapter", "base": told}))
    refuse_other_base(adapter, str(base))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="has other weights"):
        refuse_other_base(adapter, str(base))


def test_bad_words_and_bad_values_are_refused_in_one_sentence(base, adapter, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["merge", str(base), str(adapter), "-o", out, "--calibration-tokens", "512"]) == 2
    assert "--calibration-tokens: says how merged weights are rounded" in " ".join(capsys.readouterr().err.split())
    assert main(["merge", str(base), str(tmp_path / "none"), "-o", out]) == 2
    assert main(["merge", str(base), str(adapter), "-o", out, "--to", "gguf:q9"]) == 2
    broken = save_adapter(base, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(["merge", str(base), str(broken), "-o", out]) == 2
    assert "holds NaN or infinite values" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*out*"))
    assert main(["merge", str(base), str(adapter), "-o", out, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == 14
    assert main(["merge", str(base), str(adapter), "-o", out]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_adapter_trained_on_an_artifact_fits_what_the_artifact_was_made_from(base, tmp_path):
    quantize(base, tmp_path / "artifact", QuantizeSettings("gptq:w4g32", solver="rtn"))
    adapter = save_adapter(base, tmp_path / "adapter")
    digest = hashlib.sha256((tmp_path / "artifact" / "config.json").read_bytes()).hexdigest()
    told = {"source": str(tmp_path / "artifact"), "config_sha256": digest}
    (adapter / "llmlite.json").write_text(json.dumps({"kind": "adapter", "base": told}))
    merge(base, adapter, tmp_path / "one", PLAIN)
    merge(tmp_path / "artifact", adapter, tmp_path / "two", PLAIN)
    stranger = save_tiny(tmp_path / "stranger")
    edit_config(stranger, rope_theta=5e5)
    with pytest.raises(InputError, match=r"another model by its config\.json"):
        merge(stranger, adapter, tmp_path / "three", PLAIN)


def test_packages_that_peft_imports_keep_to_themselves_what_they_lack(base, adapter, tmp_path):
    command = [sys.executable, "-m", "llmlite.cli", "merge", base, adapter, "-o", tmp_path / "out"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
