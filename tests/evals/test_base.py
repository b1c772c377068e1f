"""The base's predictions: kept on disk, streamed layer by layer, and what of them went wrong."""

import json
import math
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.errors import InputError, OutsideError
from llmlite.evals import base as base_module
from llmlite.evals.base import LazyBase, SideBySide, facts_of, loaded_memory
from llmlite.evals.digests import digest_of
from llmlite.evals.divergence import common_vocabulary
from llmlite.evals.engines import open_engine
from llmlite.evals.kept import BODY, FACTS, Facts, Store
from llmlite.evals.locate import find
from llmlite.evals.perplexity import PROTOCOLS, Window, Windows
from llmlite.evals.score import score
from llmlite.evals.texts import Text
from tests import gguf_models
from tests.tiny import FAMILIES, edit_config, save_tiny

WORDS = Text("words", "".join(gguf_models.TEXTS) * 3)
CATS = Text("cats", "the cat sat on the mat and the dog ran to the house. " * 30)
SHORT = Windows(PROTOCOLS["llama.cpp"], window=64, limit=3)
SLIDING = Windows(PROTOCOLS["sliding"], window=64, stride=40)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return gguf_models.save_tiny("llama3", tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def noisy(llama3, tmp_path_factory):
    out = tmp_path_factory.mktemp("noisy")
    model = AutoModelForCausalLM.from_pretrained(llama3)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(llama3).save_pretrained(out)
    return out


@contextmanager
def must_not_load(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the base was loaded")

    with monkeypatch.context() as patch:
        for name in ("TransformersEngine", "LlamaCppEngine", "StreamedModel"):
            patch.setattr(base_module, name, refuse)
        yield


# the store


@pytest.mark.parametrize("windows", [SHORT, SLIDING], ids=["llama.cpp", "sliding"])
def test_a_kept_transformers_base_gives_the_same_bits_and_is_not_loaded_again(
    llama3, noisy, tmp_path, monkeypatch, windows
):
    store = Store(tmp_path / "kept")
    engine = open_engine(noisy)
    live = score(engine, SideBySide(open_engine(llama3)), WORDS, windows)
    first = score(engine, LazyBase(str(llama3), store), WORDS, windows)
    with must_not_load(monkeypatch):
        again = score(engine, LazyBase(str(llama3), store), WORDS, windows)
        other = score(open_engine(llama3), LazyBase(str(llama3), store), WORDS, windows)
    assert first == live
    assert again == live
    assert other.divergence.max_kl == 0, "the base itself, artifact of the same store"
    (folder,) = store.directory.iterdir()
    facts = json.loads((folder / FACTS).read_text())
    assert facts["encoding"] == "hidden"
    assert (folder / BODY).stat().st_size == live.perplexity.tokens * 64 * 4, "hidden states only, not the vocabulary"


def test_a_kept_llama_cpp_base_gives_the_same_figures(llama3, noisy, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    store, file = Store(tmp_path / "kept"), gguf_models.gguf_of(llama3)
    engine = open_engine(gguf_models.gguf_of(noisy), context=64)
    live = score(engine, SideBySide(open_engine(file, context=64)), WORDS, SHORT)
    first = score(engine, LazyBase(str(file), store, context=64), WORDS, SHORT)
    with must_not_load(monkeypatch):
        again = score(engine, LazyBase(str(file), store, context=64), WORDS, SHORT)
    engine.close()
    assert first == live
    assert again.perplexity == live.perplexity
    for name in ("mean_kl", "median_kl", "p999_kl", "max_kl", "rms_delta_p", "base_perplexity"):
        assert getattr(again.divergence, name) == pytest.approx(getattr(live.divergence, name), rel=1e-4), name
    assert again.divergence.same_top == live.divergence.same_top


@pytest.mark.parametrize("change", ["weights", "config", "text", "window", "protocol", "limit"])
def test_whatever_the_predictions_depend_on_makes_another_entry(llama3, noisy, tmp_path, change):
    store = Store(tmp_path / "kept")
    model = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama3).save_pretrained(model)
    AutoTokenizer.from_pretrained(llama3).save_pretrained(model)
    engine, text, windows = open_engine(noisy), WORDS, SHORT
    score(engine, LazyBase(str(model), store), text, windows)
    if change == "weights":
        file = model / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif change == "config":
        edit_config(model, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    elif change == "text":
        text = Text("words", WORDS.text[1:])
    else:
        windows = {
            "window": Windows(PROTOCOLS["llama.cpp"], window=65, limit=3),
            "protocol": Windows(PROTOCOLS["paper"], window=64, limit=3),
            "limit": Windows(PROTOCOLS["llama.cpp"], window=64, limit=2),
        }[change]
    score(engine, LazyBase(str(model), store), text, windows)
    assert len(list(store.directory.iterdir())) == 2


def test_a_run_that_breaks_off_keeps_nothing(llama3, noisy, tmp_path):
    store = Store(tmp_path / "kept")
    base = LazyBase(str(llama3), store)
    engine = open_engine(noisy)
    with torch.no_grad():
        engine.head.module.weight[7] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        score(engine, base, WORDS, SHORT)
    assert list(store.directory.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from llmlite.evals.kept import Facts, Store
from llmlite.evals.perplexity import Window
import numpy as np, torch
windows = [Window(np.arange(5), 0, 0)]
with Store(Path(sys.argv[1])).writing("key", Facts("hidden", 4, "float32", 9, 9), windows) as writer:
    writer.hidden(torch.zeros(2, 4))
    writer._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_writes(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    windows = [Window(np.arange(5), 0, 0)]
    store, facts = Store(tmp_path), Facts("hidden", 4, "float32", 9, 9)
    assert [file.name for file in tmp_path.iterdir()] == [".key.partial"]
    assert store.find("key", windows, tmp_path) is None
    with store.writing("key", facts, windows) as writer:
        writer.hidden(torch.zeros(4, 4))
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
    (tmp_path / "key" / BODY).write_bytes(b"short")
    with pytest.raises(OutsideError, match="is not what was written there"):
        store.find("key", windows, tmp_path)


def test_a_disk_that_is_full_is_said_before_and_while_it_is_written(llama3, noisy, tmp_path, monkeypatch):
    store = Store(tmp_path / "kept")
    usage = SimpleNamespace(free=16 * 2**20)
    with monkeypatch.context() as patch:
        patch.setattr("llmlite.evals.kept.shutil.disk_usage", lambda _: usage)
        with pytest.raises(OutsideError, match=r"take 0 MiB and the disk has 16 MiB free; .* --cache, .* --no-cache"):
            score(open_engine(noisy), LazyBase(str(llama3), store), WORDS, SHORT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    engine, base = open_engine(noisy), LazyBase(str(llama3), store)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutsideError, match=r"can't be written \(File too large\); nothing of it was kept"):
            score(engine, base, WORDS, SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(store.directory.iterdir()) == []


def test_two_runs_at_a_time_on_one_base_both_end_well(llama3, noisy, tmp_path, capsys):
    store, engine = Store(tmp_path / "kept"), open_engine(noisy)
    base = LazyBase(str(llama3), store)
    with base.predictions(engine, WORDS, SHORT) as slow:
        for number in range(len(slow.windows)):
            list(slow.rows(number))
        second = score(engine, LazyBase(str(llama3), store), WORDS, SHORT)
    assert second.divergence.mean_kl > 0
    assert "are not kept: " in capsys.readouterr().err
    assert len(list(store.directory.iterdir())) == 1


def test_a_head_that_is_not_one_stored_matrix_is_kept_as_codes(llama3):
    engine = open_engine(llama3)
    assert facts_of(engine).encoding == "hidden"
    engine.head.module.bias = torch.nn.Parameter(torch.zeros(engine.vocab_size))
    assert facts_of(engine).encoding == "codes"


# streamed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows", [SHORT, SLIDING], ids=["llama.cpp", "sliding"])
def test_a_streamed_base_predicts_what_the_loaded_one_does(tmp_path, monkeypatch, capsys, family, windows):
    directory = save_tiny(tmp_path / "model", family)
    engine = open_engine(directory)
    needed = loaded_memory(find(directory), 64)
    monkeypatch.setattr(base_module, "free_memory", lambda: needed - 1)
    monkeypatch.setattr(base_module, "streaming_memory", lambda *_: 0)
    monkeypatch.setattr(base_module, "TransformersEngine", lambda *_, **__: pytest.fail("the base was loaded"))
    base = LazyBase(str(directory), None, context=64)
    with base.predictions(engine, CATS, windows) as theirs:
        for number, window in enumerate(theirs.windows):
            own = engine.log_probs(window.tokens[:-1], window.first)
            for (start, rows), (own_start, own_rows) in zip(theirs.rows(number), own, strict=True):
                assert start == own_start
                torch.testing.assert_close(rows, own_rows, rtol=1e-5, atol=1e-5)
    assert "MiB of memory are free: it is run layer by layer" in capsys.readouterr().err


def test_a_streamed_base_is_kept_and_computes_in_the_stored_dtype(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    engine, store = open_engine(directory), Store(tmp_path / "kept")
    loaded = score(engine, SideBySide(engine), CATS, SHORT)
    monkeypatch.setattr(base_module, "free_memory", lambda: 10**6)
    monkeypatch.setattr(base_module, "loaded_memory", lambda *_: 10**7)
    monkeypatch.setattr(base_module, "streaming_memory", lambda *_: 10**5)
    streamed = score(engine, LazyBase(str(directory), store), CATS, SHORT)
    assert streamed.divergence.base_perplexity == pytest.approx(loaded.perplexity.value, rel=1e-3)
    assert streamed.divergence.mean_kl < 1e-4
    (folder,) = store.directory.iterdir()
    assert json.loads((folder / FACTS).read_text())["dtype"] == "bfloat16"
    with must_not_load(monkeypatch):
        assert score(engine, LazyBase(str(directory), store), CATS, SHORT) == streamed


def test_a_base_that_fits_nowhere_is_refused(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model")
    engine = open_engine(directory)
    monkeypatch.setattr(base_module, "free_memory", lambda: 1000)
    with pytest.raises(OutsideError, match="of memory are free; layer by layer it needs"):
        score(engine, LazyBase(str(directory), None), CATS, SHORT)
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(OutsideError, match=r"it can't be run layer by layer \(.*already quantized"):
        score(engine, LazyBase(str(directory), None), CATS, SHORT)


def test_a_small_disk_is_refused_before_a_base_is_streamed(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model")
    engine = open_engine(directory)
    for name, value in (("free_memory", 0), ("streaming_memory", 0)):
        monkeypatch.setattr(base_module, name, lambda *_, value=value: value)
    monkeypatch.setattr("llmlite.evals.streamed.shutil.disk_usage", lambda _: SimpleNamespace(free=17 * 2**20))
    monkeypatch.setattr("llmlite.evals.kept.SPARE_BYTES", 0)
    monkeypatch.setattr("llmlite.evals.streamed.SPARE_BYTES", 17 * 2**20)
    with pytest.raises(OutsideError, match="streaming the base needs 0 MiB of scratch space"):
        score(engine, LazyBase(str(directory), None), CATS, SHORT)


# who is compared, and which tokens suffered


def test_another_tokenizer_or_vocabulary_of_the_base_is_refused(llama3, tmp_path):
    pytest.importorskip("llama_cpp")
    other = save_tiny(tmp_path / "other")
    with pytest.raises(InputError, match="in front of a text, the artifact's nothing"):
        score(open_engine(other), LazyBase(str(llama3), None), WORDS, SHORT)
    smaller = tmp_path / "smaller"
    model = AutoModelForCausalLM.from_pretrained(llama3)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(llama3)) - 1)
    model.save_pretrained(smaller)
    AutoTokenizer.from_pretrained(llama3).save_pretrained(smaller)
    for artifact, base in ((llama3, smaller), (smaller, llama3), (gguf_models.gguf_of(llama3), smaller)):
        with pytest.raises(InputError, match="not the model it was made from"):
            score(open_engine(artifact), LazyBase(str(base), None), WORDS, SHORT)


def test_padding_is_no_other_vocabulary_but_more_tokens_are():
    def model(vocab_size, known_tokens):
        return SimpleNamespace(vocab_size=vocab_size, known_tokens=known_tokens)

    assert common_vocabulary(model(300, 290), model(310, 290)) == 300
    assert common_vocabulary(model(310, 290), model(290, 290)) == 290
    for base, artifact in ((model(300, 300), model(310, 305)), (model(310, 305), model(300, 300))):
        with pytest.raises(InputError, match="not the model it was made from"):
            common_vocabulary(base, artifact)


def test_llama_cpp_tells_padding_from_tokens(llama3):
    pytest.importorskip("llama_cpp")
    engine, tokens = open_engine(gguf_models.gguf_of(llama3)), len(AutoTokenizer.from_pretrained(llama3))
    assert (engine.vocab_size, engine.known_tokens) == (tokens + 5, tokens)
    engine.close()


def test_the_tokens_that_suffered_most_are_told_with_their_text(llama3, noisy):
    engine = open_engine(noisy)
    found = score(engine, SideBySide(open_engine(llama3)), WORDS, SLIDING).divergence
    ids = np.array(AutoTokenizer.from_pretrained(llama3)(WORDS.text).input_ids)
    kls = [token.kl for token in found.worst]
    assert len(kls) == 20
    assert kls == sorted(kls, reverse=True)
    assert kls[0] == found.max_kl
    worst = found.worst[0]
    assert worst.text == engine.decode(ids[worst.index : worst.index + 1])
    window = next(w for w in SLIDING.cut(engine, WORDS) if w.start + w.first < worst.index < w.start + len(w.tokens))
    start = window.start
    logs = {
        name: torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(model)(torch.tensor(ids[None, start : worst.index])).logits[0, -1], -1
        ).detach()
        for name, model in (("artifact", noisy), ("base", llama3))
    }
    target = int(ids[worst.index])
    assert worst.probability == pytest.approx(math.exp(logs["artifact"][target]), rel=1e-3)
    assert worst.base_probability == pytest.approx(math.exp(logs["base"][target]), rel=1e-3)
    assert worst.top == engine.decode(logs["artifact"].argmax()[None].numpy())
    assert worst.base_top_probability == pytest.approx(math.exp(logs["base"].max()), rel=1e-3)
    assert worst.before == engine.decode(ids[max(start, worst.index - 12) : worst.index])
    assert worst.after == engine.decode(ids[worst.index + 1 : min(worst.index + 5, start + len(window.tokens))])


@pytest.mark.parametrize("kind", ["transformers", "llama.cpp"])
def test_token_ids_become_readable_text(llama3, kind):
    engine = open_engine(llama3 if kind == "transformers" else gguf_models.gguf_of(llama3))
    text = "it's 10:45, <b> 语言模型 🚀"
    ids = engine.tokenize(text)
    assert engine.decode(ids) == text
    assert engine.decode(np.array([engine.bos])) == "<|im_start|>"
    assert "\ufffd" in engine.decode(engine.tokenize("🚀")[:1]), "a byte that is no whole character"
    assert engine.decode(ids[:0]) == ""
    engine.close()


def test_the_digest_covers_what_decides_the_predictions(tmp_path):
    directory = save_tiny(tmp_path / "model")
    before = digest_of(find(directory))
    (directory / "README.md").write_text("words")
    assert digest_of(find(directory)) == before
    edit_config(directory, rope_theta=1234.0)
    changed = digest_of(find(directory))
    assert changed != before
    (directory / "tokenizer_config.json").write_text("{}")
    assert digest_of(find(directory)) != changed
