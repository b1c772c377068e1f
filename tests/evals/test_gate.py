"""The gate: planted faults turn it red, rules are read strictly, and what was not measured has not passed."""

import copy
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.evals.digests import digest_of
from llmlite.evals.engines import engine_version
from llmlite.evals.evaluate import EvalSettings
from llmlite.evals.figures import check_address, expand, lookup
from llmlite.evals.gate import judge
from llmlite.evals.locate import find
from llmlite.evals.obtain import measured
from llmlite.evals.ruleset import parse_rules, read_rules
from llmlite.evals.structure import ASPECTS, compare_structure
from tests import gguf_models
from tests.tiny import edit_config

WINDOWS = ("--window", "64", "--windows", "12", "--threads", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose tokenizer puts a token in front of every text."""
    return gguf_models.save_tiny("llama3", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("".join(gguf_models.TEXTS) * 40)
    return str(file)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """The ready rules for 4 bits, without the one on size: the tiny models hold float32."""
    content = Path(__file__).parents[2] / "evals/rules/4bit.yaml"
    lines = content.read_text().split("\n  - ")
    file = tmp_path_factory.mktemp("rules") / "gate.yaml"
    file.write_text("\n  - ".join(part for part in lines if "bits_per_weight" not in part))
    return str(file)


def copy_of(base, out):
    shutil.copytree(base, out)
    return out


def gate(artifact, base, text, rules, *more):
    return main(["gate", str(artifact), "--rules", rules, "--base", str(base), "--text", text, *WINDOWS, *more])


def failures(file):
    return [check["figure"] for check in json.loads(file.read_text())["checks"] if not check["passed"]]


def shuffle_a_layer(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.manual_seed(0)
    flat = tensors[name].flatten()
    tensors[name] = flat[torch.randperm(len(flat))].reshape(tensors[name].shape)
    save_file(tensors, file, metadata={"format": "pt"})


def wrong_rope_base(directory):
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    edit_config(directory, rope_parameters={**rope, "rope_theta": 10000.0})


def missing_bos(directory):
    file = directory / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["post_processor"] = None
    file.write_text(json.dumps(spec))


def swapped_template(directory):
    file = directory / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "</s>"))


FAULTS = {
    "a layer's weights shuffled": (
        shuffle_a_layer,
        {"texts.words.divergence.mean_kl", "texts.words.divergence.same_top"},
    ),
    "a wrong RoPE base": (wrong_rope_base, {"structure.rope.equal"}),
    "a missing BOS": (missing_bos, {"structure.prefix_token.equal", "texts.*.divergence.mean_kl"}),
    "a chat template swapped": (swapped_template, {"structure.chat_template.equal"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_the_gate_red(fault, base, text, rules, tmp_path):
    plant, seen = FAULTS[fault]
    artifact = copy_of(base, tmp_path / "artifact")
    plant(artifact)
    assert gate(artifact, base, text, rules, "--json", str(tmp_path / "verdict.json")) == 1
    assert seen <= set(failures(tmp_path / "verdict.json"))


def test_a_good_artifact_passes(base, text, rules, tmp_path, capsys):
    artifact = gguf_models.gguf_of(copy_of(base, tmp_path / "artifact"), "f16")
    assert gate(artifact, base, text, rules, "--json", str(tmp_path / "verdict.json")) == 0
    assert failures(tmp_path / "verdict.json") == []
    assert "gate passed: 10 checks" in capsys.readouterr().out


def retrieval(match, logprob, against=(0.96, -0.4)):
    """The long-context part of an evaluation, with its changes against the base."""
    figures = {
        "match": {"value": match, "change": {"value": match - against[0], "p": 0.001}},
        "logprob": {"value": logprob, "change": {"value": logprob - against[1], "p": 0.001}},
    }
    return {"all": {"questions": 40, **figures}, "tasks": {"uuid": {"8192": {"questions": 40, **figures}}}}


@pytest.mark.parametrize(
    ("found", "status", "failed"),
    [
        ((0.95, -0.42), 0, []),
        ((0.31, -4.8), 1, ["long_context.all.match.change.value", "long_context.all.logprob.change.value"]),
        ((0.96, -0.9), 1, ["long_context.all.logprob.change.value"]),  # every needle found, with less certainty
    ],
)
def test_what_a_kv_type_costs_is_judged_by_matches_and_by_log_probabilities(tmp_path, found, status, failed):
    file, out = tmp_path / "facts.json", tmp_path / "verdict.json"
    facts = {"artifact": "a", "engine": {"name": "llama.cpp"}, "texts": {"wiki": {"divergence": {"mean_kl": 0.001}}}}
    file.write_text(json.dumps({**facts, "long_context": retrieval(*found)}))
    assert main(["gate", "a", "--rules", "kv", "--measured", str(file), "--json", str(out)]) == status
    assert failures(out) == failed
    file.write_text(json.dumps(facts))
    assert main(["gate", "a", "--rules", "kv", "--measured", str(file)]) == 1, "not measured is not passed"


@pytest.mark.parametrize("family", gguf_models.CONFIGS)
def test_a_gguf_file_has_the_structure_of_the_checkpoint_it_was_written_from(family, tmp_path):
    directory = gguf_models.save_tiny(family, tmp_path)
    found = compare_structure(find(directory), find(gguf_models.gguf_of(directory)))
    assert found.unknown == {}
    assert {name: found.aspects[name].detail for name in ASPECTS} == dict.fromkeys(ASPECTS, "")


def test_what_cannot_be_compared_is_unknown_and_not_equal(base, tmp_path):
    artifact = copy_of(base, tmp_path / "artifact")
    edit_config(artifact, model_type="mamba9")
    found = compare_structure(find(base), find(artifact))
    assert set(found.aspects) == {"tokenizer", "prefix_token", "chat_template"}
    assert "mamba9" in found.unknown["rope"]
    verdict = judge(read_rules(("4bit",)), {"structure": found.to_json()})
    failed = {check.figure for check in verdict.checks if not check.passed and check.figure.startswith("structure.")}
    assert failed == {"structure.rope.equal", "structure.settings.equal", "structure.shape.equal"}


def test_faults_in_a_gguf_header_are_seen(base, tmp_path):
    file = gguf_models.gguf_of(copy_of(base, tmp_path / "artifact"), "f16")
    raw = file.read_bytes()

    def planted(key, old, new):
        at = raw.index(key.encode()) + len(key) + 4  # its value follows a type of 4 bytes
        assert raw[at : at + len(old)] == old
        file.write_bytes(raw[:at] + new + raw[at + len(old) :])
        found = compare_structure(find(base), find(file))
        return {name for name, aspect in found.aspects.items() if not aspect.equal}

    theta = read_gguf(file).metadata["llama.rope.freq_base"]
    assert planted("tokenizer.ggml.add_bos_token", b"\x01", b"\x00") == {"prefix_token"}
    assert planted("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", 1e-6), struct.pack("<f", 1e-3)) == {
        "settings"
    }
    changed = planted("llama.context_length", struct.pack("<I", 512), struct.pack("<I", 256))
    assert changed == {"settings"}
    assert theta == 500000.0


def test_a_config_says_its_rope_in_more_ways_than_one(base, tmp_path):
    artifact = copy_of(base, tmp_path / "artifact")
    rope = json.loads((artifact / "config.json").read_text())["rope_parameters"]
    edit_config(artifact, rope_theta=rope["rope_theta"])
    assert compare_structure(find(base), find(artifact)).aspects["rope"].equal
    wrong_rope_base(artifact)
    aspect = compare_structure(find(base), find(artifact)).aspects["rope"]
    assert not aspect.equal and "10000" in aspect.detail


FACTS = {
    "artifact": "out/<a>|b", "engine": {"name": "transformers", "version": "5"}, "bytes": 1000,
    "texts": {
        "one": {"perplexity": {"value": 10.5}, "divergence": {"mean_kl": 0.05, "same_top": 0.9, "base_perplexity": 10.0}},
        "two": {"perplexity": {"value": 30.0}},
    },
    "memory": {"peak": 7 * 2**30, "contexts": [{"context": 512, "peak": 5}, {"context": 8192, "peak": 9}]},
    "structure": {"rope": {"equal": False, "detail": "x"}},
}  # fmt: skip


def verdict(rules, facts=FACTS, base=None):
    return judge(parse_rules({"rules": rules}, "test"), facts, base)


def test_figures_are_found_by_address():
    assert lookup(FACTS, "texts.one.divergence.mean_kl") == {"texts.one.divergence.mean_kl": 0.05}
    assert lookup(FACTS, "texts.*.perplexity.value") == {
        "texts.one.perplexity.value": 10.5,
        "texts.two.perplexity.value": 30.0,
    }
    assert lookup(FACTS, "memory.contexts.*.peak") == {"memory.contexts.0.peak": 5, "memory.contexts.1.peak": 9}
    assert lookup(FACTS, "structure.rope.detail") == {}, "text is no figure"
    assert lookup({"tasks": {"a.b": {"acc,none": 0.5}}}, "tasks.a.b.acc,none") == {"tasks.a.b.acc,none": 0.5}
    assert expand(FACTS, "texts.*.divergence.mean_kl") == {
        "texts.one.divergence.mean_kl": 0.05,
        "texts.two.divergence.mean_kl": None,
    }
    assert expand({}, "texts.*.divergence.mean_kl") == {"texts.*.divergence.mean_kl": None}


def test_bounds():
    kl = {"figure": "texts.one.divergence.mean_kl"}
    for bound, passed in (
        ({"at_most": 0.05}, True), ({"at_most": 0.049}, False), ({"at_least": 0.05}, True), ({"at_least": 0.06}, False),
        ({"at_least": 0.01, "at_most": 0.04}, False), ({"equals": 0.05}, True), ({"equals": 0.04}, False),
    ):  # fmt: skip
        assert verdict([{**kl, **bound}]).passed is passed, bound
    assert verdict([{"figure": "memory.peak", "at_most": "7 GiB"}]).passed
    assert not verdict([{"figure": "memory.peak", "at_most": "7 GB"}]).passed
    assert not verdict([{"figure": "structure.rope.equal", "equals": True}]).passed
    broken = copy.deepcopy(FACTS)
    broken["texts"]["one"]["divergence"]["mean_kl"] = float("nan")
    assert not verdict([{**kl, "at_most": 1}], broken).passed, "nan is within no bound"


def test_bounds_against_the_base():
    rule = {"figure": "texts.one.perplexity.value", "at_most_times_base": 1.05}
    assert verdict([rule]).passed, "10.5 of 10"
    assert not verdict([{**rule, "at_most_times_base": 1.04}]).passed
    size = {"figure": "bytes", "at_most_times_base": 0.5}
    assert not verdict([size]).passed, "the base's own was not measured"
    assert "base's own figure was not measured" in verdict([size]).checks[0].reason
    assert verdict([size], base={"bytes": 2000}).passed
    assert not verdict([size], base={"bytes": 1999}).passed


def test_a_missing_figure_fails():
    found = verdict([{"figure": "texts.*.divergence.mean_kl", "at_most": 1}])
    assert [(check.figure, check.passed, check.reason) for check in found.checks] == [
        ("texts.one.divergence.mean_kl", True, ""), ("texts.two.divergence.mean_kl", False, "not measured"),
    ]  # fmt: skip
    assert not verdict([{"figure": "tasks.hellaswag.acc", "at_least": 0}]).passed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"rules": [{"figure": "bytes", "at_mots": 1}]},
            r"test, rule 1: unknown key 'at_mots'; did you mean at_most\?",
        ),
        ({"rules": [{"figure": "bytes"}]}, "bytes has no bound; one of at_most"),
        ({"rules": [{"at_most": 1}]}, "figure is None; an address"),
        ({"rules": [{"figure": "bytes", "at_most": "much"}]}, "at_most is 'much'; a number is right"),
        ({"rules": [{"figure": "bytes", "at_most": True}]}, "at_most is True; a number is right"),
        ({"rules": [{"figure": "bytes", "at_most": float("inf")}]}, "a number is right"),
        ({"rules": [{"figure": "bytes", "at_most": 1}], "mesure": {}}, r"unknown key 'mesure'; did you mean measure\?"),
        ({"rules": []}, "a list of rules is right"),
        ([], "a list of rules is right"),
    ],
)
def test_rules_that_are_none_are_refused(content, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_rules(content, "test")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("texts.english.divergence.mean_k", r"unknown; did you mean mean_kl\?"),
        ("text.english.divergence.mean_kl", r"unknown; did you mean texts\?"),
        ("texts.*.divergence", "is a group: name one of mean_kl"),
        ("bytes.x", "bytes is a figure, nothing is below"),
        ("structure.rop.equal", r"did you mean rope\?"),
    ],
)
def test_unknown_addresses_are_refused_with_the_nearest(address, sentence):
    with pytest.raises(InputError, match=sentence):
        check_address(address, None, "test")
    check_address("tasks.any.acc_norm", None, "test")
    check_address("new.figure", {"new": {"figure": 1}}, "test")


@pytest.mark.parametrize("name", ["4bit", "8bit", "8gb", "kv"])
def test_the_ready_rules_are_rules(name):
    rules = read_rules((name,))
    for rule in rules.rules:
        check_address(rule.figure, None, name)
    with pytest.raises(InputError, match=f"did you mean {name}"):
        read_rules((f"{name}x",))


def test_bad_rules_are_status_2(base, tmp_path, capsys):
    (tmp_path / "gate.yaml").write_text("rules:\n  - {figure: bytes, at_mots: 1}\n")
    assert main(["gate", str(base), "--rules", str(tmp_path / "gate.yaml")]) == 2
    assert main(["gate", str(base)]) == 2
    assert "no rules" in capsys.readouterr().err


def test_the_verdict_for_programs(tmp_path, monkeypatch):
    facts, rules = tmp_path / "facts.json", tmp_path / "gate.yaml"
    facts.write_text(json.dumps({**FACTS, "artifact": "a\x00<b>|@c"}))
    rules.write_text(
        "rules:\n  - {figure: bytes, at_most: 999, because: '<b> | *x*'}\n  - {figure: memory.peak, at_most: 8 GiB}\n"
    )
    junit, summary, steps = (tmp_path / name for name in ("junit.xml", "summary.md", "steps.md"))
    steps.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(steps))
    words = [
        "gate",
        "a",
        "--rules",
        str(rules),
        "--measured",
        str(facts),
        "--junit",
        str(junit),
        "--summary",
        str(summary),
    ]
    assert main(words) == 1
    assert steps.read_text() == "before\n", "an environment variable alone changes nothing"
    assert main([*words, "--github-summary"]) == 1
    assert steps.read_text() == "before\n" + summary.read_text()
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.find("failure") is None for case in suite.findall("testcase")] == [False, True]
    assert "<b>" not in summary.read_text(), "nothing of a file is markup"
    assert r"\*x\*" in summary.read_text() and r"\|" in summary.read_text()
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert main([*words, "--github-summary"]) == 2


def test_figures_of_other_weights_are_not_trusted(base, text, rules, tmp_path):
    artifact = copy_of(base, tmp_path / "artifact")
    (artifact / "llmlite.json").write_text("{}")
    assert gate(artifact, base, text, rules) == 0
    kept = (artifact / "llmlite.json").read_text()
    without_text = ["gate", str(artifact), "--rules", rules, "--base", str(base)]
    assert main(without_text) == 0, "what was kept is enough"
    shuffle_a_layer(artifact)
    assert (artifact / "llmlite.json").read_text() == kept
    assert main(without_text) == 1
    assert gate(artifact, base, text, rules) == 1


def test_kept_memory_counts_for_the_weights_it_was_measured_of(base, tmp_path):
    artifact = copy_of(base, tmp_path / "artifact")
    asked = EvalSettings(memory=True, contexts=(1,))
    own = {
        "sha256": digest_of(find(artifact)),
        "engine": {"version": engine_version("transformers")},
        "memory": {"peak": 5, "contexts": [{"context": at} for at in asked.contexts]},
    }
    (artifact / "llmlite.json").write_text(json.dumps({"evals": {"llama.cpp": own}}))
    assert measured(str(artifact), asked)["memory"]["peak"] == 5, "nothing is measured"
    assert measured(str(artifact), replace(asked, again=True))["memory"]["peak"] > 10**6
    (artifact / "llmlite.json").write_text(json.dumps({"evals": {"llama.cpp": {**own, "sha256": "0" * 64}}}))
    assert measured(str(artifact), asked)["memory"]["peak"] > 10**6
