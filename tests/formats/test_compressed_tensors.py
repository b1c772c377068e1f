"""compressed-tensors files against the library's own compressors, and read by transformers without llmlite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.formats.compressed_tensors import PackQuantized
from llmlite.formats.int_quantized import IntQuantized
from llmlite.quantize.types import Grid, Ranges
from tests.formats.tiny_models import (
    IDS,
    linears,
    read_elsewhere,
    reference_logits,
    relative_difference,
    round_to_nearest,
    tiny_model,
    write_artifact,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    dtype: torch.dtype
    grid: Grid
    left: str = ""  # a module inside a layer that stays in 16 bits
    w8a8: bool = False

    @property
    def form(self) -> PackQuantized | IntQuantized:
        return IntQuantized(self.dtype) if self.w8a8 else PackQuantized(self.dtype)


CASES = [
    Case("w4g32 symmetric float32", "llama", F32, Grid(4, 32, scale_dtype=F32, scale_rule="signed")),
    Case("w4g64 asymmetric bfloat16", "qwen3", BF16, Grid(4, 64, "integer", BF16)),
    Case("w4 channel asymmetric float16", "qwen2", F16, Grid(4, None, "integer", F16)),
    Case("w8 channel symmetric bfloat16", "llama", BF16, Grid(8, None, "symmetric", BF16)),
    Case("w8g128 asymmetric float32", "qwen3", F32, Grid(8, 128, "integer", F32), "model.layers.1.mlp.down_proj"),
    Case("w8a8 float32", "qwen2", F32, Grid(8, None, scale_dtype=F32), "model.layers.1.mlp.down_proj", w8a8=True),
    Case("w8a8 bfloat16", "llama", BF16, Grid(8, None, scale_dtype=BF16), w8a8=True),
]


@dataclass(frozen=True)
class Written:
    """An artifact, read elsewhere; the logits that are expected, and those with plain inputs of the layers."""

    directory: Path
    logits: torch.Tensor
    plain: torch.Tensor


def logits_of_rounded_inputs(model: PreTrainedModel, left: str) -> torch.Tensor:
    """Logits with the inputs of every linear layer but ``left`` rounded to 8 bits, token by token."""

    def round_input(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

    for name, module in linears(model).items():
        if name != left:
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Per case what was written, and the logits of the plain model with our unpacked weights."""
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("compressed_tensors")
    out = {}
    for case in CASES:
        model = tiny_model(case.model_type, case.dtype)
        form = case.form
        layout: dict[str, TensorSpec] = {}
        tensors: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for name, module in linears(model).items():
            if name == case.left:
                weights[name] = module.weight.float()
                continue
            rounded = round_to_nearest(module.weight, case.grid)
            layout |= form.layout(name, case.grid, (module.out_features, module.in_features))
            tensors |= form.pack(name, rounded)
            weights[name] = form.unpack(name, tensors, case.grid)
        ignored = ["lm_head", case.left] if case.left else ["lm_head"]
        directory = root / case.name.replace(" ", "-")
        write_artifact(directory, model, layout, tensors, form.config(case.grid, ignored))
        plain = reference_logits(model, weights)
        logits = logits_of_rounded_inputs(model, case.left) if case.w8a8 else plain
        out[case.name] = Written(directory, logits, plain)
    read_elsewhere([written.directory for written in out.values()])
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_reads_what_we_unpack(case: Case, expected: dict[str, Written]) -> None:
    # The reader multiplies the codes out in the model's dtype and then runs the plain layer: the same bits as ours.
    # With w8a8 it rounds the inputs of each layer to 8 bits before that.
    written = expected[case.name]
    assert relative_difference(written.directory, written.logits) < 1e-6
    assert not case.w8a8 or relative_difference(written.directory, written.plain) > 0.01


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_the_library(bits: int, zero: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationConfig

    torch.manual_seed(0)
    grid = Grid(bits, 32, zero, F32)  # type: ignore[arg-type]
    weight = torch.randn(44, 96)  # 44 zero points fill no whole number of words
    rounded = round_to_nearest(weight, grid)
    form = PackQuantized(F32)
    ours = form.pack("m", rounded)

    scheme = QuantizationConfig.model_validate(form.config(grid, ["lm_head"])).config_groups["group_0"]
    state = {"weight": rounded.dequantize(), "weight_scale": rounded.scales}
    if rounded.offsets is not None:
        state["weight_zero_point"] = (rounded.offsets - grid.levels // 2).to(torch.int8)
    theirs = compressors.PackedQuantizationCompressor.compress(state, scheme)
    assert {f"m.{name}" for name in theirs} == set(ours)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[f"m.{name}"].dtype
        assert torch.equal(tensor, ours[f"m.{name}"]), name
    decompressed = compressors.PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(form.unpack("m", ours, grid), decompressed)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_round_trip_and_layout(bits: int, zero: str, group: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    grid = Grid(bits, group, zero, dtype)  # type: ignore[arg-type]
    rounded = round_to_nearest(torch.randn(40, 96), grid)
    form = PackQuantized(dtype)
    assert form.refusal(grid, (40, 96)) is None
    packed = form.pack("m", rounded)
    layout = form.layout("m", grid, (40, 96))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {n: tuple(s) for n, s in layout.items()}
    assert torch.equal(form.unpack("m", packed, grid), rounded.dequantize().to(dtype).float())


@pytest.mark.parametrize(("group", "strategy"), [(128, "group"), (None, "channel")])
def test_config_is_what_the_library_validates(group: int | None, strategy: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    written = PackQuantized(BF16).config(Grid(4, group, "integer", BF16), ["lm_head", "model.layers.0.mlp.up_proj"])
    config = quantization.QuantizationConfig.model_validate(written)
    scheme = config.config_groups["group_0"]
    assert config.format == "pack-quantized"
    assert config.ignore == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert scheme.targets == ["Linear"]
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.strategy) == (4, group, strategy)
    assert not scheme.weights.symmetric
    assert scheme.input_activations is None


def test_refusals() -> None:
    form = PackQuantized(BF16)
    good = Grid(4, 64, "symmetric", BF16)
    assert form.refusal(good, (33, 576)) is None
    for grid, shape, word in [
        (replace(good, bits=3), (64, 576), "4 or 8 bits"),
        (replace(good, zero="minimum"), (64, 576), "zero points"),
        (replace(good, group=128), (64, 576), "does not divide"),
        (replace(good, scale_dtype=F16), (64, 576), "scales"),
    ]:
        assert word in (form.refusal(grid, shape) or "")


def test_pack_refuses_what_the_file_would_change() -> None:
    grid = Grid(4, 32, "symmetric", F16)
    rounded = round_to_nearest(torch.randn(8, 64), grid)
    with pytest.raises(ValueError, match="not rounded"):
        PackQuantized(F16).pack("m", replace(rounded, ranges=Ranges(rounded.scales * 1.0001)))
    with pytest.raises(ValueError, match="do not fit"):
        PackQuantized(F16).pack("m", replace(rounded, codes=rounded.codes + 1))
    with pytest.raises(ValueError, match="g_idx"):
        PackQuantized(F16).pack("m", replace(rounded, group_index=torch.arange(64) // 32))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_w8a8_bytes_are_those_of_the_library(dtype: torch.dtype) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    torch.manual_seed(0)
    grid = Grid(8, None, scale_dtype=dtype)
    rounded = round_to_nearest(torch.rand(44, 95) * 2 - 1, grid)
    assert len(rounded.codes.unique()) == 256
    form = IntQuantized(dtype)
    assert form.refusal(grid, (44, 95)) is None
    ours = form.pack("m", rounded)
    layout = form.layout("m", grid, (44, 95))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in ours.items()} == {n: tuple(s) for n, s in layout.items()}
    assert torch.equal(form.unpack("m", ours, grid), rounded.dequantize().to(dtype).float())

    config = QuantizationConfig.model_validate(form.config(grid, ["lm_head"]))
    scheme = config.config_groups["group_0"]
    assert (config.format, config.ignore) == ("int-quantized", ["lm_head"])
    assert infer_module_format(torch.nn.Linear, scheme) == "int-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry("int-quantized")
    theirs = compressor.compress({"weight": rounded.dequantize(), "weight_scale": rounded.scales.to(dtype)}, scheme)
    assert {f"m.{name}" for name in theirs} == set(ours)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[f"m.{name}"].dtype
        assert torch.equal(tensor, ours[f"m.{name}"]), name


def test_w8a8_config_is_what_the_library_validates() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    written = IntQuantized(BF16).config(Grid(8, None, scale_dtype=BF16), ["lm_head"])
    scheme = quantization.QuantizationConfig.model_validate(written).config_groups["group_0"]
    weights, inputs = scheme.weights, scheme.input_activations
    assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric) == (8, "int", "channel", True)
    assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.symmetric) == (8, "int", "token", True)
    assert (weights.dynamic, inputs.dynamic) == (False, True)


def test_w8a8_refusals() -> None:
    form = IntQuantized(BF16)
    good = Grid(8, None, "symmetric", BF16)
    for grid, word in [
        (replace(good, bits=4), "8 bits"),
        (replace(good, zero="integer"), "symmetric"),
        (replace(good, group=32), "per output channel"),
        (replace(good, scale_dtype=F32), "scales"),
    ]:
        assert word in (form.refusal(grid, (32, 64)) or "")
        with pytest.raises(ValueError, match=word):
            form.pack("m", round_to_nearest(torch.randn(32, 64), grid))
    rounded = round_to_nearest(torch.randn(32, 64), good)
    with pytest.raises(ValueError, match="not rounded"):
        form.pack("m", replace(rounded, ranges=Ranges(rounded.scales * 1.0001)))
