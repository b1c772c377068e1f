"""Tasks of lm-evaluation-harness on our engines: the same figures as the harness's own model, item by item."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmlite.errors import InputError
from llmlite.evals.engines import open_engine
from llmlite.evals.generate import reader_of
from llmlite.evals.kv import KvTypes
from llmlite.evals.tasks.run import TaskSettings, find_tasks, run_tasks
from tests import gguf_models
from tests.tiny import save_tiny

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch):
    """The harness asks pip for every installed package after each run, which takes longer than the run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "house"]
CHOICE = {
    "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def write_task(folder: Path, name: str, rows: list[dict], **changes) -> Path:
    """A task file and its data beside it, which it names by its own folder."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, **CHOICE, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, **changes}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
    return file


def sentence(random, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    asked = [
        {
            "question": sentence(random, 6 + n % 5) + " ",
            "choices": [sentence(random, 2 + k) for k in range(4)],
            "answer": int(random.integers(4)),
        }
        for n in range(12)
    ]
    write_task(folder, "own_choice", asked, num_fewshot=2, fewshot_split="test")
    texts = [{"question": "", "text": sentence(random, 150 if n == 2 else 20)} for n in range(4)]
    write_task(
        folder, "own_rolling", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None,
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    write_task(
        folder, "own_written", asked, output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def harness(checkpoint: Path, file: Path, **settings) -> dict:
    """The harness's own transformers model on a task file."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, found = find_tasks((str(file),))
    model = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=1, dtype="float32")
    return simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=1000, **settings)


def ours(artifact: Path, file: Path, kv: KvTypes | None = None, **settings):
    engine = open_engine(artifact, threads=1)
    scores = run_tasks(reader_of(engine, kv), TaskSettings((str(file),), **settings))
    engine.close()
    (score,) = scores.values()
    return score


def check_equal(score, results: dict, name: str) -> None:
    """Every metric, its error and its items are the harness's."""
    (figures,), samples = results["results"].values(), results["samples"][name]
    assert score.metrics
    for key, metric in score.metrics.items():
        assert metric.value == pytest.approx(figures[f"{key},none"], rel=1e-4)
        if metric.stderr is not None:
            assert metric.stderr == pytest.approx(figures[f"{key}_stderr,none"], rel=1e-3)
        assert np.asarray(metric.items) == pytest.approx(np.asarray([s[key] for s in samples], float), rel=1e-4)
    assert score.questions == len(samples)


@pytest.mark.parametrize("name", ["own_choice", "own_rolling", "own_written"])
def test_figures_are_the_harness_own(tiny, folder, name):
    check_equal(ours(tiny, folder / f"{name}.yaml"), harness(tiny, folder / f"{name}.yaml"), name)


@pytest.mark.parametrize("name", ["own_choice", "own_written"])
def test_the_chat_template_is_the_harness_own(tiny, folder, name):
    file = folder / f"{name}.yaml"
    wanted = harness(tiny, file, apply_chat_template=True, fewshot_as_multiturn=True)
    check_equal(ours(tiny, file, chat=True), wanted, name)
    plain, chat = ours(tiny, file).metrics, ours(tiny, file, chat=True).metrics
    assert name == "own_written" or plain != chat, "the template must make a difference here"


# Both models put a token in front of a text, and gemma3's cache can't be cut.
@pytest.mark.parametrize("name", ["own_choice", "own_written"])
@pytest.mark.parametrize(("kind", "chat"), [("llama3", True), ("gemma3", False)])
def test_both_engines_agree_on_models_with_a_first_token(tmp_path, folder, name, kind, chat):
    pytest.importorskip("llama_cpp")
    checkpoint = gguf_models.save_tiny(kind, tmp_path)
    file = folder / f"{name}.yaml"
    wanted = harness(checkpoint, file, apply_chat_template=chat, fewshot_as_multiturn=chat)
    check_equal(ours(checkpoint, file, chat=chat), wanted, name)
    score = ours(gguf_models.gguf_of(checkpoint, "f32"), file, KvTypes("f32", "f32"), chat=chat)
    check_equal(score, wanted, name)


def data() -> Path:
    folder = os.environ.get("LLMLITE_TEST_DATA")
    if not folder:
        pytest.skip("LLMLITE_TEST_DATA names no folder with hellaswag/ and openbookqa/")
    return Path(folder)


def hellaswag(file: Path) -> list[dict]:
    """Six lines for each item: context, gold index, four endings."""
    lines = file.read_text().splitlines()
    starts = range(0, len(lines) - 5, 6)
    return [{"question": lines[n], "choices": lines[n + 2 : n + 6], "answer": int(lines[n + 1])} for n in starts]


@pytest.mark.parametrize("name", ["hellaswag", "openbookqa"])
def test_real_tasks_are_equal_item_by_item(tmp_path, name):
    found = data() / ("hellaswag/hellaswag_val_400.txt" if name == "hellaswag" else "openbookqa/test.jsonl")
    if not found.is_file():
        pytest.skip(f"{found.name} is not there")
    rows = hellaswag(found) if name == "hellaswag" else [json.loads(line) for line in found.read_text().splitlines()]
    file = write_task(tmp_path, f"local_{name}", rows[:60])
    checkpoint = save_tiny(tmp_path / "model", max_position_embeddings=512)
    check_equal(ours(checkpoint, file), harness(checkpoint, file), f"local_{name}")


def test_local_files_need_no_network(tiny, folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    engine = open_engine(tiny, threads=1)
    scores = run_tasks(reader_of(engine), TaskSettings((str(folder),), limit=3))
    assert sorted(scores) == ["own_choice", "own_rolling", "own_written"]
    shown = json.loads(json.dumps(scores["own_choice"].to_json()))
    assert shown["questions"] == 3 and shown["shots"] == 2 and shown["chat"] is False
    assert set(shown["acc"]) == {"value", "stderr", "items"}
    assert shown["acc"]["value"] == np.mean(shown["acc"]["items"])
    engine.close()


def test_the_shared_beginning_of_choices_is_computed_once(tiny, folder, monkeypatch):
    engine = open_engine(tiny, threads=1)
    reader = reader_of(engine)
    computed = []
    forward = type(reader)._forward
    monkeypatch.setattr(
        type(reader), "_forward", lambda self, part, first: computed.append(len(part)) or forward(self, part, first)
    )
    asked = []
    predict = reader.predict
    monkeypatch.setattr(reader, "predict", lambda tokens, rows: asked.append(len(tokens)) or predict(tokens, rows))
    run_tasks(reader, TaskSettings((str(folder / "own_choice.yaml"),)))
    assert sum(computed) < 0.5 * sum(asked)
    engine.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "no data file .*gone.jsonl"),
        ({"dataset_kwargs": {"data_files": {"test": "https://a.b/c.jsonl"}}}, "local file"),
        ({"task": None}, "names no task"),
        ({"test_split": "other"}, "can't be run"),
        ({"output_type": "generate_until", "generation_kwargs": {"do_sample": True, "temperature": 0.7}}, "sampled"),
        ({"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 300}}, "300 tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_task_that_can_not_be_run_is_one_sentence(tiny, tmp_path, changes, said):
    file = write_task(tmp_path, "bad", [{"question": "the cat", "choices": ["sat", "ran"], "answer": 0}], **changes)
    with pytest.raises(InputError, match=said):
        ours(tiny, file)


def test_an_answer_without_tokens_is_refused(tiny):
    from lm_eval.api.instance import Instance

    from llmlite.evals.tasks.model import HarnessModel

    engine = open_engine(tiny, threads=1)
    with pytest.raises(InputError, match="empty answer"):
        HarnessModel(reader_of(engine)).loglikelihood([Instance("loglikelihood", {}, ("the cat", ""), 0)])
    engine.close()


def test_tasks_that_are_not_there_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no such task file"):
        find_tasks((str(tmp_path / "gone.yaml"),))
    with pytest.raises(InputError, match="no task file"):
        find_tasks((str(tmp_path),))
    (tmp_path / "a.yaml").write_text("task: [")
    with pytest.raises(InputError, match="is not a task file"):
        find_tasks((str(tmp_path),))
    with pytest.raises(InputError, match="did you mean hellaswag"):
        find_tasks(("helaswag",))
    write_task(tmp_path, "a", [])
    (tmp_path / "b.yaml").write_text((tmp_path / "a.yaml").read_text())
    with pytest.raises(InputError, match="both called 'a'"):
        find_tasks((str(tmp_path),))
