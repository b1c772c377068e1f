"""GPTQ files: against a slow reader written from the description, GPTQModel's bytes, and transformers without llmlite.

gptqmodel_packed.npz holds what GPTQModel 7.7.0 packs; ``python -m tests.formats.test_gptq`` made it where GPTQModel
is installed. Running the tests there also loads whole models through transformers (minutes: its kernels compile).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlite.checkpoint.safetensors_writer import TensorSpec
from llmlite.formats.gptq import Gptq
from llmlite.quantize.types import Grid, Ranges, Rounded
from tests.formats.tiny_models import (
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
    act_order: bool = False
    left: str = ""  # a module inside a layer that stays in 16 bits


CASES = [
    Case("w2g16 asymmetric", "llama", F32, Grid(2, 16, "integer")),
    Case("w3g32 symmetric act-order", "llama", F32, Grid(3, 32, scale_rule="signed"), act_order=True),
    Case("w3 channel asymmetric", "qwen2", F32, Grid(3, None, "integer")),
    Case("w4g32 symmetric", "llama", F32, Grid(4, 32, scale_rule="signed")),
    Case("w4g64 asymmetric act-order", "qwen3", F32, Grid(4, 64, "integer"), act_order=True),
    Case("w4g16 symmetric", "llama", F32, Grid(4, 16, scale_rule="signed")),
    Case("w4 channel asymmetric", "qwen2", F32, Grid(4, None, "integer")),
    Case("w8g128 symmetric", "llama", F32, Grid(8, 128)),
    Case("w8 channel asymmetric", "qwen3", F32, Grid(8, None, "integer"), left="model.layers.1.mlp.down_proj"),
    Case("w4g32 float16", "llama", F16, Grid(4, 32, scale_rule="signed")),
    Case("w4g32 bfloat16", "llama", BF16, Grid(4, 32, scale_rule="signed")),
    Case("w8g32 bfloat16", "llama", BF16, Grid(8, 32)),
]
# In float32 the layers are plain products of the same numbers (0 measured). Else the kernels may sum in another order
# than torch's plain layer (0.0011 measured), and the AVX-512 one rounds the scales to bfloat16 (0.0145 measured).
TOLERANCE = {F32: 1e-5, F16: 5e-3, BF16: 0.04}


def activation_order(width: int, group: int) -> torch.Tensor:
    """Groups as activation order leaves them: equally large, their channels anywhere."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(width)).argsort() // group


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Per case: its directory, read elsewhere, and the logits of the plain model with our unpacked weights."""
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: run this file where it is")
    root = tmp_path_factory.mktemp("gptq")
    out = {}
    for case in CASES:
        model = tiny_model(case.model_type, case.dtype)
        form = Gptq(case.dtype, case.act_order)
        layout: dict[str, TensorSpec] = {}
        tensors: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for name, module in linears(model).items():
            shape = (module.out_features, module.in_features)
            if module.bias is not None:
                module.bias.data = module.bias.half().to(case.dtype)  # GPTQModel keeps biases in float16
            if name == case.left:
                weights[name] = module.weight.float()
                continue
            assert form.refusal(case.grid, shape) is None
            index = activation_order(shape[1], case.grid.group) if case.act_order and case.grid.group else None
            layout |= form.layout(name, case.grid, shape)
            tensors |= form.pack(name, round_to_nearest(module.weight, case.grid, index))
            weights[name] = form.unpack(name, tensors, case.grid)
        ignored = ["lm_head", case.left] if case.left else ["lm_head"]
        quantized = [name for name in linears(model) if name != case.left]
        directory = root / case.name.replace(" ", "-")
        write_artifact(directory, model, layout, tensors, form.config(case.grid, ignored, quantized))
        out[case.name] = directory, reference_logits(model, weights)
    read_elsewhere([directory for directory, _ in out.values()])
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_reads_what_we_unpack(case: Case, expected: dict[str, tuple[Path, torch.Tensor]]) -> None:
    assert relative_difference(*expected[case.name]) < TOLERANCE[case.dtype]


PACKED = Path(__file__).with_name("gptqmodel_packed.npz")
GOLDEN = [(bits, zero) for bits in (2, 3, 4, 8) for zero in ("symmetric", "integer")]


def golden_rounded(bits: int, zero: str) -> Rounded:
    """A weight of 32 x 64 on a grid, the same on every machine; on the asymmetric one with zero points of 0."""
    grid = Grid(bits, 16, zero)  # type: ignore[arg-type]
    rows, columns, groups = torch.arange(32)[:, None], torch.arange(64)[None], torch.arange(4)[None]
    codes = (rows * 7 + columns * 5 + rows * columns // 3) % grid.levels
    scales = (1 + (rows + groups) % 5) / 64
    zeros = ((rows + 3 * groups) % grid.levels).float() if zero == "integer" else None
    return Rounded(grid, codes.to(torch.uint8), Ranges(scales, zeros), (torch.arange(64) * 11 % 64) // 16)


def packed_by_gptqmodel(bits: int, zero: str) -> dict[str, torch.Tensor]:
    """GPTQModel's own packer, and its own step from "gptq_v2" to "gptq" where the grid is symmetric."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rounded = golden_rounded(bits, zero)
    symmetric = zero == "symmetric"
    zeros = torch.full_like(rounded.scales, rounded.grid.levels // 2) if rounded.offsets is None else rounded.offsets
    dense = torch.nn.Linear(64, 32, bias=False)
    dense.weight.data = rounded.dequantize()
    layer = TorchLinear(bits, 16, symmetric, True, 64, 32, False, register_buffers=True)
    assert rounded.group_index is not None
    layer.pack_original(dense, rounded.scales, zeros, rounded.group_index.to(torch.int32))
    if symmetric:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=16))
    return {name: layer.state_dict()[name] for name in ("qweight", "qzeros", "scales", "g_idx")}


def slow_reader(tensors: dict[str, torch.Tensor], bits: int, stored_less_one: bool) -> torch.Tensor:
    """The format's description, one weight and one bit at a time: float32 [out, in]."""

    def field(words: list[int], i: int) -> int:
        return sum((words[b // 32] >> (b % 32) & 1) << (b - i * bits) for b in range(i * bits, (i + 1) * bits))

    qweight, qzeros = tensors["m.qweight"].T.tolist(), tensors["m.qzeros"].tolist()
    scales, index = tensors["m.scales"].float().tolist(), tensors["m.g_idx"].tolist()
    out, width = len(qweight), len(index)
    weight = torch.empty(out, width)
    for row in range(out):
        for column in range(width):
            g = index[column]
            zero = field(qzeros[g], row) + stored_less_one
            weight[row, column] = (field(qweight[row], column) - zero) * scales[g][row]
    return weight


@pytest.mark.parametrize(("bits", "zero"), GOLDEN)
def test_bytes_are_those_of_gptqmodel(bits: int, zero: str) -> None:
    ours = Gptq(F16, act_order=True).pack("m", golden_rounded(bits, zero))
    with np.load(PACKED) as recorded:
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            theirs = torch.from_numpy(recorded[f"{bits}.{zero}.{name}"])
            assert theirs.dtype == ours[f"m.{name}"].dtype
            assert torch.equal(theirs, ours[f"m.{name}"]), name


@pytest.mark.parametrize(("bits", "zero"), GOLDEN)
def test_slow_reader_sees_the_rounded_weight(bits: int, zero: str) -> None:
    form = Gptq(F32, act_order=True)
    rounded = golden_rounded(bits, zero)
    packed = form.pack("m", rounded)
    stored_less_one = form.config(rounded.grid, ["lm_head"])["checkpoint_format"] == "gptq"
    assert torch.equal(slow_reader(packed, bits, stored_less_one), rounded.dequantize())
    assert torch.equal(form.unpack("m", packed, rounded.grid), rounded.dequantize())  # scales of few bits: exact


@pytest.mark.parametrize("group", [16, 128, None])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_and_layout(bits: int, zero: str, group: int | None) -> None:
    torch.manual_seed(1)
    grid = Grid(bits, group, zero)  # type: ignore[arg-type]
    form = Gptq(F32)
    assert form.refusal(grid, (96, 384)) is None
    rounded = round_to_nearest(torch.randn(96, 384), grid)
    packed = form.pack("m", rounded)
    layout = form.layout("m", grid, (96, 384))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {n: tuple(s) for n, s in layout.items()}
    assert torch.equal(form.unpack("m", packed, grid), rounded.dequantize().half().float())


def test_config_names_the_quantized_modules_only_where_some_are_left() -> None:
    from transformers import GPTQConfig

    form, grid = Gptq(F16), Grid(4, 128)
    config = form.config(grid, ["lm_head"])
    assert "modules_in_block_to_quantize" not in config
    parsed = GPTQConfig.from_dict(config)
    assert (parsed.bits, parsed.group_size, parsed.desc_act, parsed.sym, parsed.format) == (4, 128, False, True, "gptq")
    assert form.config(replace(grid, zero="integer"), ["lm_head"])["checkpoint_format"] == "gptq_v2"
    assert Gptq(F16, act_order=True).config(replace(grid, group=None), [])["group_size"] == -1
    left = form.config(grid, ["lm_head", "model.layers.0.mlp.down_proj"], ["model.layers.0.mlp.up_proj"])
    assert left["modules_in_block_to_quantize"] == [["model.layers.0.mlp.up_proj"]]
    with pytest.raises(ValueError, match="named"):
        form.config(grid, ["model.layers.0.mlp.down_proj"])


def test_refusals() -> None:
    form, good = Gptq(BF16), Grid(4, 64)
    assert form.refusal(good, (192, 576)) is None
    for grid, shape, word in [
        (replace(good, bits=5), (192, 576), "2, 3, 4 or 8 bits"),
        (replace(good, zero="minimum"), (192, 576), "zero points"),
        (replace(good, scale_dtype=F32), (192, 576), "float16"),
        (replace(good, group=96), (192, 576), "groups of"),
        (replace(good, group=128), (192, 576), "does not divide"),
        (replace(good, group=16), (192, 592), "blocks of 32"),
        (replace(good, bits=3, group=None), (200, 576), "blocks of 32"),
    ]:
        assert word in (form.refusal(grid, shape) or "")


def test_pack_refuses_what_the_file_would_change() -> None:
    rounded = round_to_nearest(torch.randn(32, 64), Grid(3, 32))
    with pytest.raises(ValueError, match="not rounded"):
        Gptq().pack("m", replace(rounded, ranges=Ranges(rounded.scales * 1.0001)))
    with pytest.raises(ValueError, match="do not fit"):
        Gptq().pack("m", replace(rounded, codes=rounded.codes + 1))
    with pytest.raises(ValueError, match="activation order"):
        Gptq().pack("m", replace(rounded, group_index=torch.arange(64) // 32))


if __name__ == "__main__":
    arrays = {
        f"{bits}.{zero}.{name}": tensor.numpy()
        for bits, zero in GOLDEN
        for name, tensor in packed_by_gptqmodel(bits, zero).items()
    }
    np.savez_compressed(PACKED, **arrays)  # type: ignore[arg-type]
