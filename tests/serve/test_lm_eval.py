"""lm-evaluation-harness asks over HTTP: the same figures, item by item, as its tasks in process."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from llmlite.evals.engines import open_engine
from llmlite.evals.generate import reader_of
from llmlite.evals.tasks.run import TaskSettings, find_tasks, run_tasks
from llmlite.serve.engines import open_artifact
from llmlite.serve.settings import ServeSettings
from tests.evals.test_tasks import sentence, write_task
from tests.gguf_models import gguf_of, save_tiny
from tests.serve.conftest import running


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch):
    """The harness asks pip for every installed package after each run, which takes longer than the run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = save_tiny("llama", tmp_path_factory.mktemp("tiny"))
    gguf_of(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    asked = [
        {
            "question": sentence(random, 6 + n % 5),
            "choices": [" " + sentence(random, 2 + k) for k in range(3)],
            "answer": int(random.integers(3)),
        }
        for n in range(5)
    ]
    write_task(folder, "choice", asked, target_delimiter="")
    texts = [{"question": "", "text": sentence(random, 12)} for _ in range(2)]
    write_task(
        folder, "rolling", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None,
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("name", ["choice", "rolling"])
def test_local_completions_gives_the_figures_of_the_process(name, kind, checkpoint, tasks):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    artifact = checkpoint if kind == "transformers" else checkpoint / "f32.gguf"
    file = tasks / f"{name}.yaml"
    engine = open_engine(artifact, threads=1)
    (wanted,) = run_tasks(reader_of(engine), TaskSettings((str(file),))).values()
    engine.close()
    with running(open_artifact(artifact, ServeSettings(threads=1)).engine) as server:
        model = LocalCompletionsAPI(
            model="model", base_url=f"{server.url}/v1/completions", tokenizer=str(checkpoint),
            tokenizer_backend="huggingface", tokenized_requests=True, max_length=512, max_retries=1,
        )  # fmt: skip
        manager, found = find_tasks((str(file),))
        results = simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=10)
    (figures,), samples = results["results"].values(), results["samples"][name]
    assert wanted.metrics
    for key, metric in wanted.metrics.items():
        assert figures[f"{key},none"] == pytest.approx(metric.value, rel=2e-3)
        items = [sample[key] for sample in samples]
        assert np.asarray(items, float) == pytest.approx(np.asarray(metric.items, float), rel=2e-3)
    if name == "choice":
        assert json.loads((tasks / "choice.jsonl").read_text().splitlines()[0])["choices"]
        assert len(samples) == 5
