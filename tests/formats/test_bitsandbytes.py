"""bitsandbytes files: what the library itself would save, codes of our own, and read by transformers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.errors import InputError
from llmlite.formats.bitsandbytes import NF4, BitsAndBytes, StoredScales
from llmlite.quantize.types import Ranges, Rounded
from tests.formats.tiny_models import (
    linears,
    read_elsewhere,
    reference_logits,
    relative_difference,
    tiny_model,
    write_artifact,
)

pytest.importorskip("bitsandbytes")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    form: BitsAndBytes
    left: str = ""  # a module inside a layer that stays in 16 bits
    solved: bool = False  # the codes are ours


CASES = [
    Case("nf4 float32", "llama", BitsAndBytes("nf4", F32)),
    Case("nf4 single float32", "qwen3", BitsAndBytes("nf4", F32, double_quantization=False)),
    Case("nf4 bfloat16", "qwen2", BitsAndBytes("nf4", BF16)),
    Case("nf4 solved float32", "llama", BitsAndBytes("nf4", F32), "model.layers.0.self_attn.k_proj", solved=True),
    Case("nf4 solved bfloat16", "qwen3", BitsAndBytes("nf4", BF16), solved=True),
    Case("nf4 solved single float16", "qwen2", BitsAndBytes("nf4", F16, double_quantization=False), solved=True),
    Case("int8 float32", "llama", BitsAndBytes("int8", F32)),
    Case("int8 bfloat16", "qwen3", BitsAndBytes("int8", BF16), "model.layers.1.mlp.down_proj"),
]


def solve(form: BitsAndBytes, module: str, weight: torch.Tensor, shrink: float = 0.9) -> tuple[Rounded, StoredScales]:
    """Codes that the library would not choose: nearest on a range that leaves the extremes out."""
    assert form.grid is not None
    groups = weight.float().reshape(len(weight), -1, 64)
    stored = form.snap(module, groups.abs().amax(-1) * shrink)
    distance = (groups[..., None] - stored.ranges.scales[..., None, None] * torch.tensor(NF4)).abs()
    return Rounded(form.grid, distance.argmin(-1).to(torch.uint8).view(weight.shape), stored.ranges), stored


def state_of(tensors: dict[str, torch.Tensor]) -> Any:
    """The library's QuantState from the tensors of a module "m", as from a file."""
    from bitsandbytes.functional import QuantState

    parts = {name: t.clone() for name, t in tensors.items() if name != "m.weight"}
    return QuantState.from_dict(parts, torch.device("cpu"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Per case: its directory, read elsewhere, and the logits of the plain model with our dequantized weights."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    out = {}
    for case in CASES:
        model = tiny_model(case.model_type, case.form.dtype)
        layout: dict[str, TensorSpec] = {}
        tensors: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for name, module in linears(model).items():
            weights[name] = module.weight.float()
            if name != case.left:
                layout |= case.form.layout(name, (module.out_features, module.in_features))
                if case.solved:
                    rounded, stored = solve(case.form, name, module.weight)
                    encoded, weights[name] = case.form.pack(name, rounded, stored), rounded.dequantize()
                else:
                    encoded, weights[name] = case.form.encode(name, module.weight)
                tensors |= encoded
        ignored = ["lm_head", case.left] if case.left else ["lm_head"]
        directory = root / case.name.replace(" ", "-")
        write_artifact(directory, model, layout, tensors, case.form.config(ignored))
        out[case.name] = directory, reference_logits(model, weights)
    read_elsewhere([directory for directory, _ in out.values()])
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_dequantizes_what_we_do(case: Case, expected: dict[str, tuple[Path, torch.Tensor]]) -> None:
    # int8 in float32: the library multiplies by a rounded 1 / 127, hence not the same bits.
    assert relative_difference(*expected[case.name], "dequantized.npy") < 2e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_runs_it(case: Case, expected: dict[str, tuple[Path, torch.Tensor]]) -> None:
    # Not tight, because the layers themselves compute otherwise: LLM.int8 rounds each layer's inputs to 8 bits
    # (0.034 and 0.044 measured); nf4 runs in bfloat16 with bfloat16 maxima whatever the model's dtype on CPUs with
    # AVX-512 BF16 (0.013 to 0.015 measured), and in the model's dtype elsewhere.
    assert relative_difference(*expected[case.name]) < (0.1 if case.form.kind == "int8" else 0.03)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("double", [True, False])
def test_nf4_tensors_are_those_the_library_saves(double: bool, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    form = BitsAndBytes("nf4", dtype, double)
    weight = (torch.randn(96, 320) * 0.05).to(dtype)
    layer = bnb.nn.Linear4bit(320, 96, bias=False, compress_statistics=double, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4")
    theirs = layer.to("cpu").state_dict(prefix="m.")
    ours, dequantized = form.encode("m", weight)
    assert set(ours) == set(theirs)
    state_name = "m.weight.quant_state.bitsandbytes__nf4"
    for name in set(theirs) - {state_name}:
        assert theirs[name].dtype == ours[name].dtype
        assert torch.equal(theirs[name], ours[name]), name
    our_state, their_state = (json.loads(bytes(tensors[state_name].numpy())) for tensors in (ours, theirs))
    assert our_state == their_state
    assert torch.equal(dequantized, bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).float())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("double", [True, False])
def test_the_library_sees_what_the_solver_did(double: bool, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(2)
    form = BitsAndBytes("nf4", dtype, double)
    weight = torch.randn(96, 320) * torch.logspace(-3, 1, 96)[:, None]  # scales far from their mean
    weight[7] = 0
    rounded, stored = solve(form, "m", weight)
    tensors = form.pack("m", rounded, stored)
    layout = form.layout("m", (96, 320))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {n: tuple(s) for n, s in layout.items()}
    assert len(rounded.codes.unique()) == 16
    seen = dequantize_4bit(tensors["m.weight"], state_of(tensors))
    assert torch.equal(seen, rounded.dequantize().to(dtype))
    assert not seen[7].any()


@pytest.mark.parametrize("double", [True, False])
def test_the_library_s_own_codes_give_its_own_bytes(double: bool) -> None:
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(3)
    form = BitsAndBytes("nf4", F32, double)
    assert form.grid is not None
    weight = torch.randn(96, 320) * torch.rand(96, 1)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(state.code, torch.tensor(NF4))
    stored = form.snap("m", state.absmax.view(96, 5))
    codes = torch.stack([packed >> 4, packed & 15], 1).view(96, 320)
    ours = form.pack("m", Rounded(form.grid, codes, stored.ranges), stored)
    theirs, _ = form.encode("m", weight)  # held against the library's own layer above
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scales_are_snapped_near_and_kept_where_nothing_is_lost() -> None:
    torch.manual_seed(4)
    scales = torch.rand(64, 9) * 0.2 + 0.1
    double = BitsAndBytes("nf4", BF16).snap("m", scales).ranges.scales
    assert 0 < (double - scales).abs().max() < 0.0008  # deviations up to 0.1, levels at most 0.014 of that apart
    assert torch.equal(BitsAndBytes("nf4", BF16, False).snap("m", scales).ranges.scales, scales)
    equal = torch.full((64, 9), 0.25)
    assert torch.equal(BitsAndBytes("nf4", BF16).snap("m", equal).ranges.scales, equal)


def test_pack_refuses_what_the_file_would_change() -> None:
    form = BitsAndBytes("nf4", F32)
    rounded, stored = solve(form, "m", torch.randn(32, 128))
    with pytest.raises(ValueError, match="other scales"):
        form.pack("m", replace(rounded, ranges=Ranges(rounded.scales * 1.0001)), stored)
    with pytest.raises(ValueError, match="other scales"):  # rounding scales twice moves them
        form.pack("m", rounded, form.snap("m", rounded.scales))
    with pytest.raises(ValueError, match="neighbouring"):
        form.pack("m", replace(rounded, group_index=torch.arange(128) // 64), stored)
    with pytest.raises(ValueError, match="neighbouring"):
        form.pack("m", replace(rounded, grid=replace(rounded.grid, codebook=None)), stored)
    with pytest.raises(ValueError, match="fit"):
        form.pack("m", replace(rounded, codes=rounded.codes + 1), stored)
    with pytest.raises(InputError, match=r"m\.weight.*finite"):
        BitsAndBytes("nf4", F16).snap("m", torch.full((32, 2), 1e5))


def test_nf4_dequantized_from_the_description() -> None:
    torch.manual_seed(0)
    form = BitsAndBytes("nf4", F32)
    weight = torch.randn(160, 128) * torch.rand(160, 1)
    tensors, dequantized = form.encode("m", weight)
    state = json.loads(bytes(tensors["m.weight.quant_state.bitsandbytes__nf4"].numpy()))
    packed = tensors["m.weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    largest = torch.empty(160 * 128 // 64)
    for block, code in enumerate(tensors["m.weight.absmax"].tolist()):
        scale = tensors["m.weight.nested_absmax"][block // 256]
        largest[block] = tensors["m.weight.nested_quant_map"][code] * scale + state["nested_offset"]
    slow = tensors["m.weight.quant_map"][codes].view(-1, 64) * largest[:, None]
    assert torch.allclose(dequantized, slow.view(160, 128), rtol=1e-6, atol=0)
    assert (dequantized - weight).abs().max() < 0.2 * weight.abs().max()  # nf4's widest gap is 0.304


def test_int8_tensors_are_those_the_library_saves() -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    layer = bnb.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    theirs = layer.to("cpu").state_dict(prefix="m.")
    ours, dequantized = BitsAndBytes("int8", F32).encode("m", weight)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, ours[name]), name
    assert torch.equal(dequantized, ours["m.weight"].float() * ours["m.SCB"][:, None] / 127)
    assert ((dequantized - weight).abs().amax(1) <= weight.abs().amax(1) / 127 * 0.6).all()


@pytest.mark.parametrize(
    "form", [BitsAndBytes("nf4", BF16), BitsAndBytes("nf4", F32, False), BitsAndBytes("int8", F16)]
)
@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.0123, 3000.0])
def test_layout_is_known_before_the_values(form: BitsAndBytes, factor: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 576) * factor  # 576 blocks: the last nested block is not full
    weight[5] = 0
    layout = form.layout("m", (64, 576))
    tensors, dequantized = form.encode("m", weight)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {n: tuple(s) for n, s in layout.items()}
    assert torch.isfinite(dequantized).all()
    assert not dequantized[5].any()


def test_refusals() -> None:
    nf4 = BitsAndBytes("nf4", BF16)
    assert nf4.refusal((96, 576)) is None
    assert "end of a row" in (nf4.refusal((96, 96)) or "")
    assert "32 outputs" in (nf4.refusal((40, 128)) or "")
    assert BitsAndBytes("int8", BF16).refusal((33, 95)) is None
    for kind in ("nf4", "int8"):
        with pytest.raises(InputError, match=r"m\.weight.*finite"):
            BitsAndBytes(kind, F16).encode("m", torch.full((32, 64), 1e5))


def test_config_is_what_transformers_parses() -> None:
    from transformers import BitsAndBytesConfig

    written = BitsAndBytes("nf4", BF16).config(["lm_head"])
    config = BitsAndBytesConfig.from_dict(written)
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == BF16
    assert config.llm_int8_skip_modules == ["lm_head"]
    assert BitsAndBytesConfig.from_dict(BitsAndBytes("int8", F32).config(["lm_head"])).load_in_8bit
