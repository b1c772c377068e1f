"""Judge an artifact: size, perplexity, divergence from its base, memory and speed, as one frozen result."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmlite.checkpoint.artifact import GGUF_FILE, read_manifest, write_manifest
from llmlite.errors import InputError
from llmlite.evals.engines import engine_version, open_engine
from llmlite.evals.generate import reader_of
from llmlite.evals.kv import parse_kv
from llmlite.evals.locate import find
from llmlite.evals.longcontext.needles import PERPLEXITY, TASKS
from llmlite.evals.longcontext.result import LongContext
from llmlite.evals.longcontext.run import LongContextSettings, run_long_context
from llmlite.evals.memory import Memory
from llmlite.evals.perplexity import PROTOCOLS
from llmlite.evals.probe import probe
from llmlite.evals.score import Score, Windows, score
from llmlite.evals.size import Size, measure_size
from llmlite.evals.speed import Speed
from llmlite.evals.tasks.run import TaskScore, TaskSettings, run_tasks
from llmlite.evals.texts import Text, read_text, read_texts

LONG_CONTEXT_TASKS = (*TASKS, PERPLEXITY)
ProtocolName = Literal["llama.cpp", "paper"]


@dataclass(frozen=True)
class EvalSettings:
    """What `evaluate` measures: size always, the rest as asked."""

    base: str | None = field(
        default=None, metadata={"help": "model to compare with: the divergence from it is measured"}
    )
    text: tuple[str, ...] = field(
        default=(), metadata={"help": "text file, .jsonl with a field 'text', or data set owner/name[:config[:split]]"}
    )
    protocol: ProtocolName = field(
        default="llama.cpp",
        metadata={"help": "llama.cpp: windows of 512, second half scored; paper: 2,048, all scored"},
    )
    window: int | None = field(default=None, metadata={"help": "tokens of a window (default: the protocol's)"})
    windows: int | None = field(default=None, metadata={"help": "score only the first N windows of each text"})
    speed: bool = field(default=False, metadata={"help": "measure prompt and generation speed"})
    memory: bool = field(default=False, metadata={"help": "measure weights, cache and peak memory"})
    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": "lm-evaluation-harness tasks: names, YAML files or folders of them"}
    )
    task_limit: int | None = field(default=None, metadata={"help": "ask only the first N questions of each task"})
    task_shots: int | None = field(default=None, metadata={"help": "examples in front of each question"})
    task_chat: bool = field(default=False, metadata={"help": "put tasks into the model's chat template"})
    long_context: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens of contexts with hidden facts that questions are asked about"}
    )
    long_context_tasks: tuple[str, ...] = field(
        default=LONG_CONTEXT_TASKS, metadata={"help": f"of {', '.join(LONG_CONTEXT_TASKS)} (default: all)"}
    )
    long_context_questions: int = field(default=4, metadata={"help": "questions of each task on each context"})
    long_context_samples: int = field(default=1, metadata={"help": "contexts of each length"})
    long_context_text: str | None = field(
        default=None, metadata={"help": "text to hide the facts in (default: sentences made from the seed)"}
    )
    seed: int = field(default=0, metadata={"help": "of the facts and sentences that are made up"})
    kv: str | None = field(
        default=None, metadata={"help": "K:V, types of the cache for tasks and long contexts, such as q8_0:q4_0"}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: every core)"})

    def check(self) -> None:
        """`InputError` for what can't be measured."""
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r} is unknown; known are {', '.join(PROTOCOLS)}")
        if self.base is not None and not self.text and not self.long_context:
            raise InputError("a base without a text: name a text with --text to measure the divergence on")
        for name, value, least in (
            ("window", self.window, 8), ("windows", self.windows, 1), ("threads", self.threads, 1),
            ("task_limit", self.task_limit, 1), ("task_shots", self.task_shots, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; {least} or more is right")
        if self.kv is not None and not self.tasks and not self.long_context:
            raise InputError("kv without tasks or long_context: nothing else here is measured through that cache")
        long_context_settings(self)


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of one artifact. ``scores`` has what each text gave, by its name; unmeasured is None."""

    artifact: str
    base: str | None
    engine: str
    version: str
    size: Size
    protocol: str
    window: int
    scores: dict[str, Score]
    memory: Memory | None
    speed: Speed | None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    long_context: LongContext | None = None

    @property
    def name(self) -> str:
        """Short, for a table: the last part of the artifact's path."""
        return Path(self.artifact).name or self.artifact

    def to_json(self) -> dict:
        """Plain data with the keys that scripts may rely on; what was not measured has no key."""
        out: dict = {
            "artifact": self.artifact,
            "engine": {"name": self.engine, "version": self.version},
            "bytes": self.size.bytes,
            "bits_per_weight": self.size.bits_per_weight,
            "parameters": self.size.parameters,
        }
        if self.scores:
            out["protocol"] = {"name": self.protocol, "window": self.window}
            out["texts"] = {name: _score_json(scored) for name, scored in self.scores.items()}
        if self.base is not None:
            out["base"] = self.base
        if self.memory is not None:
            out["memory"] = dataclasses.asdict(self.memory)
        if self.speed is not None:
            out["speed"] = dataclasses.asdict(self.speed)
        if self.tasks:
            out["tasks"] = {name: scored.to_json() for name, scored in self.tasks.items()}
        if self.long_context is not None:
            out["long_context"] = self.long_context.to_json()
        return out


def _score_json(scored: Score) -> dict:
    return {key: value for key, value in dataclasses.asdict(scored).items() if value is not None}


def evaluate(artifact: str | Path, settings: EvalSettings) -> Evaluation:
    """Measure what ``settings`` ask for of an artifact: a directory, a GGUF file or a hub id.

    Memory and speed are measured first, in a process that holds the artifact alone. Raises `InputError` for an
    artifact, a base or a text that can't be used.
    """
    settings.check()
    texts = read_texts(settings.text)
    windows = Windows(PROTOCOLS[settings.protocol], settings.window, settings.windows)
    location = find(artifact)
    if settings.base is not None:
        find(settings.base)
    size = measure_size(location)
    memory, speed = None, None
    if settings.memory or settings.speed:
        memory, speed = probe(location.path, settings.threads)
    return Evaluation(
        artifact=str(artifact),
        base=settings.base,
        engine=location.engine,
        version=engine_version(location.engine),
        size=size,
        protocol=settings.protocol,
        window=windows.length,
        scores=_scores(artifact, settings, texts, windows) if texts else {},
        memory=memory if settings.memory else None,
        speed=speed if settings.speed else None,
        tasks=_tasks(artifact, settings),
        long_context=_long_context(artifact, settings),
    )


def _scores(artifact: str | Path, settings: EvalSettings, texts: list[Text], windows: Windows) -> dict[str, Score]:
    with ExitStack() as opened:
        engine = open_engine(artifact, threads=settings.threads, context=windows.length)
        opened.callback(engine.close)
        base = None
        if settings.base is not None:
            base = open_engine(settings.base, threads=settings.threads, context=windows.length)
            opened.callback(base.close)
        return {text.name: score(engine, base, text, windows) for text in texts}


def _tasks(artifact: str | Path, settings: EvalSettings) -> dict[str, TaskScore]:
    if not settings.tasks:
        return {}
    engine = open_engine(artifact, threads=settings.threads)
    try:
        wanted = TaskSettings(settings.tasks, settings.task_limit, settings.task_shots, settings.task_chat)
        return run_tasks(reader_of(engine, parse_kv(settings.kv) if settings.kv else None), wanted)
    finally:
        engine.close()


def long_context_settings(settings: EvalSettings) -> LongContextSettings | None:
    """What is asked on long contexts, checked; None where nothing is."""
    if not settings.long_context:
        return None
    wanted = LongContextSettings(
        lengths=settings.long_context,
        tasks=settings.long_context_tasks,
        samples=settings.long_context_samples,
        questions=settings.long_context_questions,
        seed=settings.seed,
        text=read_text(settings.long_context_text) if settings.long_context_text else None,
        kv=parse_kv(settings.kv) if settings.kv else None,
    )
    wanted.check()
    return wanted


def _long_context(artifact: str | Path, settings: EvalSettings) -> LongContext | None:
    wanted = long_context_settings(settings)
    return run_long_context(artifact, settings.base, wanted, settings.threads) if wanted else None


def save_in_manifest(artifact: str | Path, evaluation: Evaluation) -> bool:
    """Keep the figures in the artifact's llmlite.json, under ``evals`` and the protocol's name, in a single step.

    Earlier figures by the same protocol are replaced as far as they were measured again. False where there is no
    llmlite.json that describes these weights.
    """
    location = find(artifact)
    manifest = read_manifest(location.directory)
    if manifest is None or (location.engine == "llama.cpp" and location.path.name != GGUF_FILE):
        return False
    evals = manifest.get("evals", {})
    before = evals.get(evaluation.protocol, {})
    if evaluation.scores:  # a score belongs to the base and the window it was measured with
        before = {key: before[key] for key in ("memory", "speed") if key in before}
    merged = {**before, **evaluation.to_json()}
    write_manifest(location.directory, {**manifest, "evals": {**evals, evaluation.protocol: merged}})
    return True
