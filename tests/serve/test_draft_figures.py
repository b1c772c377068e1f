"""What a draft is worth is measured as it is served, and kept in its manifest."""

import json

import pytest

from llmlite.checkpoint.artifact import write_manifest
from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.serve.draft_figures import measure_draft

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from tests.gguf_models import gguf_of, save_tiny
from tests.tiny import save_tiny as save_other


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    draft = gguf_of(save_tiny("llama", folder / "draft", num_hidden_layers=1))
    artifact = folder / "artifact"
    artifact.mkdir()
    (artifact / "model.gguf").write_bytes(draft.read_bytes())
    write_manifest(artifact, {"kind": "artifact", "evals": {"kept": 1}})
    return {"target": gguf_of(save_tiny("llama", folder / "target")), "artifact": artifact, "draft": draft,
            "other": gguf_of(save_tiny("llama3", folder / "other"))}  # fmt: skip


@pytest.fixture
def always(monkeypatch):
    """As if guesses were free, so that a busy machine's timings don't decide what is tested."""
    monkeypatch.setattr("llmlite.serve.turns.Rates.price", lambda self, drafting: 0.0)
    monkeypatch.setattr("llmlite.serve.draft_model.SURE", 0.0)


CHATS = [[{"role": "user", "content": text}] for text in ("the cat sat", "on the mat", "and ran")]


def test_a_model_guesses_itself_right_and_another_one_wrong(models, always):
    itself = measure_draft(models["target"], models["target"], CHATS, 40, threads=1)
    other = measure_draft(models["target"], models["draft"], CHATS, 40, threads=1)
    assert itself.drafted > 10 and itself.acceptance > 0.9
    assert other.drafted > 10 and other.acceptance < 0.9
    assert itself.prompts == 3 and 3 < itself.tokens <= 120
    assert itself.speed == pytest.approx(itself.drafted_for / itself.alone, rel=0.01)


def test_figures_are_kept_in_the_drafts_manifest_beside_what_is_there(models, always, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlite.serve.draft_figures.QUESTIONS", ("the cat", "a dog"))
    words = ["eval", str(models["artifact"]), "--draft-for", str(models["target"]), "--threads", "1"]
    assert main([*words, "--json", str(tmp_path / "facts.json")]) == 0
    told = json.loads((tmp_path / "facts.json").read_text())
    manifest = json.loads((models["artifact"] / "llmlite.json").read_text())
    assert manifest["evals"] == {"kept": 1}
    kept = manifest["draft_for"][str(models["target"])]
    assert kept["acceptance"] == told["acceptance"] and kept["speed"] == told["speed"] > 0


def test_what_cannot_draft_is_refused_in_one_sentence(models, tmp_path, capsys):
    with pytest.raises(InputError, match="a draft needs the same vocabulary"):
        measure_draft(models["target"], models["other"], CHATS, 8, threads=1)
    with pytest.raises(InputError, match="guesses for a GGUF file"):
        measure_draft(save_other(tmp_path / "base"), models["draft"], CHATS, 8)
    assert main(["eval", str(models["draft"]), "--draft-for", str(models["target"]), "--windows", "3"]) == 2
    assert "--windows does not go with it" in " ".join(capsys.readouterr().err.split())
