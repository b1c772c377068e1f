"""Artifacts side by side: intervals that cover the truth, unlike input refused, and the verb from end to end."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.evals.bootstrap import Resampling, paired
from llmlite.evals.compare import CompareSettings, compare, compared, short_names, text_series, window_tokens
from llmlite.evals.compare_table import side_by_side
from llmlite.evals.items import task_items
from tests import gguf_models
from tests.tiny import save_tiny


def sums(generator, blocks, mean, spread=1.0):
    return generator.normal(mean, spread, blocks)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 data sets whose true difference is 0.3: a 95% interval misses about 20 of them."""
    how, covered, narrower = Resampling(resamples=1000), 0, 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        common = sums(generator, 40, 0, 5)  # what makes a window hard for both
        first, second = common + sums(generator, 40, 3.0), common + sums(generator, 40, 0.0)
        found = paired(first, second, np.full(40, 10), how)
        covered += found.low <= 0.3 <= found.high
        narrower += found.high - found.low < 0.2
        assert found.difference == pytest.approx((first - second).sum() / 400)
    assert 0.90 <= covered / 400 <= 0.98
    assert narrower == 400, "unpaired, the windows' own spread of 5 would make it wider than 0.4"


def test_resampling_is_seeded_and_does_not_depend_on_how_it_is_cut_up(monkeypatch):
    generator = np.random.default_rng(0)
    first, second, counts = sums(generator, 30, 1), sums(generator, 30, 0), generator.integers(5, 50, 30)
    found = paired(first, second, counts, Resampling(2000, seed=3))
    assert found == paired(first, second, counts, Resampling(2000, seed=3))
    assert found != paired(first, second, counts, Resampling(2000, seed=4))
    monkeypatch.setattr("llmlite.evals.bootstrap.RESAMPLES_AT_ONCE", 30 * 70)
    assert paired(first, second, counts, Resampling(2000, seed=3)) == found


def test_windows_count_by_their_tokens():
    found = paired(np.array([10.0, 1.0] * 10), np.zeros(20), np.array([10, 100] * 10), Resampling(1000))
    assert found.difference == pytest.approx(11 / 110)


def test_many_comparisons_need_wider_intervals():
    generator = np.random.default_rng(1)
    first, second, counts = sums(generator, 30, 0.7), sums(generator, 30, 0), np.ones(30)
    alone = paired(first, second, counts, Resampling())
    many = paired(first, second, counts, Resampling(comparisons=50))
    assert (alone.family_low, alone.family_high) == (alone.low, alone.high)
    assert many.family_low < many.low == alone.low and many.family_high > many.high
    assert alone.real is True and many.real is False, "a difference that one look calls real and fifty do not"
    assert paired(first[:9], second[:9], counts[:9], Resampling()).real is None, "nine blocks can't tell"


def facts(nll, kl, name="a", **more):
    windows = len(nll)
    return {
        "artifact": name, "engine": {"name": "x"}, "protocol": {"name": "llama.cpp", "window": 64}, "base_sha256": "b",
        "texts": {"t": {
            "sha256": "s",
            "perplexity": {"value": math.exp(np.mean(nll)), "tokens": 31 * windows, "windows": windows, "by_window": list(nll)},
            "divergence": {"mean_kl": float(np.mean(kl)), "by_window": list(kl)},
        }},
    } | more  # fmt: skip


def test_real_differences_are_told_from_chance():
    generator = np.random.default_rng(2)
    hard = generator.normal(3, 0.5, 24)
    good = facts(hard, generator.gamma(20, 0.001, 24))
    twin = facts(hard + generator.normal(0, 0.02, 24), generator.gamma(20, 0.001, 24))
    worse = facts(hard + 0.1 + generator.normal(0, 0.02, 24), generator.gamma(20, 0.005, 24))
    found = compared({"good": good, "twin": twin, "worse": worse}, Resampling())
    calls = {(d.figure, d.first, d.second): d.interval.real for d in found.differences}
    assert len(calls) == 6
    for figure in ("texts.t.nll", "texts.t.kl"):
        assert calls[figure, "good", "twin"] is False
        assert calls[figure, "good", "worse"] is True and calls[figure, "twin", "worse"] is True
    assert any("6 comparisons" in note and "Bonferroni" in note for note in found.notes)


def test_what_was_not_measured_alike_is_refused():
    a, b = facts(np.ones(24), np.ones(24)), facts(np.ones(24), np.ones(24))
    b["texts"]["t"]["sha256"] = "other"
    with pytest.raises(InputError, match=r"texts.t.nll: a and b were not measured on the same windows"):
        compared({"a": a, "b": b}, Resampling())
    with pytest.raises(InputError, match="were not measured on the same"):
        compared({"a": a, "b": facts(np.ones(23), np.ones(23))}, Resampling())
    with pytest.raises(InputError, match="no figure was measured of two artifacts"):
        compared({"a": {}, "b": {}}, Resampling())
    with pytest.raises(InputError, match="one artifact alone"):
        compare(["a"], CompareSettings())
    with pytest.raises(InputError, match="1000 or more is right"):
        compare(["a", "b"], CompareSettings(resamples=10))


def test_windows_of_a_stride_have_unequal_numbers_of_tokens():
    protocol = {"name": "sliding", "window": 100, "stride": 40}
    assert window_tokens(4, 99 + 40 + 40 + 11, protocol).tolist() == [99, 40, 40, 11]
    assert window_tokens(3, 93, {"name": "paper", "window": 32}).tolist() == [31, 31, 31]
    assert text_series({"texts": {"t": {"perplexity": {"value": 3.0}}}}) == {}


def test_items_of_tasks_and_of_long_contexts_are_series():
    found = task_items(
        {
            "tasks": {"hella": {"questions": 3, "acc": {"value": 0.67, "items": [True, False, 1]}, "bleu": {"value": 3.0}}},
            "long_context": {"seed": 1, "items": [
                {"task": "uuid", "length": 64, "sample": n, "match": n % 2, "logprob": -2.0 * n, "tokens": 2} for n in range(4)
            ]},
        }
    )  # fmt: skip
    assert found["tasks.hella.acc"].sums.tolist() == [1, 0, 1]
    assert found["long_context.uuid.logprob"].sums.tolist() == [0, -1, -2, -3]
    assert found["long_context.all.match"].sums.tolist() == [0, 1, 0, 1]
    assert set(found) == {
        "tasks.hella.acc",
        *(f"long_context.{t}.{m}" for t in ("all", "uuid") for m in ("match", "logprob")),
    }


def test_values_of_tasks_and_of_long_contexts_stand_side_by_side():
    figures = {"questions": 4, "match": {"value": 0.75}, "logprob": {"value": -0.5}}
    first = {
        "tasks": {"hella": {"questions": 3, "chat": False, "acc": {"value": 0.67, "items": [True, False, 1]}}},
        "long_context": {"seed": 1, "all": figures, "tasks": {"uuid": {"64": figures}}},
    }
    assert side_by_side({"a": first, "b": {}}) == [
        ("tasks.hella.acc.value", [0.67, None]),
        ("long_context.all.match.value", [0.75, None]),
        ("long_context.all.logprob.value", [-0.5, None]),
        ("long_context.tasks.uuid.64.match.value", [0.75, None]),
        ("long_context.tasks.uuid.64.logprob.value", [-0.5, None]),
    ]


def test_names_are_short_and_told_apart():
    assert short_names(["out/a", "b"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert short_names(["a", "a"]) == ["1: a", "2: a"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, the same with a little noise and with more, and a text."""
    root = tmp_path_factory.mktemp("models")
    base = gguf_models.save_tiny("llama3", root / "base")
    for name, scale in (("little", 0.01), ("much", 0.1)):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * scale)
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(root / name)
    (root / "words.txt").write_text("".join(gguf_models.TEXTS) * 40)
    return root


def test_compare_by_the_command_line(models, tmp_path, capsys):
    words = ["--text", str(models / "words.txt"), "--window", "64", "--windows", "12", "--threads", "1"]
    against = ["--base", str(models / "base")]
    file, out, picture = tmp_path / "much.json", tmp_path / "compared.json", tmp_path / "compared.png"
    assert main(["eval", str(models / "much"), *words, *against, "--json", str(file)]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "compare",
                str(models / "little"),
                str(file),
                *words,
                *against,
                "--json",
                str(out),
                "--picture",
                str(picture),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "real" in said and "Bonferroni" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    kl = next(d for d in found["differences"] if d["figure"] == "texts.words.kl")
    assert kl["real"] is True
    little, much = (found["artifacts"][name]["texts"]["words"]["divergence"] for name in ("little", "much"))
    assert kl["first_value"] == pytest.approx(little["mean_kl"], rel=1e-6), "means of windows are the mean over tokens"
    assert kl["interval"]["difference"] == pytest.approx(little["mean_kl"] - much["mean_kl"], rel=1e-6)
    nll = next(d for d in found["differences"] if d["figure"] == "texts.words.nll")
    assert math.exp(nll["first_value"]) == pytest.approx(
        found["artifacts"]["little"]["texts"]["words"]["perplexity"]["value"]
    )


def test_other_tokens_are_not_compared(models, tmp_path):
    other = save_tiny(tmp_path / "other")
    words = ["--text", str(models / "words.txt"), "--window", "64", "--windows", "2", "--threads", "1"]
    assert main(["compare", str(models / "base"), str(other), *words]) == 2
