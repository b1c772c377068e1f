"""An artifact judged as a whole: size, memory, speed, the JSON that scripts read, and the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmlite.checkpoint.artifact import read_manifest, write_manifest
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.errors import InputError, OutsideError
from llmlite.evals.evaluate import EvalSettings, Evaluation, evaluate, save_in_manifest
from llmlite.evals.hf import kv_bytes_per_token, load_transformers
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.evals.locate import find
from llmlite.evals.probe import probe
from llmlite.evals.score import Score
from llmlite.evals.size import measure_size
from llmlite.evals.speed import Speed
from llmlite.evals.table import check_picture, picture, table
from tests import gguf_models
from tests.tiny import edit_config, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    directory = gguf_models.save_tiny("llama", tmp_path_factory.mktemp("tied"))
    return gguf_models.gguf_of(directory, "f16")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "cats.v1.txt"
    file.write_text("the cat sat on the mat and the dog ran to the house. " * 200)
    return str(file)


@pytest.fixture(scope="module")
def evaluation(tiny, text) -> Evaluation:
    return evaluate(tiny, EvalSettings(base=str(tiny), text=(text,), windows=2, window=64))


def test_size_counts_every_tensor_and_each_parameter_once(tiny, gguf):
    tensors = load_file(tiny / "model.safetensors")
    size = measure_size(find(tiny))
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size.bits_per_weight == 32
    assert size.bytes == (tiny / "model.safetensors").stat().st_size

    tied = load_file(gguf.parent / "model.safetensors")
    assert "lm_head.weight" not in tied, "the test needs a model whose head is its embedding"
    parameters = sum(tensor.numel() for tensor in tied.values())
    norms = sum(tensor.numel() for tensor in tied.values() if tensor.ndim == 1)
    assert measure_size(find(gguf.parent)).parameters == parameters
    size = measure_size(find(gguf))
    assert size.parameters == parameters
    assert size.bits_per_weight == pytest.approx((16 * parameters + 16 * norms) / parameters)
    assert size.bytes == gguf.stat().st_size > size.tensor_bytes


def test_size_counts_only_the_files_that_the_index_names(tmp_path):
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "adapter.safetensors").write_bytes((tmp_path / "model-00001-of-00001.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert measure_size(find(tmp_path)).bytes == (tmp_path / "model-00001-of-00001.safetensors").stat().st_size


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"num_attention_heads": 5},
        {"pad_token_id": 320},
        {"attn_implementation": "flash_attention_2"},
        {"quantization_config": "int8"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused(tmp_path, changes):
    save_tiny(tmp_path)
    edit_config(tmp_path, **changes)
    for use in (lambda: measure_size(find(tmp_path)), lambda: load_transformers(tmp_path)):
        with pytest.raises(InputError, match=tmp_path.name):
            use()


def test_constants_in_a_gguf_file_are_no_parameters(tmp_path):
    pytest.importorskip("llama_cpp")
    file = gguf_models.gguf_of(gguf_models.save_tiny("llama3", tmp_path))
    assert "rope_freqs.weight" in read_gguf(file).tensors, "the test needs a file with constants"
    assert measure_size(find(file)).parameters == measure_size(find(tmp_path)).parameters


def test_kv_bytes_are_what_the_caches_take(tiny, gguf):
    model, _ = load_transformers(tiny)
    cache = model(input_ids=torch.arange(40, device=model.device)[None]).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model) * 40 == stored

    llama = Llama(gguf, LlamaSettings(context=512))
    ids = np.arange(100)
    llama.decode(ids, 0, np.zeros(100, np.int8))
    per_token = llama.api.llama_state_seq_get_size(llama.context, 0) / 100
    assert llama.kv_bytes_per_token() == 2 * 3 * 2 * (16 + 16)  # float16, layers, heads, key and value
    assert per_token == pytest.approx(llama.kv_bytes_per_token(), rel=0.2), (
        "a saved state has the cells' positions, too"
    )
    llama.close()


def test_what_stops_the_measuring_process_is_told(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nonsense" * 10)
    with pytest.raises(InputError, match="does not begin with GGUF"):
        probe(tmp_path / "a.gguf")


def test_json_has_the_keys_that_scripts_rely_on(evaluation, tiny):
    facts = json.loads(json.dumps(evaluation.to_json()))
    assert facts["engine"].keys() == {"name", "version"}
    assert facts["engine"]["name"] == "transformers"
    assert facts["bytes"] == (tiny / "model.safetensors").stat().st_size
    assert facts["bits_per_weight"] == 32
    assert facts["protocol"] == {"name": "llama.cpp", "window": 64, "windows": 2}
    assert len(facts["sha256"]) == len(facts["base_sha256"]) == 64
    assert facts["base"] == str(tiny)
    ((name, of_text),) = facts["texts"].items()
    assert name == "cats_v1"
    assert len(of_text["sha256"]) == 64
    assert of_text["perplexity"].keys() == {"value", "stderr", "tokens", "windows", "by_position", "by_window"}
    assert of_text["perplexity"]["tokens"] == 2 * 31
    apart = of_text["divergence"]
    assert {"mean_kl", "stderr", "median_kl", "p95_kl", "p99_kl", "p999_kl", "max_kl", "same_top"} <= apart.keys()
    assert {"mean_delta_p", "rms_delta_p", "base_perplexity", "by_position", "by_window", "worst"} <= apart.keys()
    assert apart["by_position"][0].keys() == {"start", "stop", "tokens", "value"}
    assert len(apart["worst"]) == 20
    assert Score.from_json(of_text) == evaluation.scores[name], "JSON gives back what it was made from"
    assert "memory" not in facts, "not asked for"
    assert "speed" not in facts, "not asked for"


def test_memory_and_speed_have_the_keys_that_scripts_rely_on(gguf):
    facts = evaluate(gguf, EvalSettings(memory=True, speed=True, contexts=(8,), threads=1)).to_json()
    assert {"weights", "kv_per_token", "peak"} <= facts["memory"].keys()
    assert {"prompt_tps", "generate_tps", "first_token_s"} <= facts["speed"].keys()
    assert "texts" not in facts


def test_figures_are_kept_in_the_manifest(evaluation, tmp_path, tiny):
    assert not save_in_manifest(tiny, evaluation), "a checkpoint without llmlite.json stays as it is"
    assert not (tiny / "llmlite.json").exists()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    write_manifest(tmp_path, {"kind": "artifact", "evals": {"paper": {"kept": True}}})
    assert save_in_manifest(tmp_path, evaluation)
    manifest = read_manifest(tmp_path)
    assert manifest["kind"] == "artifact"
    assert manifest["evals"] == {"paper": {"kept": True}, "llama.cpp": evaluation.to_json()}

    speed = Speed(prompt_tps=10.0, generate_tps=2.0, first_token_s=51.2)
    save_in_manifest(tmp_path, replace(evaluation, scores={}, base=None, speed=speed))
    later = read_manifest(tmp_path)["evals"]["llama.cpp"]
    assert later == {**evaluation.to_json(), "speed": speed.to_json()}, "speed alone leaves the scores as they are"
    save_in_manifest(tmp_path, replace(evaluation, base=None))
    later = read_manifest(tmp_path)["evals"]["llama.cpp"]
    assert "base" not in later, "new scores without a base do not keep the old base"
    assert later["speed"] == speed.to_json()


def test_another_gguf_beside_a_manifest_is_not_written_down(evaluation, gguf, tmp_path):
    (tmp_path / "other.gguf").write_bytes(gguf.read_bytes())
    write_manifest(tmp_path, {"kind": "artifact", "evals": {}})
    assert not save_in_manifest(tmp_path / "other.gguf", evaluation)
    (tmp_path / "other.gguf").rename(tmp_path / "model.gguf")
    assert save_in_manifest(tmp_path / "model.gguf", evaluation)


def test_table_and_picture_show_what_was_measured(evaluation, tmp_path):
    columns = [str(column.header) for column in table([evaluation]).columns]
    assert "perplexity" in columns
    assert "peak\nMB" not in columns, "nobody measured it"
    picture([evaluation, evaluation], tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, sentence in (
        ("a.foo", "a picture ends in .*png"),
        ("a", "a picture ends in .*png"),
        ("none/a.png", "there is no directory"),
        ("folder.png", "is a directory"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_picture(tmp_path / name)
    check_picture(tmp_path / "a.PNG")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"protocol": "rolling"}, "'rolling' is unknown; known are llama.cpp, paper, sliding"),
        ({"stride": 4}, "a stride belongs to protocol sliding, not to llama.cpp"),
        ({"stride": 1024, "protocol": "sliding"}, "stride is 1024; less than the window's 1024 tokens is right"),
        ({"no_cache": True, "cache": "x"}, "--cache and --no-cache together"),
        ({"base": "somewhere"}, "a base without a text"),
        ({"windows": 0}, "windows is 0; 1 or more is right"),
        ({"window": 1}, "window is 1; 8 or more is right"),
        ({"contexts": (512, 0)}, "contexts is 0; 1 or more is right"),
        ({"contexts": ()}, "one length of a prompt or more is right"),
        ({"budget": "8 gigs"}, "'8 gigs' is not a size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluate(tiny, EvalSettings(**settings))


def test_what_is_no_artifact_is_refused(tmp_path, tiny):
    for path, sentence in (
        (tmp_path / "none.gguf", "there is no such file"),
        (tmp_path, "neither config.json with safetensors files nor a GGUF file"),
        (tiny / "config.json", "is not a .gguf file"),
        (tmp_path / "none", "no such directory"),
    ):
        with pytest.raises(InputError, match=sentence):
            find(path)
    partial = tmp_path / ".smol.partial"
    partial.mkdir()
    (partial / "model.gguf").touch()
    for path in (partial, partial / "model.gguf"):
        with pytest.raises(InputError, match=r"smol.partial: was left by a run that did not finish"):
            find(path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="has 2 GGUF files"):
        find(tmp_path)


def test_llama_cpp_says_why_in_one_sentence_and_nothing_on_the_terminal(gguf, tmp_path, capfd):
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"cut.gguf: llama.cpp can't load it \(.*not within the file bounds"):
        Llama(broken, LlamaSettings())
    llama = Llama(gguf, LlamaSettings(context=256))
    llama.decode(np.arange(200), 0, np.zeros(200))
    with pytest.raises(InputError, match="position 300 is beyond the context"):
        llama.decode(np.arange(100), 200, np.zeros(100))
    with pytest.raises(OutsideError, match=r"failed while it computed .*inconsistent sequence positions"):
        llama.decode(np.arange(10), 90, np.zeros(10))
    llama.close()
    assert capfd.readouterr() == ("", "")
