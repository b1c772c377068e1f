import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError, OutsideError
from tests.tiny import FAMILIES, edit_config, save_tiny, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_transformers_saved(tmp_path, family):
    checkpoint = open_checkpoint(save_tiny(tmp_path, family))
    wanted = dict(tiny_model(family).named_parameters())
    assert checkpoint.tensors.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(checkpoint.read(name), weight)
    names = {n for i in range(checkpoint.num_layers) for n in checkpoint.layer_tensors(i)}
    linears = {f"model.layers.{i}.{n}.weight" for i in range(checkpoint.num_layers) for n in checkpoint.family.linears}
    norms = {f"model.layers.{i}.{n}.weight" for i in range(checkpoint.num_layers) for n in checkpoint.family.norms}
    assert linears | norms <= names
    assert all(name.endswith(".bias") for name in names - linears - norms)


def change_weights(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


WRONG = {
    "missing tensor": (lambda d: change_weights(d, lambda s: s.pop("model.norm.weight")), "'model.norm.weight' is missing"),
    "wrong shape": (
        lambda d: change_weights(d, lambda s: s.update({"model.norm.weight": torch.zeros(3)})), r"shape \[3\]"),
    "unknown tensor": (lambda d: change_weights(d, lambda s: s.update({"extra.weight": torch.zeros(3)})), "not part of"),
    "integer weights": (
        lambda d: change_weights(d, lambda s: s.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})), "int8"),
    "unknown architecture": (lambda d: edit_config(d, model_type="mamba9"), "unknown architecture 'mamba9'"),
    "remote code": (lambda d: edit_config(d, auto_map={"AutoModel": "x.Y"}), "remote code"),
    "already quantized": (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), "already quantized"),
    "config that lies": (lambda d: edit_config(d, num_attention_heads=0), "does not describe"),
    "config of another type": (lambda d: edit_config(d, hidden_size="64"), "does not describe"),
    "heads that do not divide": (lambda d: edit_config(d, num_attention_heads=7), "does not describe|shape"),
    "padding beyond the vocabulary": (lambda d: edit_config(d, pad_token_id=320), "does not describe"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no .*safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, case):
    spoil, said = WRONG[case]
    spoil(save_tiny(tmp_path))
    with pytest.raises(InputError, match=said) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there():
    with pytest.raises(InputError, match="no such directory"):
        open_checkpoint("/nowhere/at/all")
    with pytest.raises(InputError, match="hub id like owner/name"):
        open_checkpoint("nowhere")


def test_a_hub_without_network_is_outside_and_not_the_users_fault(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OutsideError, match="hub can't be reached"):
        open_checkpoint("owner/name")


def test_a_hub_id_is_opened_from_its_snapshot(tmp_path, monkeypatch):
    import huggingface_hub

    save_tiny(tmp_path)
    asked = {}

    def download(model, **options):
        asked.update(model=model, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/name", "v2").source == "owner/name"
    assert asked["revision"] == "v2"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])  # pickles are not even fetched


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    from llmlite.checkpoint import safetensors_index

    monkeypatch.setattr(safetensors_index.TensorEntry, "read", lambda self: pytest.fail(f"read {self.name}"))
    assert open_checkpoint(tmp_path).num_layers == 2
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
