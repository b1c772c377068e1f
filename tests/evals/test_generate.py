"""A reader's predictions are those of one forward pass over everything, however little of it is computed anew."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.errors import InputError
from llmlite.evals.engines import open_engine
from llmlite.evals.generate import greedy, predict_each, reader_of
from llmlite.evals.kv import KV_BITS, KvTypes, parse_kv
from llmlite.evals.kv_rounding import rounded
from tests import gguf_models

KINDS = ["llama", "gemma3"]  # gemma3 has sliding windows of 8: a cache that can't be cut


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    return gguf_models.save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["transformers", "llama.cpp"])
def reader(saved, request):
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp")
        engine = open_engine(gguf_models.gguf_of(saved, "f32"), threads=1)
        yield reader_of(engine, KvTypes("f32", "f32"), context=64)
    else:
        engine = open_engine(saved, threads=1)
        yield reader_of(engine)
    engine.close()


@pytest.fixture(scope="module")
def model(saved):
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


def whole(model, tokens, rows) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(np.asarray(tokens))[None]).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)[-rows:]


def tokens_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 300, length)


def test_what_two_texts_share_is_computed_once(reader, model, monkeypatch):
    context = tokens_of(0, 90)
    computed = []
    forward = type(reader)._forward
    monkeypatch.setattr(
        type(reader), "_forward", lambda self, part, first: computed.append(len(part)) or forward(self, part, first)
    )
    reader.hold(context)
    assert sum(computed) == 90
    for seed in (1, 2, 3):
        tokens = np.concatenate([context, tokens_of(seed, 20)])
        found = reader.predict(tokens, 10)
        assert torch.allclose(found, whole(model, tokens, 10), atol=5e-3)
    assert sum(computed) == 90 + 3 * 20


def test_going_back_gives_what_a_new_start_gives(reader, model):
    first = tokens_of(4, 70)
    reader.predict(first, 1)
    for tokens, rows in (
        (first[:30], 30),
        (np.concatenate([first[:40], tokens_of(5, 9)]), 3),
        (tokens_of(6, 12), 12),
        (first, 69),
    ):
        assert torch.allclose(reader.predict(tokens, rows), whole(model, tokens, rows), atol=5e-3)


def test_a_context_grows_and_keeps_what_it_has_read(reader, model):
    tokens = tokens_of(7, 400)
    reader.predict(tokens[:60], 1)
    assert torch.allclose(reader.predict(tokens, 5), whole(model, tokens, 5), atol=5e-3)


def test_the_order_of_many_questions_is_free(reader, model):
    shared = tokens_of(8, 40)
    rows = [np.concatenate([shared, tokens_of(seed, 3 + seed)]) for seed in range(5)] + [tokens_of(20, 6)]
    found = dict(predict_each(reader, [(row, 3) for row in rows]))
    assert sorted(found) == list(range(6))
    for n, row in enumerate(rows):
        assert torch.allclose(found[n], whole(model, row, 3), atol=5e-3)


def test_losses_are_those_of_the_next_tokens(reader, model):
    tokens = tokens_of(9, 130)
    wanted = -whole(model, tokens, 130)[:-1].gather(1, torch.from_numpy(tokens[1:])[:, None])[:, 0]
    assert reader.losses(tokens, rows=50) == pytest.approx(wanted.numpy(), abs=5e-3)


def test_greedy_answers_are_those_of_transformers(reader, model):
    prompt = tokens_of(10, 25)
    with torch.no_grad():
        out = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
    wanted = out[0, 25:].tolist()
    ended = next((n for n, token in enumerate(wanted) if token in reader.ends), 20)
    assert greedy(reader, prompt, 20) == reader.decode(wanted[:ended])


def test_an_answer_ends_before_a_stop_word(reader):
    prompt = tokens_of(11, 25)
    text = greedy(reader, prompt, 20)
    assert len(text) > 4
    assert greedy(reader, prompt, 20, [text[2:4]]) == text[: text.index(text[2:4])]


def test_more_than_the_model_was_trained_for_is_refused(reader):
    with pytest.raises(InputError, match="trained for 512"):
        reader.predict(tokens_of(1, 513), 1)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_values_are_rounded_as_ggml_rounds_them(kind):
    gguf = pytest.importorskip("gguf")
    values = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1)) * 3
    values[0, 0] = 0
    which = gguf.GGMLQuantizationType[kind.upper()]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), which), which)
    assert rounded(values, kind).numpy() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("keys", "values"), [("q4_0", "f32"), ("f32", "q4_0")])
def test_a_cache_of_transformers_is_rounded(tmp_path, keys, values):
    engine = open_engine(gguf_models.save_tiny("llama3", tmp_path), threads=1)
    tokens = tokens_of(12, 60)
    reader = reader_of(engine, KvTypes(keys, values))
    reader.hold(tokens)
    reader.predict(np.append(tokens, 7), 1)
    for layer in reader.cache.layers:
        for stored, kind in ((layer.keys, keys), (layer.values, values)):
            assert torch.allclose(stored, rounded(stored, "q4_0")) == (kind == "q4_0")
    engine.close()


def test_heads_that_blocks_do_not_divide_are_refused(tmp_path):
    engine = open_engine(gguf_models.save_tiny("llama", tmp_path), threads=1)
    with pytest.raises(InputError, match="16 wide"):
        reader_of(engine, KvTypes("q8_0", "f16")).predict(tokens_of(1, 9), 1)
    with pytest.raises(InputError, match="only llama"):
        reader_of(engine, KvTypes("iq4_nl", "f16"))
    engine.close()


def test_llama_takes_the_types_of_its_cache(tmp_path):
    pytest.importorskip("llama_cpp")
    file = gguf_models.gguf_of(gguf_models.save_tiny("llama3", tmp_path), "f32")  # heads of 32, one block
    engine = open_engine(file, threads=1)
    sizes = {kv: len(_state(engine, kv)) for kv in (*KV_BITS, "q8_0:q4_0")}
    elements = 3 * 2 * 32 * 256  # layers, heads, width, positions
    for kv, bits in KV_BITS.items():
        assert sizes["f32"] - sizes[kv] == 2 * elements * (32 - bits) / 8, kv
    assert sizes["q8_0:q4_0"] - sizes["q4_0"] == elements * 4 // 8
    engine.close()


def _state(engine, kv: str) -> bytes:
    reader = reader_of(engine, parse_kv(kv), context=256)
    reader.hold(tokens_of(13, 256))
    return engine.llama.state()


@pytest.mark.parametrize("text", ["q9_0", "f16:", "f16:f17", ":f16", ""])
def test_unknown_types_of_a_cache_are_refused(text):
    with pytest.raises(InputError, match="K:V"):
        parse_kv(text)
