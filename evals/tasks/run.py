"""Find tasks, by the harness's names or in local YAML files, and run them.

A local task file is the harness's own YAML. Paths in it (``data_files``, and a ``dataset_path`` that is a folder)
are taken from where the file lies, and nothing is fetched for it. As in the harness, ``!function`` in a task file
runs Python code next to it: use only task folders that you trust.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from llmlite.errors import InputError, OutsideError, first_line
from llmlite.evals.generate import Reader
from llmlite.extras import need

ENDINGS = (".yaml", ".yml")
BOOTSTRAPS = 1000  # of the standard error of metrics that are no means


@dataclass(frozen=True)
class TaskMetric:
    """One figure of a task as the harness computes it.

    ``stderr``: the harness's, None where it has none; ``items``: the value of each question in the data's order,
    empty where a question has none of its own (a group of tasks). With a metric like perplexity that sums over
    the texts first, an item is the row that the harness sums.
    """

    value: float
    stderr: float | None
    items: tuple[Any, ...]


@dataclass(frozen=True)
class TaskScore:
    """What a task gave: ``metrics`` by the harness's names, with ``:filter`` after it where a task has filters.

    ``questions``: how many were asked; ``shots``: examples in front of each; ``chat``: the chat template was used;
    ``kv``: types of the cache as K:V, None for the engine's usual ones.
    """

    questions: int
    shots: int | None
    chat: bool
    harness: str
    metrics: dict[str, TaskMetric]
    kv: str | None = None

    def to_json(self) -> dict[str, Any]:
        """``questions``, ``shots``, ``chat``, ``kv``, ``harness``; for each metric ``value``, ``stderr``, ``items``."""
        out: dict[str, Any] = {"questions": self.questions, "chat": self.chat, "harness": self.harness}
        if self.shots is not None:
            out["shots"] = self.shots
        if self.kv is not None:
            out["kv"] = self.kv
        for name, metric in self.metrics.items():
            out[name] = {"value": metric.value}
            if metric.stderr is not None:
                out[name]["stderr"] = metric.stderr
            if metric.items:
                out[name]["items"] = list(metric.items)
        return out


@dataclass(frozen=True)
class TaskSettings:
    """``names``: of the harness's tasks, of YAML files or of folders of them; ``limit``: first questions of each."""

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    chat: bool = False


def run_tasks(reader: Reader, settings: TaskSettings) -> dict[str, TaskScore]:
    """Every task's figures, by name. `InputError` for a task that can't be found or read, or asks what can't be done.

    Seeds are the harness's own defaults, so the examples in front of a question are those that its ``hf`` model gets.
    """
    need("eval", "lm_eval")
    from lm_eval.evaluator import simple_evaluate

    from llmlite.evals.tasks.model import HarnessModel, quiet

    quiet()
    manager, found = find_tasks(settings.names)
    try:
        results = simple_evaluate(
            HarnessModel(reader), tasks=found, task_manager=manager, limit=settings.limit, num_fewshot=settings.shots,
            apply_chat_template=settings.chat, fewshot_as_multiturn=settings.chat, bootstrap_iters=BOOTSTRAPS,
        )  # fmt: skip
    except ConnectionError as error:
        raise OutsideError(f"tasks: the data set hub can't be reached ({first_line(error)})") from None
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise InputError(f"tasks {', '.join(settings.names)}: can't be run ({first_line(error)})") from None
    assert results is not None
    return {name: _score(name, results, settings.chat) for name in results["results"]}


def _score(name: str, results: Any, chat: bool) -> TaskScore:
    samples = results.get("samples", {}).get(name, [])
    metrics = {}
    for key, value in results["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results["results"][name].get(f"{metric}_stderr,{chosen}")
        items = tuple(_plain(s[metric]) for s in samples if s["filter"] == chosen and metric in s)
        shown = metric if chosen == "none" else f"{metric}:{chosen}"
        metrics[shown] = TaskMetric(float(value), float(error) if isinstance(error, int | float) else None, items)
    asked = results.get("n-samples", {}).get(name, {}).get("effective", len({s["doc_id"] for s in samples}))
    shots = results.get("n-shot", {}).get(name)
    return TaskScore(asked, shots, chat, f"lm_eval {version('lm_eval')}", metrics)


def _plain(value: Any) -> Any:
    """Numbers, right or wrong as 1 or 0, rows of them; JSON can hold nothing else of it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def find_tasks(names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The harness's task manager, and what it is to load: a configuration for each local task, else a name."""
    need("eval", "lm_eval")
    from lm_eval.tasks import TaskManager

    local = {name: _files(name) for name in names if _is_path(name)}
    manager = TaskManager(include_defaults=len(local) < len(names))  # its index takes seconds to read
    found: list[Any] = []
    for name in names:
        if name in local:
            found += [_read(file) for file in local[name]]
        elif name in manager.all_tasks:
            found.append(name)
        else:
            near = get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else "; a YAML file or a folder of them is right, too"
            raise InputError(f"task {name!r} is unknown to lm-evaluation-harness{hint}")
    own = [task["task"] for task in found if isinstance(task, dict)]
    for task in own:
        if own.count(task) > 1:
            raise InputError(f"two task files are both called {task!r}, and results are kept by name: rename one")
    return manager, found


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.endswith(ENDINGS) or name.startswith((".", "/", "~"))


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{name}: no such task file or folder")
    # the harness's custom: a file that others include begins with an underscore
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and not file.name.startswith("_"))
    if not files:
        raise InputError(f"{name}: has no task file (.yaml)")
    return files


def _read(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        task = load_yaml(file)
    except (yaml.YAMLError, OSError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"{file}: is not a task file ({first_line(error)})") from None
    if not isinstance(task.get("task"), str):
        raise InputError(f"{file}: names no task; 'task: NAME' is right (a group is not read from a file)")
    folder = file.resolve().parent
    if isinstance(task.get("dataset_path"), str) and (folder / task["dataset_path"]).is_dir():
        task["dataset_path"] = str(folder / task["dataset_path"])
    data = (task.get("dataset_kwargs") or {}).get("data_files")
    if data is not None:
        task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": _located(data, folder, file)}
    return task


def _located(data: Any, folder: Path, file: Path) -> Any:
    """``data_files`` with whole paths; each must be there, so that no hub is asked for it."""
    if isinstance(data, dict):
        return {split: _located(part, folder, file) for split, part in data.items()}
    if isinstance(data, list):
        return [_located(part, folder, file) for part in data]
    if not isinstance(data, str) or "://" in data:
        raise InputError(f"{file}: data_files is {data!r}; the path of a local file is right")
    path = folder / data
    if not path.is_file():
        raise InputError(f"{file}: there is no data file {path}")
    return str(path)
