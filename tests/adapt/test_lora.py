"""Adapters on frozen bases of every kind: what reaches them, and that conversations in a row stay apart."""

import importlib.util
from pathlib import Path

import pytest
import torch

from llmlite.adapt import bases, lora
from llmlite.adapt.bases import load_base, prepare_bitsandbytes
from llmlite.adapt.conversations import Tokens, packed_rows
from llmlite.adapt.lora import (
    AdapterSettings,
    AdapterTask,
    answer_loss,
    new_adapter,
    packing_holds,
    refuse_other_head,
    target_modules,
)
from llmlite.errors import InputError
from llmlite.run.quantize import QuantizeSettings, quantize
from tests.tiny import FAMILIES, save_tiny, tiny_model

CPU = torch.device("cpu")
CONVERSATIONS = [
    Tokens(tuple(range(5, 30)), (False,) * 10 + (True,) * 15),
    Tokens(tuple(range(60, 100)), (False,) * 30 + (True,) * 10),
    Tokens(tuple(range(150, 190)), (False,) * 5 + (True,) * 35),
]
PACKED = packed_rows(CONVERSATIONS, 110, True)
QUANTIZED = ("bnb:nf4", "bnb:int8", "gptq:w4g32", "gptq:w3g64-asym", "compressed-tensors:w4a16g32",
             "compressed-tensors:w4a16g32-asym", "compressed-tensors:w8a8")  # fmt: skip
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def adapted(model, kind="lora", **changes):
    """A peft model whose adapter is not zero, and so changes what it computes."""
    found = new_adapter(model.requires_grad_(False).train(), AdapterSettings(kind=kind, rank=4, **changes), "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if "lora_B" in name:
                value.copy_(0.05 * torch.randn_like(value))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_in_one_row_do_not_see_each_other(family):
    model = adapted(tiny_model(family, sliding_window=16) if family == "gemma3_text" else tiny_model(family))
    assert len(PACKED) == 1 and packing_holds(model)
    with torch.no_grad():
        together = answer_loss(model, PACKED)
        alone = [answer_loss(model, [row]) for row in packed_rows(CONVERSATIONS, 100, False)]
        padded = answer_loss(model, packed_rows(CONVERSATIONS, 100, False))
    assert together[1] == padded[1] == sum(count for _, count in alone)
    assert float(together[0]) == pytest.approx(sum(float(loss) for loss, _ in alone), rel=1e-5)
    assert float(padded[0]) == pytest.approx(float(together[0]), rel=1e-5)


def test_a_model_that_lets_conversations_see_each_other_is_found_out():
    model = adapted(tiny_model())

    def one_conversation(module, args, given):
        given["position_ids"] = torch.arange(given["input_ids"].shape[1])[None]
        return args, given

    model.get_base_model().model.register_forward_pre_hook(one_conversation, with_kwargs=True)
    assert not packing_holds(model)


def test_a_model_whose_head_does_more_is_refused():
    for family in FAMILIES:
        refuse_other_head(adapted(tiny_model(family)), family)
    with pytest.raises(InputError, match="granite: its head does more"):
        refuse_other_head(adapted(tiny_model("granite", logits_scaling=8.0)), "granite")


def test_packed_layers_move_with_their_biases(quantized):
    layer = load_base(quantized("gptq:w4g32"), torch.float32, "cpu").model.model.layers[0].self_attn.q_proj
    assert layer.bias is not None
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.buffers(), *layer.parameters())} == {"meta"}


@pytest.mark.parametrize("recompute", ["on", "off"])
def test_the_loss_is_that_of_whole_logits(recompute, monkeypatch):
    monkeypatch.setattr(lora, "LOGIT_ROWS", 7)
    model = adapted(tiny_model())
    assert lora.set_checkpointing(model, recompute, 40) == (recompute == "on")
    (row,) = packed_rows(CONVERSATIONS[:1], 100, True)
    total, count = answer_loss(model, [row])
    total.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    whole = model(input_ids=torch.tensor([row.ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(whole, torch.tensor(row.labels), reduction="sum")
    expected.backward()
    assert count == row.counted == 15 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Directories of one model in every format, made as they are asked for."""
    top = tmp_path_factory.mktemp("bases")
    base, made = save_tiny(top / "base", "qwen2"), {}

    def of(to: str) -> Path:
        if to == "16 bits":
            return base
        if to not in made:
            made[to] = top / to.replace(":", "-")
            quantize(base, made[to], QuantizeSettings(to, solver="rtn"))
        return made[to]

    return of


def dequantized(model):
    """The same model with plain linear layers of the values that the quantized ones stand for."""
    from peft.utils.integrations import dequantize_module_weight

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                plain.weight.copy_(dequantize_module_weight(module).float())
                if module.bias is not None:
                    plain.bias.copy_(module.bias.float())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return torch.nn.Module.float(model)  # the model's own refuses what was quantized


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", QUANTIZED)
def test_after_an_evaluation_the_gradient_behind_a_quantized_base_is_alive_and_right(quantized, to, dtype, device):
    if to.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        task = AdapterTask(adapted(load_base(quantized(to), dtype, device).model), PACKED, PACKED)
        with torch.no_grad():
            first = task.judge()
        loss = task.loss([0])
    loss.backward()
    reference = AdapterTask(adapted(dequantized(load_base(quantized(to), torch.float32, device).model)), PACKED, PACKED)
    expected = reference.loss([0])
    expected.backward()
    assert first == pytest.approx(expected.item(), rel=0.05)  # int8 rounds its inputs too
    for name, value in task.parameters().items():
        wanted = reference.parameters()[name].grad
        assert wanted.abs().max() > 0
        likeness = torch.cosine_similarity(value.grad.flatten().float(), wanted.flatten(), 0)
        assert likeness > (0.999 if dtype == torch.float32 else 0.97), name
        assert value.grad.norm() == pytest.approx(wanted.norm().item(), rel=0.1)


def test_the_guard_is_set_on_every_4_bit_layer(quantized):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load_base(quantized("bnb:nf4"), torch.bfloat16, "cpu").model
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert prepare_bitsandbytes(tiny_model(), torch.float32) == ""


@pytest.mark.parametrize("to", ["gptq:w4g32", "compressed-tensors:w4a16g32"])
def test_packed_layers_stay_packed(quantized, to):
    base = load_base(quantized(to), torch.float32, "cpu")
    small = sum(b.numel() * b.element_size() for n, b in base.model.named_buffers() if "packed_" in n)
    plain = sum(m.in_features * m.out_features * 4 for n, m in base.model.named_modules() if "_proj" in n)
    assert small < plain / 4
    base.model.eval()(torch.arange(20)[None])
    assert not any("_proj.weight" in name for name, _ in base.model.named_parameters())


def test_a_compressed_tensors_base_computes_what_its_own_library_does(quantized):
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")
    from llmlite.evals.hf import load_transformers

    place, ids = quantized("compressed-tensors:w4a16g32-asym"), torch.arange(5, 45)[None]
    theirs, _ = load_transformers(place)
    ours = load_base(place, theirs.dtype, "cpu").model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids.to(theirs.device)).logits.cpu(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["dora", "rslora"])
@pytest.mark.parametrize("to", ["16 bits", "bnb:nf4", "gptq:w4g32"])
def test_other_kinds_of_adapters_learn_on_every_kind_of_base(quantized, kind, to):
    if to.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    model = new_adapter(load_base(quantized(to), torch.float32, "cpu").model, AdapterSettings(kind=kind, rank=4), "x")
    task = AdapterTask(model, PACKED, PACKED)
    with torch.no_grad():
        before = task.judge()
    optimizer = torch.optim.AdamW(task.groups(), lr=5e-3)
    for _ in range(5):
        optimizer.zero_grad()
        task.loss([0]).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.judge() < 0.97 * before
    magnitudes = [name for name in task.parameters() if "magnitude" in name]
    assert bool(magnitudes) == (kind == "dora")
    assert all(task.parameters()[name].grad.abs().max() > 0 for name in magnitudes)
    scale = model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"]
    assert scale == (8 / 2 if kind == "rslora" else 2.0)


def test_rounding_while_loading_is_not_for_what_is_rounded(quantized):
    pytest.importorskip("bitsandbytes")
    assert load_base(quantized("16 bits"), torch.float32, "cpu", "bnb:nf4").kept == "bnb:nf4"
    with pytest.raises(InputError, match="already quantized"):
        load_base(quantized("gptq:w4g32"), torch.float32, "cpu", "bnb:nf4")


def test_targets_are_names_of_linear_layers():
    model = tiny_model()
    assert len(target_modules(model, ())) == 7
    assert target_modules(model, ("q_proj", "layers.1.mlp.up_proj")) == ["q_proj", "layers.1.mlp.up_proj"]
    with pytest.raises(InputError, match=r"--targets qproj: .* known are down_proj, gate_proj"):
        target_modules(model, ("qproj",))
    assert len(AdapterTask(adapted(model, targets=("v_proj",)), PACKED, PACKED).parameters()) == 4


def test_other_quantization_methods_are_refused(tmp_path: Path):
    from tests.tiny import edit_config

    base = save_tiny(tmp_path / "base")
    edit_config(base, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match="'awq'"):
        bases.method_of(base)
