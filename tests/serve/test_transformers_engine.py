"""The engine for safetensors checkpoints by itself, held against transformers' own forward on tiny random models."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmlite.errors import InputError
from llmlite.serve.engines.base import NoRoom, Piece
from llmlite.serve.engines.slot_cache import Rows, SlotLayer
from llmlite.serve.engines.transformers import FEW, TransformersEngine
from llmlite.serve.settings import ServeSettings
from tests.serve.conftest import running
from tests.tiny import FAMILIES, edit_config, save_tiny

LOGITS = 3e-5  # float32 rounding of logits up to 6


class Tiny:
    """A checkpoint and what transformers computes of it, one sequence at a time and without a cache."""

    def __init__(self, directory):
        self.directory = directory
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def engine(self, **settings):
        return TransformersEngine(self.directory, ServeSettings(threads=1, **{"parallel": 4, **settings}))

    def logits(self, ids, rows=1):
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0, -rows:].numpy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(family="llama", **changes):
        key = (family, *changes.items())
        if key not in made:
            made[key] = Tiny(save_tiny(tmp_path_factory.mktemp(family), family, **changes))
        return made[key]

    return get


@pytest.fixture(params=FAMILIES)
def family(request, tiny):
    return tiny(request.param)


def ids(count, seed):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


def start(engine, *lengths, reuse=False, first=0):
    prompts = [ids(length, first + n) for n, length in enumerate(lengths)]
    sequences = [engine.open(prompt, reuse=reuse) for prompt in prompts]
    engine.step([Piece(s, prompt, 0) for s, prompt in zip(sequences, prompts, strict=True)])
    return sequences


def assert_right(tiny, sequences, rows, atol=LOGITS):
    for sequence, found in zip(sequences, rows, strict=True):
        np.testing.assert_allclose(found, tiny.logits(sequence.tokens, len(found)), atol=atol, rtol=0)


def record_rows(monkeypatch):
    made = []
    of = Rows.of

    def recording(*args):
        made.append(of(*args))
        return made[-1]

    monkeypatch.setattr(Rows, "of", recording)
    return made


def test_one_forward_for_all_sequences_that_generate(family, monkeypatch):
    engine = family.engine()
    made = record_rows(monkeypatch)
    sequences = start(engine, 40, 45, 50, 38)  # past gemma's window of 32, and not far apart
    for step in range(4):
        made.clear()
        rows = engine.step([Piece(s, [7 + 10 * step + n], 1) for n, s in enumerate(sequences)])
        assert [(r.slots, r.split) for r in made] == [([0, 1, 2, 3], False)]
        assert_right(family, sequences, rows)


def test_unequal_lengths_and_gaps_between_slots(family, monkeypatch):
    engine = family.engine()
    sequences = start(engine, 90, 3, 20, 36)
    engine.close(sequences.pop(2), keep=True)
    made = record_rows(monkeypatch)
    rows = engine.step([Piece(s, [9 + n], 1) for n, s in enumerate(reversed(sequences))])
    assert made[0].split
    assert_right(family, sequences[::-1], rows)
    rows = engine.step([Piece(s, [19 + n] * (n + 2), n + 1) for n, s in enumerate(sequences)])  # guesses to check
    assert len(made) == 2 and made[1].split
    assert_right(family, sequences, rows)


def test_prompts_guesses_and_tokens_in_one_step(family):
    engine = family.engine()
    sequences = start(engine, 50, 41, 5)
    new = engine.open(ids(60, 9))
    work = [
        (sequences[0], [5], 1),
        (new, ids(60, 9)[:47], 3),
        (sequences[1], [8, 9, 10, 11], 4),
        (sequences[2], [3, 4], 2),
    ]
    rows = engine.step([Piece(*piece) for piece in work])
    assert_right(family, [piece[0] for piece in work], rows)
    rows = engine.step([Piece(new, ids(60, 9)[47:], 1), Piece(sequences[0], [6], 0)])
    assert rows[1].shape == (0, engine.vocab_size)
    assert_right(family, [new], rows[:1])


def test_what_is_cut_is_forgotten(family):
    engine = family.engine()
    one, other = start(engine, 60, 44)
    engine.step([Piece(one, [11, 12, 13], 0), Piece(other, [14, 15], 0)])
    engine.cut(one, 37)  # 26 past the window's beginning
    engine.cut(other, 45)
    assert [len(one.tokens), len(other.tokens)] == [37, 45]
    assert_right(family, [one, other], engine.step([Piece(one, [21], 1), Piece(other, [22], 1)]))
    assert_right(family, [one, other], engine.step([Piece(one, ids(30, 8), 2), Piece(other, [23], 1)]))


def test_suspended_sequences_come_back_elsewhere(family):
    engine = family.engine(parallel=2)
    one, other = start(engine, 70, 35)
    engine.suspend(one)
    assert one.slot is None and engine.room().used == 35
    third = start(engine, 20, first=5)[0]
    engine.step([Piece(third, [3], 0), Piece(other, [4], 0)])
    engine.close(other, keep=False)
    engine.resume(one)
    assert one.slot == 1
    assert_right(family, [one, third], engine.step([Piece(one, [5], 1), Piece(third, [6], 1)]))


def test_a_running_sequence_s_prefix_is_copied(family):
    engine = family.engine()
    (one,) = start(engine, 80)
    prompt = [*ids(80, 0)[:50], *ids(9, 3)]
    two = engine.open(prompt)
    assert (two.reused, two.tokens) == (50, prompt[:50])
    rows = engine.step([Piece(two, prompt[50:], 2), Piece(one, [5], 1)])
    assert_right(family, [two, one], rows)


def test_an_idle_slot_s_prefix_is_taken_over(family):
    engine = family.engine()
    (one,) = start(engine, 80)
    engine.close(one, keep=True)
    prompt = [*ids(80, 0)[:40], *ids(9, 3)]
    two = engine.open(prompt)
    assert (two.slot, two.reused) == (0, 40)
    assert_right(family, [two], engine.step([Piece(two, prompt[40:], 1)]))


def test_prefixes_outlive_a_restart(family, tmp_path):
    engine = family.engine(parallel=1, cache_dir=tmp_path / "kv")
    (one,) = start(engine, 150)
    engine.close(one, keep=True)
    engine.close_model()
    again = family.engine(parallel=2, cache_dir=tmp_path / "kv")
    two = again.open([*ids(150, 0), 8])
    assert two.reused == 150
    assert_right(family, [two], again.step([Piece(two, [8], 1)]))


def test_memory_grows_with_the_tokens_and_keeps_what_a_step_wrote(tiny):
    model = tiny(max_position_embeddings=8192)
    engine = model.engine()
    store = engine._cache.layers[0].stores[0]
    assert store.capacity <= 256, "nothing is allocated for 8192 tokens at the start"
    short, long = start(engine, 200, 250)
    rows = engine.step([Piece(short, ids(40, 5), 2), Piece(long, ids(400, 6), 2)])  # the second one needs more
    assert store.capacity == 768
    assert_right(model, [short, long], rows)
    assert_right(model, [short, long], engine.step([Piece(short, [5], 1), Piece(long, [6], 1)]))


def test_the_last_position_of_a_context(tiny):
    model = tiny()
    engine = model.engine()
    full, other = start(engine, 255, 240)
    rows = engine.step([Piece(full, [5], 1), Piece(other, [6] * FEW, 1)])
    assert len(full.tokens) == engine.context == len(other.tokens) == 256
    assert_right(model, [full, other], rows)
    engine.cut(full, 254)  # padded to its neighbour's width it writes past the context
    engine.cut(other, 200)
    rows = engine.step([Piece(full, [7, 8], 1), Piece(other, [6] * FEW, 1)])
    assert_right(model, [full, other], rows)


def test_a_full_cache_refuses_and_changes_nothing(tiny):
    model = tiny()
    engine = model.engine(cells=260, parallel=3)
    assert engine.room().shared
    kept, one, two = start(engine, 60, 100, 90)
    engine.close(kept, keep=True)
    assert (engine.room().kept, engine.room().used, engine.room().total) == (60, 190, 260)
    assert not engine.room().fits(71) and engine.room().fits(70)
    engine.step([Piece(one, ids(65, 5), 1)])  # the idle slot makes room
    assert engine.room().kept == 0
    before = [list(one.tokens), list(two.tokens)]
    with pytest.raises(NoRoom):
        engine.step([Piece(one, [5, 6, 7], 1), Piece(two, [8, 9, 10], 1)])
    assert [one.tokens, two.tokens] == before
    engine.suspend(two)
    engine.step([Piece(one, ids(80, 7), 1)])
    with pytest.raises(NoRoom):
        engine.resume(two)
    engine.cut(one, 150)
    engine.resume(two)
    assert_right(model, [one, two], engine.step([Piece(one, [5], 1), Piece(two, [8], 1)]))


def test_a_step_that_fails_halfway_changes_nothing(tiny, monkeypatch):
    model = tiny()
    engine = model.engine()
    one, two = start(engine, 30, 50)
    before = [list(one.tokens), list(two.tokens), engine.room()]
    forwards = []

    def failing(module, args, kwargs):
        forwards.append(kwargs["input_ids"].shape)
        if len(forwards) == 2:
            raise RuntimeError("failed")

    hook = engine._model.register_forward_pre_hook(failing, with_kwargs=True)
    with pytest.raises(RuntimeError, match="failed"):
        engine.step([Piece(one, ids(40, 3), 1), Piece(two, [5], 1)])
    hook.remove()
    assert len(forwards) == 2
    assert [one.tokens, two.tokens, engine.room()] == before
    assert_right(model, [one, two], engine.step([Piece(one, [6], 1), Piece(two, ids(20, 4), 2)]))


def test_more_requests_than_the_cache_holds_are_all_answered_as_if_alone(tiny):
    model = tiny()
    prompts = [ids(50 + 9 * n, n) for n in range(6)]
    wanted = []
    for prompt in prompts:
        with torch.inference_mode():
            out = model.model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)
        wanted.append(out[0, len(prompt) :].tolist())
    engine = model.engine(cells=300)
    with running(engine, parallel=4) as server, ThreadPoolExecutor(6) as pool:
        ask = {"max_tokens": 60, "temperature": 0}
        answers = list(pool.map(lambda prompt: server.complete(prompt, **ask).json(), prompts))
    for answer, tokens in zip(answers, wanted, strict=True):
        said = b"".join(engine.token_bytes(token, special=False) for token in tokens if token not in engine.eos)
        assert answer["choices"][0]["text"] == said.decode("utf-8", "replace")
        assert answer["usage"]["completion_tokens"] == len(tokens)


def test_numbers_that_overflowed_reach_no_neighbour(tiny):
    model = tiny()
    engine = model.engine()
    broken, other = start(engine, 60, 80)
    for layer in engine._cache.layers:
        for store in layer.stores:
            with torch.inference_mode():
                store.read(slice(0, 1), 0, 60 + FEW, torch.float32).fill_(float("nan"))
    assert np.isnan(engine.step([Piece(broken, [5], 1)])[0]).all()
    engine.close(broken, keep=False)
    (next_one,) = start(engine, 50)
    assert next_one.slot == 0
    rows = engine.step([Piece(next_one, [5], 1), Piece(other, [6], 1)])
    assert_right(model, [next_one, other], rows)


def test_rotary_embeddings_that_depend_on_the_length_run_one_by_one(tmp_path, monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = Tiny(save_tiny(tmp_path / "model", rope_parameters=rope))
    engine = model.engine(parallel=2)
    sequences = start(engine, 20, 30)
    made = record_rows(monkeypatch)
    engine.step([Piece(s, [5], 1) for s in sequences])
    assert len(made) == 2


def test_exact_replies_have_the_same_bits_in_a_crowd(family):
    def run(engine, sequence, others):
        found = [engine.step([Piece(sequence, ids(130, 1)[:128], 0)])]
        found += [engine.step([Piece(sequence, ids(130, 1)[128:], 2)])]
        for token in range(5):
            crowd = [Piece(other, [token], 1) for other in others]
            found.append(engine.step([*crowd, Piece(sequence, [token], 1)])[-1:])
        return np.concatenate([rows[0] for rows in found])

    engine = family.engine(exact=True)
    crowd = start(engine, 100, 33, 7, first=20)
    busy = run(engine, engine.open(ids(130, 1), reuse=False), crowd)
    engine = family.engine(exact=True, parallel=1)
    alone = engine.open(ids(130, 1), reuse=False)
    np.testing.assert_array_equal(busy, run(engine, alone, []))
    engine.close(alone, keep=True)
    again = engine.open([*ids(130, 1), *range(5)])
    assert again.reused == 128, "whole chunks"
    np.testing.assert_array_equal(busy[:2], engine.step([Piece(again, ids(130, 1)[128:], 2)])[0])
    engine.close(again, keep=False)
    (short,) = start(engine, 120)
    for token in range(20):
        engine.step([Piece(short, [token], 1)])
    tokens = [*short.tokens, 8]
    engine.close(short, keep=True)
    assert engine.open(tokens).reused == 0, "what was generated one by one has not the bits of a chunk"


# Largest difference of a logit from float32's, of logits up to 6: twice the worst family's, as it was measured.
KV_ERRORS = {"f32": LOGITS, "f16": 0.008, "bf16": 0.07, "q8_0": 0.18, "q4_0": 2.4, "q8_0:q4_0": 2.6}


@pytest.mark.parametrize("kv", KV_ERRORS)
def test_what_a_cache_type_costs(kv, family):
    engine = family.engine(kv=kv)
    sequences = start(engine, 90, 3, 60, 70)
    error = 0.0
    for step in range(3):
        rows = engine.step([Piece(s, [step + n], 1) for n, s in enumerate(sequences)])
        error = max(error, *(np.abs(r - family.logits(s.tokens)).max() for r, s in zip(rows, sequences, strict=True)))
    assert error < KV_ERRORS[kv]
    assert kv == "f32" or error > LOGITS, "it was not stored so"
    state = engine.save_slot(0)
    engine.suspend(sequences[0])
    engine.resume(sequences[0])
    assert engine.save_slot(sequences[0].slot) == state


@pytest.mark.parametrize(("kv", "bits"), [("f32", 32), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_bytes_of_a_cache_type(kv, bits, tiny):
    engine = tiny(hidden_size=128).engine(kv=kv)
    (sequence,) = start(engine, 200)
    values = 2 * 2 * 2 * 32 * 200  # keys and values of 2 layers with 2 heads of 32
    assert values * bits / 8 <= len(engine.save_slot(sequence.slot)) < values * bits / 8 + 4096


@pytest.mark.parametrize("kv", ["q5_0", "f16:iq4_nl"])
def test_types_that_torch_can_t_hold_are_refused(kv, tiny):
    with pytest.raises(InputError, match=r"f32, f16, bf16, q8_0 or q4_0"):
        tiny().engine(kv=kv)


def test_models_without_sdpa_run_with_one_padded_attention(tiny, monkeypatch):
    model = tiny("gemma3_text")
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: load(*a, attn_implementation="eager", **k)
    )
    engine = model.engine()
    made = record_rows(monkeypatch)
    sequences = start(engine, 90, 3, 20)
    engine.close(sequences.pop(1), keep=False)
    rows = engine.step([Piece(s, [9 + n], 1) for n, s in enumerate(sequences)])
    assert not made[-1].split
    assert_right(model, sequences, rows)


def test_layers_that_are_no_attention_are_refused(tmp_path):
    directory = save_tiny(tmp_path / "model", "qwen3")
    edit_config(directory, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(InputError, match=r"has layers with chunked_attention; .* full and sliding attention alone"):
        TransformersEngine(directory, ServeSettings(threads=1))


def test_a_model_that_keeps_its_past_elsewhere_than_in_the_cache_is_refused(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model", "qwen3")
    monkeypatch.setattr(SlotLayer, "update", lambda self, keys, values, *_, **__: (keys, values))
    with pytest.raises(InputError, match="keep no keys and values"):
        TransformersEngine(directory, ServeSettings(threads=1))


def test_context_and_cells_fit_the_memory_unless_they_are_named(tiny, monkeypatch):
    model = tiny(max_position_embeddings=8192)
    size = 2 * 2 * 2 * 16 * 4  # a position's keys and values of 2 layers with 2 heads of 16 in float32
    free = type("Free", (), {"available": 2 * 1000 * size})
    monkeypatch.setattr("llmlite.serve.engines.slot_cache.psutil.virtual_memory", lambda: free)
    engine = model.engine()
    assert (engine.context, engine.room().total, engine.room().shared) == (1000, 1000, True)
    engine = model.engine(context=2000)
    assert (engine.context, engine.room().total, engine.room().shared) == (2000, 8000, False)


def test_cells_below_the_context_are_refused(tiny):
    with pytest.raises(InputError, match="cells 100: must be at least the context, 256"):
        tiny().engine(cells=100)


def test_a_cache_of_other_settings_is_not_read(tiny):
    kinds = [{}, {"kv": "f16"}, {"kv": "q8_0"}, {"exact": True}]
    fingerprints = [tiny().engine(**kind).store.fingerprint for kind in [*kinds, {}]]
    assert len(set(fingerprints)) == len(kinds)
