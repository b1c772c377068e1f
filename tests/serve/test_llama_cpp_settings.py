"""Adapters, cache types, rope scaling and shared cells of llama.cpp, each held against what it must do."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.errors import InputError
from llmlite.serve.app import create_app
from llmlite.serve.engines import open_artifact
from llmlite.serve.engines.base import Piece
from llmlite.serve.models import ModelSpec
from llmlite.serve.sampling import log_softmax
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import serving

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from tests.gguf_models import gguf_of, save_tiny  # noqa: E402

SETTINGS = ServeSettings(port=0, threads=1, parallel=2, context=512, kv="f32", drain_seconds=2.0)
IDS = [(7 * i * i + 3 * i + 11) % 250 + 5 for i in range(120)]
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("settings") / "model")


@pytest.fixture(scope="module")
def artifact(directory):
    return gguf_of(directory)


def logits_of(artifact, settings, ids=IDS):
    """float32 [len(ids), vocab] of an engine opened as a server opens it."""
    engine = open_artifact(artifact, settings).engine
    sequence, out = engine.open(ids), []
    for begin in range(0, len(ids), 64):
        piece = ids[begin : begin + 64]
        out.append(engine.step([Piece(sequence, piece, len(piece))])[0].copy())
    engine.close(sequence, keep=False)
    engine.close_model()
    return np.concatenate(out)


def theirs(directory, ids=IDS, deltas=None, **config):
    """transformers' log-probabilities, with changes added to weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **config).eval()
    weights = dict(model.named_parameters())
    with torch.inference_mode():
        for name, delta in (deltas or {}).items():
            weights[name] += delta
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


def write_adapter(file, factors, **changes):
    """A GGUF adapter: for each tensor A [rank, in] and B [out, rank]."""
    writer = gguf.GGUFWriter(file, changes.get("arch", "llama"))
    writer.add_string("general.type", changes.get("type", "adapter"))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in factors.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


NAMES = {"blk.{}.ffn_down.weight": (96, 64), "blk.{}.attn_v.weight": (64, 32), "blk.{}.ffn_up.weight": (64, 96)}
HF = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The adapter's file, and what it adds to each weight by transformers' name."""
    random, factors, deltas = np.random.default_rng(0), {}, {}
    for layer in range(3):
        for name, (inner, outer) in NAMES.items():
            a, b = (random.normal(0, 0.2, size).astype(np.float32) for size in [(RANK, inner), (outer, RANK)])
            factors[name.format(layer)] = (a, b)
            theirs_name = f"model.layers.{layer}.{HF[name.split('.')[2]]}.weight"
            deltas[theirs_name] = torch.from_numpy(b @ a * (ALPHA / RANK))
    return write_adapter(tmp_path_factory.mktemp("lora") / "tuned.gguf", factors), deltas


def test_an_adapter_is_chosen_by_its_name_beside_the_bare_model(directory, artifact, adapter):
    file, deltas = adapter
    settings = replace(SETTINGS, lora=(f"tuned={file}",))
    spec = ModelSpec("model", lambda: open_artifact(artifact, settings), ("tuned",))
    wanted = {"model": theirs(directory), "tuned": theirs(directory, deltas=deltas)}
    assert np.abs(wanted["model"] - wanted["tuned"]).max() > 0.5, "or the test is none"
    found = {}
    with serving(create_app([spec], settings), settings) as server:
        assert {model.id for model in server.client.models.list().data} == {"model", "tuned"}

        def ask(model, place):
            body = {"model": model, "prompt": IDS, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
            answer = server.post("/v1/completions", body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            found[model, place] = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(IDS)]

        threads = [threading.Thread(target=ask, args=(name, n)) for n in range(3) for name in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    for (model, _), logprobs in found.items():
        expected = [wanted[model][place, IDS[place + 1]] for place in range(len(IDS) - 1)]
        np.testing.assert_allclose(logprobs, expected, atol=2e-3)


def test_adapters_that_do_not_fit_are_refused_at_the_start(artifact, adapter, tmp_path):
    a, b = np.zeros((RANK, 48), np.float32), np.zeros((64, RANK), np.float32)
    text = tmp_path / "text.gguf"
    text.write_text("not an adapter")
    wrong = {
        "text": text,
        "shape": write_adapter(tmp_path / "shape.gguf", {"blk.0.ffn_down.weight": (a, b)}),
        "architecture": write_adapter(tmp_path / "arch.gguf", {"blk.0.ffn_down.weight": (a, b)}, arch="gemma3"),
        "model": artifact,
        "missing": tmp_path / "missing.gguf",
    }
    for name, file in wrong.items():
        with pytest.raises(InputError, match=rf"^lora {name}: .*{file.name}") as refused:
            open_artifact(artifact, replace(SETTINGS, lora=(f"{name}={file}",)))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q8_0:f16", "f16:q8_0", "q8_0:q4_0"])
def test_types_of_keys_and_values_take_effect(kv, tmp_path):
    # A head of 32 is a whole block of the quantized types.
    artifact = gguf_of(save_tiny("qwen3", tmp_path / "model"))
    exact = logits_of(artifact, SETTINGS)
    gap = np.abs(logits_of(artifact, replace(SETTINGS, kv=kv)) - exact).max()
    most = 4.0 if "q4_0" in kv else 0.8 if "q8_0" in kv else 0.1
    assert 1e-5 < gap < most * max(1.0, np.abs(exact).max() / 10)


def test_types_of_keys_and_values_are_told_apart(tmp_path):
    artifact = gguf_of(save_tiny("qwen3", tmp_path / "model"))
    found = [logits_of(artifact, replace(SETTINGS, kv=kv)) for kv in ("q8_0", "q8_0:f16", "f16:q8_0", "f16")]
    for place, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-4 for other in found[place + 1 :])


def test_linear_rope_scaling_is_that_of_transformers(directory, artifact):
    settings = replace(SETTINGS, rope_scaling="linear", rope_scale=4.0, context=1200)
    ids = [(5 * i * i + i + 3) % 250 + 5 for i in range(700)]  # beyond the 512 that it was trained for
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}
    wanted = theirs(directory, ids, rope_parameters=rope)
    np.testing.assert_allclose(log_softmax(logits_of(artifact, settings, ids)), wanted, atol=5e-3)
    assert np.abs(wanted[:512] - theirs(directory, ids[:512])).max() > 0.1, "or the test is none"


def test_the_context_grows_by_as_much_as_rope_is_scaled(artifact):
    longer = replace(SETTINGS, rope_scaling="yarn", rope_scale=2.0, parallel=1)
    engine = open_artifact(artifact, replace(longer, context=1024)).engine
    assert engine.context == 1024
    engine.close_model()
    with pytest.raises(InputError, match="context 1025"):
        open_artifact(artifact, replace(longer, context=1025))


def test_sequences_that_share_cells_say_what_they_say_alone(artifact):
    settings = replace(SETTINGS, parallel=4, context=256, cells=512)
    spec = ModelSpec("model", lambda: open_artifact(artifact, settings))
    prompts = [[(a * i * i + i) % 250 + 5 for i in range(60)] for a in (3, 5, 7, 11, 13, 17)]
    with serving(create_app([spec], settings), settings) as server:
        room = server.engine.room()
        assert (room.shared, room.total) == (True, 512)

        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": 150, "temperature": 0, "logprobs": 2, "logit_bias": {"2": -100}}
            answer = server.complete(**body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["logprobs"]

        alone = [ask(prompt) for prompt in prompts]
        crowd = [None] * len(prompts)

        def fill(place):
            crowd[place] = ask(prompts[place])

        threads = [threading.Thread(target=fill, args=(place,)) for place in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.models.models[0].service.scheduler.stats.preemptions > 0
    for one, other in zip(alone, crowd, strict=True):
        for place, (said, again) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            if said != again:  # only where the two likeliest were nearly alike
                best = sorted(one["top_logprobs"][place].values(), reverse=True)
                assert best[0] - best[1] < 0.01
                break
