"""Figures against thresholds, and the operations of a token against PyTorch's own counter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlite.checkpoint.checkpoint import meta_model, read_config
from llmlite.evals.lightness import DeviceClass, Figures, device_classes, fastest, lightness
from llmlite.evals.lightness_table import lightness_table
from llmlite.evals.locate import find
from llmlite.evals.shape import Shape, model_shape
from tests import gguf_models
from tests.tiny import save_tiny

BOX = DeviceClass(
    "box", "a box", memory=1000, disk=500, bandwidth=1e4, flops=1e6, generate_tps=10, first_token_s=2, kept=0.8
)
LIGHT = Figures(
    parameters=100,
    bytes=50,
    weights=50,
    bits_per_weight=4.0,
    context=10,
    flops_per_token=200,
    memory=100,
    kv=10,
    kept=0.95,
)


def judge(**changes):
    (verdict,) = lightness(replace(LIGHT, **changes), [BOX]).verdicts
    return verdict


def test_the_figure_with_the_least_room_decides():
    fits = judge()
    assert fits.light is True
    assert (fits.decides, fits.value, fits.threshold) == ("kept", 0.95, 0.8), "0.8 / 0.95 is the largest share"
    assert judge(memory=990).decides == "memory"
    assert judge(memory=990).light is True
    heavy = judge(memory=1001)
    assert (heavy.light, heavy.decides, heavy.value) == (False, "memory", 1001)
    assert judge(bytes=501).light is False
    assert judge(kept=0.7).light is False
    both = judge(memory=1500, bytes=1000)
    assert (both.decides, both.value) == ("disk", 1000), "twice the disk is worse than 1.5 times the memory"


def test_memory_that_nobody_measured_makes_no_yes():
    unknown = judge(memory=None, kept=None)
    assert unknown.light is None
    assert unknown.unknown == ("memory", "kept")
    assert judge(memory=None, bytes=501).light is False, "what is known is enough for a no"
    assert judge(kept=None).light is True, "an artifact without a base is judged by its size"


def test_speed_is_bound_by_what_is_read_and_by_what_is_computed():
    assert fastest(LIGHT, BOX) == (pytest.approx(1e4 / 60), pytest.approx(50 / 1e4))
    busy = replace(LIGHT, flops_per_token=100_000)
    assert fastest(busy, BOX) == (pytest.approx(10), pytest.approx(1.0))
    assert judge(flops_per_token=100_001).decides == "generate_tps"
    assert judge(flops_per_token=100_001).light is False
    assert judge(weights=2000, bytes=50).light is False, "10,000 bytes a second read 2,010 bytes 4.98 times"


def test_the_classes_of_the_data_file_grow():
    names = [one.name for one in device_classes()]
    assert names == ["phone", "edge", "gpu-8gb", "server"]
    small = Figures(135_000_000, 90_000_000, 90_000_000, 5.4, 512, 270_000_000, 150_000_000, 17_000_000, kept=0.95)
    assert [v.light for v in lightness(small).verdicts] == [True] * 4
    eight = Figures(8_000_000_000, 4_600_000_000, 4_600_000_000, 4.6, 512, 16_000_000_000, 5_200_000_000, 67_000_000)
    verdicts = {v.name: v for v in lightness(eight).verdicts}
    assert [v.light for v in verdicts.values()] == [False, True, True, True]
    assert verdicts["phone"].decides == "disk", "2.14 times what it may have; the first token takes 2.05 times as long"
    table = lightness_table(lightness(eight))
    assert list(table.columns[1].cells) == ["no", "yes", "yes", "yes"]
    assert lightness(eight).to_json()["classes"]["phone"]["light"] is False


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tmp_path, tied):
    save_tiny(tmp_path, tie_word_embeddings=tied)
    shape = model_shape(find(tmp_path))
    model: Any = meta_model(read_config(tmp_path), "tiny").eval()
    model.set_attn_implementation("eager")
    past = 40
    with torch.inference_mode(), torch.device("meta"):
        cache = model(input_ids=torch.empty(1, past, dtype=torch.long), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.empty(1, 1, dtype=torch.long), past_key_values=cache)
    assert counter.get_total_flops() == shape.flops(past + 1), "the new token attends to itself, too"


def test_a_sliding_window_bounds_what_a_token_attends_to(tmp_path):
    shape = Shape(matrices=10, layers=((4, None), (4, 8)))
    assert shape.flops(2) == 20 + 16 * 2 * 2
    assert shape.flops(100) == 20 + 16 * 100 + 16 * 8
    save_tiny(tmp_path, "gemma3_text")
    shape = model_shape(find(tmp_path))
    assert [window for _, window in shape.layers] == [32] * 5 + [None, 32]


def test_a_gguf_file_has_the_shape_of_its_checkpoint(tmp_path):
    pytest.importorskip("llama_cpp")
    directory = gguf_models.save_tiny("gemma3", tmp_path)
    file = gguf_models.gguf_of(directory, "f16")
    assert model_shape(find(file)) == model_shape(find(directory))
