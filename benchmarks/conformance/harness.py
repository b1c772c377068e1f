"""lm-evaluation-harness over HTTP, local-completions and local-chat-completions, against the same tasks in process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from benchmarks.conformance.result import Suite
from llmlite.evals.engines import open_engine
from llmlite.evals.generate import reader_of
from llmlite.evals.tasks.run import TaskScore, TaskSettings, find_tasks, run_tasks

CHOICE = {
    "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
WRITTEN = {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
}  # fmt: skip


def write_tasks(data: Path, folder: Path, items: int) -> dict[str, Path]:
    """Task files of the first ``items`` questions of OpenBookQA and HellaSwag: to choose from, and to write."""
    lines = (data / "hellaswag/hellaswag_val_400.txt").read_text("utf-8").splitlines()
    hellaswag = [
        {"question": lines[at], "choices": lines[at + 2 : at + 6], "answer": int(lines[at + 1])}
        for at in range(0, items * 6, 6)
    ]
    with open(data / "openbookqa/test.jsonl", encoding="utf-8") as file:
        openbookqa = [json.loads(line) for _, line in zip(range(items), file, strict=False)]
    tasks = {"openbookqa": (openbookqa, {}), "hellaswag": (hellaswag, {}), "written": (openbookqa, WRITTEN)}
    written = {}
    for name, (rows, changes) in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        task = {
            "task": name, **CHOICE, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, **changes
        }  # fmt: skip
        written[name] = folder / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump({k: v for k, v in task.items() if v is not None}), "utf-8")
    return written


def over_http(kind: str, url: str, tokenizer: Path, file: Path) -> Any:
    """The harness's results by its own client."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    chat = kind == "local-chat-completions"
    if chat:
        model = LocalChatCompletion(
            model="model", base_url=f"{url}/v1/chat/completions", max_retries=1, tokenizer_backend=None
        )
    else:
        model = LocalCompletionsAPI(
            model="model", base_url=f"{url}/v1/completions", tokenizer=str(tokenizer),
            tokenizer_backend="huggingface", tokenized_requests=True, max_length=2048, max_retries=1,
        )  # fmt: skip
    manager, found = find_tasks((str(file),))
    return simple_evaluate(
        model,
        tasks=found,
        task_manager=manager,
        bootstrap_iters=10,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


def differing(name: str, wanted: TaskScore, results: Any) -> str | None:
    """What is not equal, to 0.2 percent of each item's figure; None where all is."""
    figures, samples = results["results"][name], results["samples"][name]
    for metric, score in wanted.metrics.items():
        key = f"{metric},none"
        if abs(figures[key] - score.value) > 2e-3 * abs(score.value):
            return f"{metric}: {figures[key]} over HTTP, {score.value} in process"
        items = [sample[metric] for sample in samples if metric in sample]
        if score.items and not isinstance(score.items[0], tuple | list) and items != list(score.items):
            other = [number for number, pair in enumerate(zip(items, score.items, strict=True)) if pair[0] != pair[1]]
            return f"{metric}: questions {other} differ"
    return None


def run_harness(model: Path, url: str, tokenizer: Path, data: Path, folder: Path, items: int) -> Suite:
    """Every comparison counts as a test."""
    tasks = write_tasks(data, folder, items)
    engine = open_engine(model, threads=2)
    reader = reader_of(engine)
    pairs = [
        ("local-completions", "openbookqa"),
        ("local-completions", "hellaswag"),
        ("local-completions", "written"),
        ("local-chat-completions", "written"),
    ]
    passed: list[str] = []
    failed: list[str] = []
    notes: list[str] = []
    version = ""
    try:
        wanted = {
            (kind, name): run_tasks(reader, TaskSettings((str(tasks[name]),), chat="chat" in kind))[name]
            for kind, name in pairs
        }
    finally:
        engine.close()
    for kind, name in pairs:
        score = wanted[kind, name]
        version = re.sub(r"^lm_eval ", "", score.harness)
        problem = differing(name, score, over_http(kind, url, tokenizer, tasks[name]))
        shown = ", ".join(f"{metric} {value.value:.4g}" for metric, value in score.metrics.items())
        notes.append(f"{kind} {name}, {score.questions} questions: {shown}")
        (passed if problem is None else failed).append(f"{kind} {name}" + (f": {problem}" if problem else ""))
    return Suite("lm-eval local-completions, local-chat-completions", version, passed, failed, notes=notes)
