"""Memory and speed at several contexts, told beforehand and measured, and runs within a budget."""

import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch

from llmlite.errors import InputError, OutsideError
from llmlite.evals import budget
from llmlite.evals.budget import Fit, measure_fit
from llmlite.evals.devices import device_memory, gpu_memory, hold
from llmlite.evals.evaluate import Evaluation
from llmlite.evals.llama import Llama, LlamaSettings, library, read_buffers
from llmlite.evals.locate import find
from llmlite.evals.memory import Memory, MemoryAt, NoRoomError
from llmlite.evals.perplexity import PROTOCOLS, Windows
from llmlite.evals.predict import Longest, Prediction, predict, search
from llmlite.evals.probe import probe, run_module
from llmlite.evals.resources_table import contexts_table
from llmlite.evals.size import Size, measure_size
from llmlite.evals.speed import ANSWER_TOKENS, Speed, SpeedAt, Spread, main_context, measure_speed
from llmlite.evals.trace import trace_prompt
from tests import gguf_models
from tests.tiny import save_tiny, tiny_model

BAR = 64 << 20  # and 3%


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Wide enough that weights, cache and buffers weigh more than the bar: 27 MB, 4 MB per 512 tokens."""
    pytest.importorskip("llama_cpp")
    size = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    directory = gguf_models.save_tiny("llama", tmp_path_factory.mktemp("wide"), **size)
    return gguf_models.gguf_of(directory, "f16")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Many layers and a wide cache, where an allocator's holes would weigh: 46 KB a token."""
    size = {
        "hidden_size": 96,
        "num_hidden_layers": 30,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    return save_tiny(tmp_path_factory.mktemp("deep"), max_position_embeddings=4096, **size)


@pytest.mark.parametrize("which", ["gguf", "deep"])
def test_the_memory_told_beforehand_is_the_memory_measured(which, request):
    artifact = request.getfixturevalue(which)
    contexts = [64, 512, 1536]
    path = find(artifact).path
    measured, speed = probe(path, threads=1, repeats=0, contexts=contexts)
    assert speed is None
    assert measured.weights == pytest.approx(measure_size(find(artifact)).tensor_bytes, rel=0.01)
    assert measured.peak == measured.contexts[1].peak, "512 is the main context"
    assert measured.program < measured.peak
    if which == "gguf":
        assert measured.peak < 200e6, "measuring llama.cpp must not load torch"
    for told, seen in zip(predict(path, contexts, threads=1), measured.contexts, strict=True):
        assert told.context == seen.context
        assert told.weights == pytest.approx(measured.weights, rel=0.01)
        assert told.kv == pytest.approx(seen.kv, rel=0.02)
        assert abs(told.peak - seen.peak) < 0.03 * seen.peak + BAR, f"{asdict(told)} {seen}"
        assert abs(told.peak - seen.peak) < told.weights + told.kv + told.activations + BAR / 4, "it tells them apart"
        assert seen.address_space > seen.peak


def test_a_plan_without_memory_is_the_plan_with_it(gguf):
    dry = Llama(gguf, LlamaSettings(512, outputs=1, threads=1, dry=True))
    wet = Llama(gguf, LlamaSettings(512, outputs=1, threads=1))
    assert dry.buffers == wet.buffers
    assert wet.buffers.kv == 512 * wet.kv_bytes_per_token()
    dry.renew(2048)
    assert dry.buffers.kv == 4 * wet.buffers.kv
    dry.close()
    wet.close()


def test_a_sliding_window_bounds_the_cache_of_its_layers(tmp_path):
    pytest.importorskip("llama_cpp")
    size = {"hidden_size": 256, "num_key_value_heads": 4, "num_attention_heads": 4, "max_position_embeddings": 8192}
    file = gguf_models.gguf_of(gguf_models.save_tiny("gemma3", tmp_path, **size), "f16")
    llama = Llama(file, LlamaSettings(1024, threads=1, dry=True, windowed=True))
    growth = llama.buffers.kv
    llama.renew(4096)
    growth = (llama.buffers.kv - growth) / 3072
    layers = llama.api.llama_model_n_layer(llama.model)
    full = sum(kind == "full_attention" for kind in gguf_models.GEMMA_LAYERS)
    assert 0 < full < layers
    assert growth == pytest.approx(llama.kv_bytes_per_token() * full / layers, rel=0.05)
    llama.close()


def test_buffers_are_read_from_the_log():
    log = [
        "llama_context:        CPU  output buffer size =     0.50 MiB",
        "llama_kv_cache: size =   45.00 MiB (  2048 cells,  30 layers,  1/1 seqs), K (f16):   22.50 MiB, V (f16):   22.50 MiB",
        "llama_kv_cache: size =    5.00 MiB (   512 cells,   5 layers,  1/1 seqs), K (f16):    2.50 MiB, V (f16):    2.50 MiB",
        "sched_reserve:        CPU compute buffer size =    99.00 MiB",
        "sched_reserve:        CPU compute buffer size =    15.50 MiB",
    ]
    found = read_buffers(log)
    assert (found.kv, found.compute) == (50 << 20, 16 << 20), "two caches, the last plan"
    with pytest.raises(OutsideError, match="does not log"):
        read_buffers(["hello"])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_forward_without_memory_has_the_cache_of_a_real_one(family):
    model = tiny_model(family)
    config = model.config
    cache: Any = None
    for start in range(0, 96, 32):
        ids = torch.arange(start, start + 32)[None]
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    with torch.device("meta"):
        empty = type(model)(config).float().eval()
    traced = trace_prompt(empty, 96, 32)
    assert traced.kv == sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    feed_forward = 2 * 32 * config.intermediate_size * 4
    assert traced.activations >= feed_forward, "gate and up live side by side"


def test_a_forward_keeps_one_layers_intermediates_at_a_time():
    def traced(layers, positions):
        with torch.device("meta"):
            return trace_prompt(tiny_model(num_hidden_layers=layers), positions, 32).activations

    assert traced(8, 96) == pytest.approx(traced(2, 96), rel=0.05), "a layer's are gone when the next begins"
    repeated = 2 * 4 * 16 * 480 * 4  # keys and values for 4 query heads of 16, 480 positions, float32
    replaced = repeated // 4  # of one layer: keys or values before they grew, for 2 heads
    mask = 32 * 480 * (4 + 1)  # as numbers and as booleans
    assert traced(2, 960) - traced(2, 480) == repeated + mask + replaced


def test_speed_reads_a_whole_prompt_and_writes_a_whole_answer():
    class Clock:
        vocab_size = 100

        def __init__(self):
            self.read = []

        def prompt(self, tokens):
            self.read.append(len(tokens))
            return 5

        def step(self, token):
            self.read.append(1)
            return token

    clock = Clock()
    found = measure_speed(clock, context=300, repeats=2)
    assert clock.read == [300, *[1] * ANSWER_TOKENS] * 2
    assert found.context == 300
    assert found.prompt_tps.minimum <= found.prompt_tps.median <= found.prompt_tps.maximum


def test_the_main_context_is_512_or_the_longest():
    def at(context):
        return SpeedAt(context, Spread.of([context, 2 * context, 4 * context]), Spread.of([7.0]), Spread.of([1.0]))

    speed = Speed.of([at(1), at(512), at(4096)])
    assert speed.prompt_tps == 1024
    assert main_context([1, 4096]) == 4096
    first = speed.to_json()["contexts"][0]
    assert first["prompt_tps"] == {"median": 2, "minimum": 1, "maximum": 4}
    assert "prompt_joules" not in first, "not shown where the machine can't tell"


def told(context, **changes):
    parts = {
        "program": 100,
        "runtime": 0,
        "weights": 1000,
        "kv": 10 * context,
        "activations": 0,
        "loading": 0,
        "untouched": 5,
    }
    return Prediction(context, **{**parts, **changes})


def test_the_longest_context_is_searched_for():
    class Forecaster:
        trained = 564

        def at(self, context):
            return told(context)

    assert search(Forecaster(), 1100 + 10 * 77) == 77
    assert search(Forecaster(), 1100 + 10 * 77 - 1) == 76
    assert search(Forecaster(), 1109) == 0
    assert search(Forecaster(), 10**9) == 500, "with 64 tokens of an answer as many as it was trained for"


def test_a_peak_on_a_gpu_is_without_the_program():
    assert told(1).peak == 1110
    assert told(1, device="cuda").peak == 1010
    assert told(1, loading=500).peak == 1600, "loading takes more than the run"


def test_a_run_within_its_budget_and_one_beyond_it(gguf):
    one = predict(gguf, [64], threads=1)[0]
    found = measure_fit(find(gguf), one.peak + (80 << 20), 64, threads=1)
    assert found.fits
    assert found.peak <= found.budget
    assert found.longest == 512 - ANSWER_TOKENS, "all that the model was trained for"
    assert "fits into" in found.sentence
    tight = measure_fit(find(gguf), one.peak - (10 << 20), 64, threads=1)
    assert not tight.fits
    assert tight.short_by == tight.predicted - tight.budget
    assert "does not fit into" in tight.sentence


@pytest.mark.parametrize(("which", "context"), [("gguf", 20_000), ("deep", 1500)])
def test_the_limit_is_real(which, context, request):
    path = find(request.getfixturevalue(which)).path
    full, small = predict(path, [context, 1], threads=1)
    quarter = small.peak + (full.peak - small.peak) // 4
    with pytest.raises(NoRoomError):
        budget.probe_one(path, 1, 0, context, budget.Limit(quarter, full.untouched))


def test_a_trial_that_fails_is_repeated_with_more_room(monkeypatch, gguf):
    monkeypatch.setattr(budget, "predict", lambda path, contexts, threads: [told(contexts[0])])
    monkeypatch.setattr(budget, "longest", lambda path, room, threads: Longest(room // (1 << 20), 10**6))
    tried = []

    def run(self, context):
        tried.append(context)
        return None if context > 1000 else 77

    monkeypatch.setattr(budget._Trial, "run", run)
    found = measure_fit(find(gguf), 1100 << 20, 10)
    assert tried == [10, 1100, 1085, 1040, 860], "1% of the budget and 4 MiB are 15 MiB"
    assert (found.fits, found.longest, found.longest_peak) == (True, 860, 77)


def test_sentences_say_what_was_found():
    facts = {
        "name": "m",
        "budget": 200 << 20,
        "context": 512,
        "predicted": 150 << 20,
        "longest": 4000,
        "longest_peak": 1,
    }
    fits = Fit(**facts, fits=True, peak=150 << 20, short_by=0).sentence
    assert (
        fits
        == "m: a prompt of 512 tokens fits into 200 MiB: 150 MiB at the peak; the longest that ran within it has 4,000 tokens"
    )
    short = Fit(**{**facts, "longest": 0}, fits=False, peak=None, short_by=5 << 20).sentence
    assert (
        short
        == "m: a prompt of 512 tokens does not fit into 200 MiB: 5 MiB too few; not even a prompt of one token fits"
    )


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("import sys; print('no', file=sys.stderr); sys.exit(4)", NoRoomError, "no"),
        ("import os; os.kill(os.getpid(), 9)", NoRoomError, ""),
        ("import sys; sys.exit('libgomp: Thread creation failed: x')", NoRoomError, "Thread creation"),
        ("import sys; print('bad', file=sys.stderr); sys.exit(2)", InputError, "bad"),
        ("raise ValueError('other')", OutsideError, "the measuring process failed .ValueError: other"),
    ],
)
def test_what_a_limited_process_ended_with_is_told(code, error, words, tmp_path):
    with pytest.raises(error, match=words) as caught:
        run_module(tmp_path, [sys.executable, "-c", code], limited=True)
    assert type(caught.value) is error


def test_a_ballast_leaves_the_budget():
    assert hold(free=80, budget=8) == 72
    with pytest.raises(OutsideError, match="5 bytes of the GPU are free"):
        hold(free=5, budget=8)


def test_a_devices_memory_is_what_the_library_says():
    pytest.importorskip("llama_cpp")
    api, _ = library()
    native = api.llama_cpp._lib
    if gpu_memory(api) is None:
        native.ggml_backend_dev_get(0)
        with open("/proc/meminfo") as file:
            total = int(file.readline().split()[1]) * 1024
        assert device_memory(native, native.ggml_backend_dev_get(0)).total == pytest.approx(total, rel=0.01)


def test_the_table_has_a_row_per_context_and_no_empty_column():
    speed = Speed.of([SpeedAt(n, Spread.of([1.0, 2.0, 4.0]), Spread.of([3.0]), Spread.of([0.5])) for n in (1, 512)])
    memory = Memory(
        10**6, 1000, 5 * 10**6, 10**6, "cpu", (MemoryAt(512, 512_000, 10**6, 5 * 10**6, address_space=10**7),)
    )
    size = Size(10**6, 10**6, 10**6)
    facts = {
        "artifact": "m",
        "base": None,
        "engine": "llama.cpp",
        "version": "1",
        "size": size,
        "windows": Windows(PROTOCOLS["paper"], 8),
    }
    table = contexts_table(Evaluation(**facts, scores={}, memory=memory, speed=speed))
    assert list(table.columns[0].cells) == ["1", "512"]
    headers = [str(column.header).replace("\n", " ") for column in table.columns]
    assert headers == [
        "prompt tokens",
        "cache MB",
        "compute MB",
        "peak MB",
        "address space MB",
        "prompt t/s",
        "answer t/s",
        "first token s",
    ]
    assert list(table.columns[5].cells)[1] == "2.0 (1.0 to 4.0)"
    assert "reserved" not in memory.to_json()["contexts"][0]
